"""New rows for a vocabulary that grew.

The resize itself is a slice, or these rows behind the old ones; the planner puts that together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.dtypes import DTYPES
from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, State, Stream, Typed
from shardmerge.ops.normals import NORMAL_BYTES, normals
from shardmerge.ops.row_init import ROW_INITS, RowInit, row_init

# Rows summed at a time. Part of the result (float64 addition is not associative), so it never depends on the budget.
BLOCK_ROWS = 256

# Columns drawn at a time.
_PIECE = 4096

# A buffer of 8,192 numbers that numpy takes for a call; views, scalars and a random generator.
_OVERHEAD = (64 + 16) << 10


@dataclass(frozen=True, slots=True)
class NewRows(Arithmetic):
    """So many rows ``[rows, ...]`` after the example of an input ``[old rows, ...]``. The result is float64.

    XTuner and transformers draw new rows from a normal distribution around the old ones' mean, unseeded; the mean is
    the same on every run, and gives a new token neither a large nor a zero logit.

    Attributes
    ----------
    rows
        New rows.
    how
        ``mean`` of the old rows, summed in float64; ``zeros``; ``copy`` of the row ``row``; ``normal``: mean plus the
        standard deviation of each column times a draw that depends on ``seed`` and its place alone.
    """

    rows: int
    how: RowInit = "mean"
    row: int = 0
    seed: int = 0

    @property
    def label(self) -> str:
        """``64 new rows (mean)``."""
        detail = {"copy": f" of row {self.row}", "normal": f", seed {self.seed}"}.get(self.how, "")
        return f"{self.rows} new rows ({self.how}{detail})"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``new rows: mean``."""
        del inputs
        detail = {"copy": f" of row {self.row}", "normal": f", seed {self.seed}"}.get(self.how, "")
        return f"new rows: {self.how}{detail}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape of the new rows."""
        (one,) = inputs
        if one.dtype.kind != "float" or not one.shape or not one.shape[0]:
            what = f"{self.label}: the tensor has no rows of floats"
            raise MappingError("op-shape", what, found=f"{one.dtype} {list(one.shape)}", expected="[rows, ...] floats")
        if self.how == "copy" and not 0 <= self.row < one.shape[0]:
            what = f"{self.label}: there is no such row"
            raise MappingError("op-value", what, found=str(self.row), expected=f"0 to {one.shape[0] - 1}")
        return Meta(DTYPES["F64"], (self.rows, *one.shape[1:]))

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Nothing: the state knows all that matters of the old rows."""
        return ((0, 0),)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """One block as stored and as float64, and four rows of float64; of rows not summed one as stored alone."""
        width, size = _width(inputs[0]), inputs[0].dtype.itemsize
        if self.how in {"zeros", "copy"}:
            return width * (size + 16) + _OVERHEAD
        return width * (min(inputs[0].shape[0], BLOCK_ROWS) * (size + 8) + 32) + _OVERHEAD

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns the row every new one is like, and the deviation of each column (0 but for ``normal``)."""
        stream = inputs[0]
        width = _width(stream.meta)
        flat = np.zeros(width)
        match self.how:
            case "zeros":
                return flat, flat
            case "copy":
                return stream.read(self.row * width, width).astype(np.float64), flat
            case "mean":
                return _mean(stream, width), flat
            case "normal":
                mean = _mean(stream, width)
                return mean, _deviation(stream, width, mean)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Nothing but the words of one piece of ``normal`` and the draws made of them."""
        piece = min(count, _width(inputs[0]), _PIECE) + 1
        return _OVERHEAD + ((16 + NORMAL_BYTES) * piece if self.how == "normal" else 0)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range, a part of one row at a time."""
        assert isinstance(state, tuple)
        like, deviation = state
        place = start
        while place < start + len(out):
            row, low = divmod(place, len(like))
            high = min(low + _PIECE, len(like), low + start + len(out) - place)
            part = out[place - start :][: high - low]
            np.copyto(part, like[low:high])
            if self.how == "normal":
                draws = self._draws(row, low, high)
                np.multiply(draws, deviation[low:high], out=draws)
                np.add(part, draws, out=part)
                del draws
            place += high - low
        return 0

    def _draws(self, row: int, low: int, high: int) -> Array:
        """Standard normal numbers of columns of a row, which has a Philox generator of its own, keyed by seed and row.

        Column c takes words 2 c and 2 c + 1, made here into a number: numpy promises the words for ever, its own normal
        numbers it does not. The generator skips four words, a count of its counter, at a time.
        """
        generator = np.random.Philox(key=[self.seed, row])
        generator.advance(low // 2)
        return normals(generator.random_raw(2 * (high - low // 2 * 2)))[low % 2 :]


def _width(meta: Meta) -> int:
    return prod(meta.shape[1:])


def _blocks(stream: Stream, width: int) -> Iterator[Array]:
    rows = stream.meta.shape[0]
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        yield stream.read(first * width, count * width).reshape(count, width).astype(np.float64)


def _mean(stream: Stream, width: int) -> Array:
    total = np.zeros(width)
    for block in _blocks(stream, width):
        total += block.sum(axis=0)
        del block  # before the next one is read
    return total / stream.meta.shape[0]


def _deviation(stream: Stream, width: int, mean: Array) -> Array:
    total = np.zeros(width)
    for block in _blocks(stream, width):
        np.subtract(block, mean, out=block)
        np.square(block, out=block)
        total += block.sum(axis=0)
        del block
    return np.sqrt(total / stream.meta.shape[0])


def _build(values: Mapping[str, ParamValue]) -> NewRows:
    rows, row, seed = (values[key] for key in ("rows", "row", "seed"))
    assert isinstance(rows, int)
    assert isinstance(row, int)
    assert isinstance(seed, int)
    if rows < 1 or seed < 0:
        raise MappingError("op-value", f"`rows` is {rows} and `seed` {seed}", expected="at least 1 row, and no sign")
    how = row_init(str(values["new"]))
    assert how is not None  # the reader of the mapping made sure
    return NewRows(rows, how, row, seed)


KINDS = (
    OpKind(
        name="new_rows",
        about="Creates rows for a larger vocabulary from the old rows. To resize embedding, head and config together, "
        "use `vocabulary:`; this op is for other tensors, with `concat`.",
        example='embed.weight: {op: concat, of: ["src:embed.weight", {op: new_rows, of: "src:embed.weight", rows: 2}]}',
        params=(
            Param("rows", "int", "The number of new rows."),
            Param("new", "text", "The values of the new rows.", "mean", choices=ROW_INITS),
            Param("row", "int", "The row that `copy` copies.", 0, only_with=("new", "copy")),
            Param("seed", "int", "The seed for `normal`.", 0, only_with=("new", "normal")),
        ),
        build=_build,
        lossy="new rows say nothing of the old ones",
    ),
)
