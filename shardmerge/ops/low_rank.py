"""``base + scale * B @ A`` of low-rank factors, block by block: what LoRA and DoRA share.

The product is summed in float64, and the sum with the base rounded to float32 once. The bits of a float32 product
change with the number of BLAS threads, with the processor and with the height of the block. Those of a float64 product
rounded to float32 were the same in all of 30 million numbers (OpenBLAS 0.3.31; 11 ranks from 8 to 512; blocks of 9
shapes, 7 by 53 among them; 1 and 2 threads; the kernels for Haswell, Zen, Sandybridge, Nehalem and Prescott). That is
luck where A and B have 32 bits: there the last bit in float64 depends on the kernel, and decides about one float32 in
2 ** 29. So the shape of a block follows from the shapes of the matrices and from nothing else: on one processor all
runs make the same bits. Products of 16-bit numbers are exact in float64, and so are nearly all their sums.

float64 costs half the speed: one core of an AMD EPYC (Zen 3) made 175, 100 and 30 million elements a second at ranks
64, 128 and 512.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import frexp
from typing import ClassVar

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream

# A product is [rows, r] @ [r, columns]. The BLAS packs both sides before it multiplies, which many rows pay for once:
# at r = 64 an element took 5.2 ns with 128 of them, 5.4 with 64 and 5.8 with 32, of which a product of the whole matrix
# takes 4.0. All columns of a block of rows are held at once, so a wide layer has fewer rows: 2 MiB of float32, a tile.
_HEIGHTS = (128, 64, 32)
_HELD = 1 << 19
# Numbers of a product, and of the part of A that it is made of: in float64 they fill a second-level cache. That makes
# 448, 896 or 1,792 columns at most. With 512 or 1,536 every row begins in the same set of a cache, which took a tenth
# longer.
_PRODUCT, _PANEL = 56 << 10, 224 << 10

# What numpy takes for a call on a part of rows: one buffer of 8,192 elements; and views, scalars.
_OVERHEAD = 8192 * 8 + 8192


@dataclass(frozen=True, slots=True)
class Factor:
    """A, and memory for blocks: pages fetched anew for every block took longer than the sums.

    Attributes
    ----------
    a
        ``[r, in]``, as stored.
    rows, columns
        Of a block, at most.
    panel, product, total
        A block's columns of A, its product, and the base with the product added, in float64.
    """

    a: Array
    rows: int
    columns: int
    panel: Array
    product: Array
    total: Array

    @classmethod
    def read(cls, stream: Stream) -> Factor:
        """Reads A."""
        rank, width = stream.meta.shape
        rows, columns = _block(rank, width)
        a = stream.read(0, rank * width).reshape(rank, width)
        return cls(a, rows, columns, np.empty(rank * columns), *np.empty((2, rows * columns)))

    @classmethod
    def of(cls, state: State) -> Factor:
        """Returns what ``prepare`` has read."""
        assert isinstance(state, cls)
        return state

    def rows_of(self, *flat: Array) -> Iterator[Array]:
        """Yields tiles as rows as wide as A."""
        width = self.a.shape[1]
        return (one.reshape(-1, width) if width else one.reshape(0, 0) for one in flat)

    def sums(self, b: Array, scale: float, base: Array) -> Iterator[tuple[slice, slice, Array, Array]]:
        """Yields rows, columns, ``scale * B @ A`` and its sum with the base there, in buffers used again for the next.

        Columns by columns, so that A is widened once for all blocks below each other. To multiply by a power of two
        changes no digit, so B is multiplied then, which is smaller than the product.
        """
        b = b.astype(np.float64).reshape(len(base), len(self.a))
        early = abs(frexp(scale)[0]) == 0.5
        if early:
            b *= scale
        for columns in self.panels():
            panel = _shaped(self.panel, self.a[:, columns])
            np.copyto(panel, self.a[:, columns])
            for rows in self.blocks(len(base)):
                part = base[rows, columns]
                product = _shaped(self.product, part)
                np.matmul(b[rows], panel, out=product)
                if not early:
                    product *= scale
                total = self.widened(part)
                total += product
                yield rows, columns, product, total

    def panels(self) -> Iterator[slice]:
        """Yields the columns of blocks beside each other."""
        return (slice(left, left + self.columns) for left in range(0, self.a.shape[1], self.columns))

    def blocks(self, height: int) -> Iterator[slice]:
        """Yields the rows of blocks below each other."""
        return (slice(top, top + self.rows) for top in range(0, height, self.rows))

    def widened(self, block: Array) -> Array:
        """Returns a block in float64, in the buffer of the totals."""
        total = _shaped(self.total, block)
        np.copyto(total, block)
        return total


def _shaped(buffer: Array, like: Array) -> Array:
    return buffer[: like.size].reshape(like.shape)


def narrow(wide: Array, out: Array, *inputs: Array) -> int:
    """Rounds float64 into ``out``; returns how many results of finite inputs are not finite. Three masks at most."""
    np.copyto(out, wide, casting="unsafe")
    lost = np.isfinite(out)
    if lost.all():
        return 0
    np.logical_not(lost, out=lost)
    for values in inputs:
        lost &= np.isfinite(values)
    return int(np.count_nonzero(lost))


@dataclass(frozen=True, slots=True)
class LowRank(Arithmetic):
    """``scale * B @ A`` in some sum. Inputs: A ``[r, in]``, B ``[out, r]``, others, and last the base ``[out, in]``.

    Attributes
    ----------
    scale
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    like: ClassVar[int] = -1
    multiplies: ClassVar[bool] = True

    scale: float

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return block_elements(inputs)

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of all but A, which is in the state."""
        return row_ranges(inputs, start, count)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """A as stored, and blocks in float64."""
        return factor_bytes(inputs[0])

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A, and memory for blocks."""
        return Factor.read(inputs[0])

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """What a sum takes beside the state."""
        return sum_bytes(inputs, count)


