"""Two checkpoints of any format, tensor by tensor, the worst differences first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.gather import Assembler
from shardmerge.execute.pins import Pins
from shardmerge.ops.arrays import Array, as_array
from shardmerge.plan.value import Plan
from shardmerge.publish.closeness import Closeness, Distance, cast, castable
from shardmerge.shown import Displayed
from shardmerge.storage.packed import source_opener
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog, FileStamp, TensorEntry

# Elements compared at a time: 4 MiB of the widest type.
_STEP = (4 << 20) // 8


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two checkpoints differ.

    Attributes
    ----------
    name
        The tensor.
    what
        ``only in A``, ``only in B``, ``dtype``, ``shape`` or ``values``.
    detail
        For people: the two sides, or how many elements differ and by how much.
    distance
        Of ``values``: the numbers behind the detail.
    after_cast
        Of ``dtype``: the type to which one side is cast to give the values of the other; ``""`` if there is none.
    """

    name: str
    what: str
    detail: str
    distance: Distance | None = None
    after_cast: str = ""


# The differences of one tensor.
_Group: TypeAlias = tuple[Difference, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Displayed):
    """What a comparison found. It iterates over the differences; if there are none, it is empty.

    Attributes
    ----------
    differences
        The worst first: what one side lacks, other shapes, values by their largest absolute difference, types.
    equal
        How many tensors are equal; without data, how many have the same type and shape.
    close
        How many more are, within the tolerance.
    """

    differences: tuple[Difference, ...]
    equal: int
    close: int

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.differences)

    def __len__(self) -> int:
        return len(self.differences)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of tensors, each counted once."""
        whats = [one.what for one in self.differences]
        cast_only = sum(1 for one in self.differences if one.after_cast)
        a, b = whats.count("only in A"), whats.count("only in B")
        return {
            "equal": self.equal,
            "within tolerance": self.close,
            "equal after a cast": cast_only,
            "differ": len({one.name for one in self.differences}) - cast_only - a - b,
            "only in A": a,
            "only in B": b,
        }

    @property
    def summary(self) -> str:
        """The counts in words: ``289 equal, 2 differ, 1 only in A``."""
        return ", ".join(f"{count:,} {what}" for what, count in self.counts.items() if count) or "0 equal"


class Sides:
    """Two sides to compare, whose headers are known.

    Parameters
    ----------
    left, right
        A checkpoint each, or a plan whose tensors are made as they are compared.
    how
        What counts as equal.
    """

    def __init__(self, left: Catalog | Plan, right: Catalog | Plan, how: Closeness) -> None:
        self._left, self._right, self._how = _entries(left), _entries(right), how
        pool = FilePool(open_file=source_opener())
        pool.opened = Pins([*_files(left), *_files(right)]).opened
        self._readers = Assembler(pool), Assembler(pool)

    @property
    def nbytes(self) -> int:
        """Bytes of the left side that are going to be compared."""
        both = ((left, self._right[name]) for name, left in self._left.items() if name in self._right)
        return sum(left.nbytes for left, right in both if left.shape == right.shape and not self._how.headers)

    def compare(self, progress: Progress | None = None) -> Comparison:
        """Compares names, types, shapes, then values; the memory it takes does not grow with the tensors.

        Parameters
        ----------
        progress
            Called with the bytes of the left side that were compared.

        Raises
        ------
        CheckpointError
            ``source-changed``, ``truncated-file``, ``unreadable-file``.
        """
        groups = [
            *self._alone("only in A", self._left, self._right),
            *self._alone("only in B", self._right, self._left),
        ]
        equal = close = 0
        for name, left in self._left.items():
            if name in self._right:
                group, near = self._pair(name, left, self._right[name], progress or _unseen)
                groups += [group] if group else []
                equal += not (group or near)
                close += not group and near
        groups.sort(key=_severity)
        return Comparison(tuple(one for group in groups for one in group), equal, close)

    @staticmethod
    def _alone(what: str, own: Mapping[str, TensorEntry], other: Mapping[str, TensorEntry]) -> Iterator[_Group]:
        for name, entry in own.items():
            if name not in other:
                yield (Difference(name, what, f"{entry.dtype} {list(entry.shape)}"),)

    def _pair(self, name: str, left: TensorEntry, right: TensorEntry, progress: Progress) -> tuple[_Group, bool]:
        """Returns how two tensors differ, and whether they are equal within the tolerance only."""
        if left.shape != right.shape:
            return (Difference(name, "shape", f"{list(left.shape)} and {list(right.shape)}"),), False
        types = f"{left.dtype} and {right.dtype}"
        typed = self._how.type_of(left.dtype) == self._how.type_of(right.dtype)
        if self._how.headers:
            return () if typed else (Difference(name, "dtype", types),), False
        distance, after = self._values(left, right, None if typed else _narrower(left.dtype, right.dtype), progress)
        if typed and not distance.beyond:
            return (), distance.differing > 0
        if after is not None:
            return (Difference(name, "dtype", f"{types}, equal after a cast to {after}", after_cast=after.name),), False
        if not distance.beyond:
            same = "within the tolerance" if distance.differing else "equal values"
            return (Difference(name, "dtype", f"{types}, {same}"),), False
        values = Difference(name, "values", str(distance), distance)
        return (values,) if typed else (Difference(name, "dtype", types), values), False

    def _values(
        self, left: TensorEntry, right: TensorEntry, narrow: DType | None, progress: Progress
    ) -> tuple[Distance, DType | None]:
        """Returns how far two tensors are apart, and the narrower type if they are equal after a cast to it."""
        distance, after = Distance(), Distance()
        for start in range(0, left.numel, _STEP):
            count = min(_STEP, left.numel - start)
            views = [reader.view(one, start, count) for reader, one in zip(self._readers, (left, right), strict=True)]
            a, b = as_array(views[0], left.dtype), as_array(views[1], right.dtype)
            distance.add(self._as_compared(a, left.dtype), self._as_compared(b, right.dtype), self._how)
            if narrow is not None and not after.differing:
                after.add(cast(a, left.dtype, narrow), cast(b, right.dtype, narrow), self._how)
            del a, b
            for reader, view in zip(self._readers, views, strict=True):
                reader.release(view)
            progress(count * left.dtype.itemsize)
        for reader in self._readers:
            reader.forget()
        return distance, narrow if narrow is not None and not after.differing else None

    def _as_compared(self, array: Array, dtype: DType) -> Array:
        return cast(array, dtype, self._how.type_of(dtype))


def _entries(side: Catalog | Plan) -> Mapping[str, TensorEntry]:
    if isinstance(side, Catalog):
        return {name: side[name] for name in side.names()}
    return {tensor.name: tensor.entry for tensor in side.tensors()}


def _files(side: Catalog | Plan) -> tuple[FileStamp, ...]:
    return side.files if isinstance(side, Catalog) else side.files()


def _narrower(left: DType, right: DType) -> DType | None:
    """Returns the type that a cast of one side would lead to: the narrower one, of two as wide that of B."""
    narrow = left if left.itemsize < right.itemsize else right
    return narrow if castable(left, narrow) and castable(right, narrow) else None


def _severity(group: _Group) -> tuple[int, bool, float, float]:
    """Returns what sorts the worst first."""
    distance = group[-1].distance
    if distance is None:
        order = ("only in A", "only in B", "shape", "values", "dtype")
        return order.index(group[-1].what), False, 0.0, 0.0
    return 3, not distance.nonfinite, -distance.max_abs, -distance.beyond / distance.elements


def _unseen(nbytes: int) -> None:
    """Nobody watches."""
