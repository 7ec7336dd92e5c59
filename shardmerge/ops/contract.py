"""What an op is. Two families: moves, which only say where bytes lie, and arithmetic.

An op is a frozen value: its fields are its parameters and stand in the plan. It sees types, shapes and arrays, never
names or files. A move compiles away: the planner turns its ``layout`` into regions of the source files. Arithmetic
works on any range of the output, in float32 (float64 where an input is), and is rounded once, by the cast behind it.

A family is one module that exports ``KINDS``; ``ops.registry`` lists the families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from shardmerge.dtypes import DTYPES, DType

if TYPE_CHECKING:
    from shardmerge.ops.arrays import Array  # a mapping is read without numpy

Shape: TypeAlias = tuple[int, ...]


class Typed(Protocol):
    """Anything with a type and a shape: a tensor's entry, an array."""

    @property
    def dtype(self) -> DType:
        """Its element type."""

    @property
    def shape(self) -> Shape:
        """Its shape."""


@dataclass(frozen=True, slots=True)
class Meta:
    """A tensor without its data."""

    dtype: DType
    shape: Shape

    @classmethod
    def of(cls, tensor: Typed) -> Meta:
        """Returns type and shape of a tensor."""
        return cls(tensor.dtype, tensor.shape)


class Op(ABC):
    """Anything done to tensors.

    Attributes
    ----------
    like
        Which input's type the result keeps where nobody asks for another: that of a base, not of its adapter.
    """

    __slots__ = ()

    like: ClassVar[int] = 0

    @property
    @abstractmethod
    def label(self) -> str:
        """How the plan calls it, parameters included: ``cast F32 to BF16``, ``split dim 0 [4096, 1024, 1024] 2``."""

    def words(self, inputs: Sequence[Typed]) -> str:
        """What it does, for people: ``split in 3 (4096 + 1024 + 1024 rows)``; empty where types tell all of it.

        Tensors with the same words are counted together: a part's number is not among them.
        """
        del inputs
        return self.label

    @abstractmethod
    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns type and shape of the result.

        Raises
        ------
        MappingError
            ``op-shape``: inputs that the op cannot take, with what was found and what was expected.
        """


@dataclass(frozen=True, slots=True)
class ViewLayout:
    """The result is ``torch.as_strided`` of the one input's row-major elements.

    Attributes
    ----------
    offset
        First element.
    shape, strides
        In elements; any number of axes. The row-major order of ``shape`` is that of the result.
    """

    offset: int
    shape: Shape
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ColumnsLayout:
    """The inputs side by side: each is ``[rows, numel / rows]``, and row i of the result is row i of all, in order."""

    rows: int


MoveLayout: TypeAlias = ViewLayout | ColumnsLayout


class Move(Op):
    """Moves bytes, makes none: the result's elements are elements of the inputs."""

    __slots__ = ()

    @abstractmethod
    def layout(self, inputs: Sequence[Meta]) -> MoveLayout:
        """Returns where the elements of the result lie."""

    @abstractmethod
    def apply(self, inputs: Sequence[Array]) -> Array:
        """Returns the result for whole arrays: what ``layout`` has to agree with."""


class Stream(Protocol):
    """An input that an op may read ahead of its tiles."""

    @property
    def meta(self) -> Meta:
        """Its type and shape."""

    def read(self, start: int, count: int) -> Array:
        """Returns elements ``[start, start + count)``, row-major, 1-D, as stored, in memory of their own."""


# What `prepare` found, given back to every `apply` of the same tensor. Each op narrows it to its own type.
State: TypeAlias = object


