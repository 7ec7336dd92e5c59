"""Casts between float types: which there are, what they lose, what they cost. Read and planned without numpy.

Bits are those of torch 2.13: ``rounding`` says what they are, and ``fast_casts`` makes them at the speed that
``docs/benchmarks.md`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.ops.cast_blocks import PEAK
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, State, Typed
from shardmerge.ops.holding import holds

if TYPE_CHECKING:
    from shardmerge.ops.arrays import Array


@dataclass(frozen=True, slots=True)
class Cast(Arithmetic):
    """A cast from one float type to another.

    Attributes
    ----------
    source, target
        Different float types of the table.
    """

    source: DType
    target: DType

    @property
    def label(self) -> str:
        """``cast F32 to BF16``."""
        return f"cast {self.source} to {self.target}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """Nothing: the types before and after tell it."""
        del inputs
        return ""

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the same shape in the target type."""
        return Meta(self.target, inputs[0].shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of temporaries: those of a few blocks, whatever the count."""
        return PEAK

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` (dtype ``target``) from the one tile (dtype ``source``); returns the overflow count."""
        from shardmerge.ops.fast_casts import convert

        return convert(tiles[0], out, self.source, self.target)


@dataclass(frozen=True, slots=True)
class Widen(Cast):
    """An exact cast that nobody asked for: it lets tensors of different types lie side by side."""


def exact(cast: Cast) -> bool:
    """Tells whether a cast changes no value, so that a later one may skip it."""
    return holds(cast.target, cast.source)


CASTABLE = frozenset(row.name for row in DTYPES.values() if row.kind == "float" and row.name != "F8_E8M0")


def _build(values: Mapping[str, ParamValue]) -> Cast:
    """The source type is not known yet: ``compose`` takes it from the input."""
    return Cast(DTYPES["F32"], float_dtype(str(values["dtype"])))


KINDS = (
    OpKind(
        name="cast",
        about="Casts a float tensor, independent of `output.dtype`. Rounds to nearest, ties to even; integers and "
        "booleans are unchanged.",
        example='"{name}.norm.weight": {op: cast, of: "src:{name}.norm.weight", dtype: float32}',
        params=(Param("dtype", "dtype", "`float32`, `bfloat16`, `float16`, ..."),),
        build=_build,
        lossy="a cast to a narrower type forgets bits",
    ),
)