# ---- shapes and sizes, known before a byte is read; inputs are A, B, others, and last the base


def _block(rank: int, width: int) -> tuple[int, int]:
    """Returns rows and columns of a block."""
    rows = next((rows for rows in _HEIGHTS if rows * width <= _HELD), _HEIGHTS[-1])
    columns = min(_PRODUCT // rows, _PANEL // max(rank, 1)) // 16 * 16
    return rows, min(max(columns, 16), width)


def block_elements(inputs: Sequence[Meta]) -> int:
    """Returns the elements of a block of whole rows."""
    rank, width = inputs[0].shape
    return max(1, _block(rank, width)[0] * width)


def row_ranges(inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
    """Returns which elements of each input some rows of the result need, from their elements; of A none."""
    rank, width = inputs[0].shape
    row, rows = (start // width, count // width) if width else (0, 0)
    numbers = [0, rank, *(width if len(meta.shape) == 2 else 1 for meta in inputs[2:])]  # in a row; a magnitude has one
    return tuple((row * each, rows * each) for each in numbers)


def factor_bytes(a: Meta) -> int:
    """Returns the bytes of a ``Factor``, and of reading it."""
    (rank, width), (rows, columns) = a.shape, _block(*a.shape)
    return rank * width * a.dtype.itemsize + 8 * (rank + 2 * rows) * columns + _OVERHEAD


def sum_bytes(inputs: Sequence[Meta], count: int) -> int:
    """Returns the bytes of making ``count`` elements: rows of B in float64; masks of a block; the BLAS's own."""
    rank, width = inputs[0].shape
    rows, columns = _block(rank, width)
    return 8 * rank * (count // max(width, 1)) + 3 * rows * columns + _OVERHEAD + PRODUCT_BYTES


def check_factors(label: str, a: Meta, b: Meta, base: Meta, *others: Meta) -> None:
    """Raises MappingError ``op-shape`` where A, B and the base do not fit, or one of all is no float tensor."""
    odd = [meta.dtype.name for meta in (a, b, base, *others) if meta.dtype.kind != "float"]
    if odd:
        hint = "packed weights cannot be added to: name the 16-bit model that was quantized"
        raise MappingError("op-shape", f"{label}: {odd[0]} is no float type", hint=hint)
    fits = len(a.shape) == len(b.shape) == len(base.shape) == 2
    if not fits or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != base.shape:
        raise MappingError(
            "op-shape",
            f"{label}: A, B and the base do not fit",
            found=f"A {list(a.shape)}, B {list(b.shape)}, base {list(base.shape)}",
            expected="A [r, in], B [out, r], base [out, in]",
            hint="name the base that the adapter was trained on",
        )