class Arithmetic(Op):
    """Computes. Every range of the result can be made alone, once the state of the whole is known.

    Attributes
    ----------
    multiplies
        Whether products of matrices are made, for which numpy's BLAS is given one thread.
    """

    __slots__ = ()

    multiplies: ClassVar[bool] = False

    @property
    def own(self) -> DType | None:
        """The type the result keeps where nobody asks for another, where no input has it; None for that of ``like``."""
        return None

    @property
    def preparing(self) -> Op:
        """What ``prepare`` goes by: ops for which it is equal have one state where they have the same inputs."""
        return self

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns how many elements are made together; ranges begin at its multiples.

        Part of the result: a sum must not depend on where a tile happens to be cut.
        """
        del inputs
        return 1

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Returns the (start, count) that making elements ``[start, start + count)`` needs of each input.

        A count of 0 asks for nothing: the state knows all of that input.
        """
        return ((start, count),) * len(inputs)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the most bytes that ``prepare`` allocates and the state holds, arrays read from streams included."""
        del inputs
        return 0

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what must be known of the whole inputs; called once for tensors of one state that
        are made together. Reads in blocks of fixed size.
        """
        del inputs
        return None

    @abstractmethod
    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the most bytes that ``apply`` allocates for ``count`` elements of the result."""

    @abstractmethod
    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` and returns how many finite values overflowed.

        Parameters
        ----------
        state
            From ``prepare``.
        tiles
            What ``ranges`` asked for, 1-D, as stored; must not be written to.
        start
            First element of the result in ``out``.
        out
            1-D, of the inferred type.
        """


def result_dtype(inputs: Sequence[Meta]) -> DType:
    """Returns the type arithmetic is done in: float32, or float64 where an input is."""
    return DTYPES["F64"] if any(meta.dtype.name == "F64" for meta in inputs) else DTYPES["F32"]


# --- how an op is called in mapping.yaml ---

ParamValue: TypeAlias = int | float | bool | str | tuple[int, ...] | tuple[float, ...]
ParamKind: TypeAlias = Literal["int", "number", "flag", "text", "ints", "numbers", "dtype"]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of an op.

    Attributes
    ----------
    kind
        ``int`` and ``number`` take expressions (``heads * head_dim``), ``ints`` and ``numbers`` lists of them.
    about
        One line for the documentation.
    default
        None where the parameter must be given, or where ``optional`` says that it may be absent.
    choices
        What a ``text`` may be; empty for anything.
    only_with
        Another parameter and the value that it must have for this one to do anything.
    """

    name: str
    kind: ParamKind
    about: str
    default: ParamValue | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    only_with: tuple[str, str] | None = None


Texts: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Mirror:
    """One op undoes the other: ``params`` turns the parameters, as written, into those of the op ``name``."""

    name: str
    params: Callable[[Texts], Texts]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Siblings that differ in ``take`` alone and take every part are undone together, by the op ``name`` over them."""

    name: str


@dataclass(frozen=True, slots=True)
class Scattered:
    """Input k is the op ``name`` with the same parameters and ``take: k``; ``needs`` must be given."""

    name: str
    needs: str


Inverse: TypeAlias = Mirror | Gathered | Scattered


@dataclass(frozen=True, slots=True)
class OpKind:
    """An op as mapping.yaml knows it.

    Attributes
    ----------
    name
        The word behind ``op:``.
    about
        What it does, for its page in the documentation: a sentence, then details, in Markdown.
    example
        A rule or two, as YAML, that the documentation shows and the tests execute.
    params
        Besides ``op`` and ``of``.
    build
        Makes the op of the parameters' values; raises MappingError ``op-value`` for values that make no sense.
        A ``salt`` (text) of the target's name is among them, for ops that draw random numbers.
    terms
        Parameters that are tensors; they come before those of ``of`` in the op's inputs.
    many
        Whether ``of`` is a list (or a template with ``{e*}``).
    inverse
        None: lossy.
    lossy
        Why there is no inverse.
    takes_of
        Whether there is an ``of``; an op without makes its elements of nothing.
    optional_terms
        Parameters that are tensors and may be absent; they come first, and ``build`` finds true under their names.
    """

    name: str
    about: str
    example: str
    params: tuple[Param, ...]
    build: Callable[[Mapping[str, ParamValue]], Op]
    terms: tuple[str, ...] = ()
    many: bool = False
    inverse: Inverse | None = None
    lossy: str = ""
    takes_of: bool = True
    optional_terms: tuple[str, ...] = ()
