"""The leading singular directions of a matrix that is only streamed, by LAPACK on its smaller Gram matrix.

``D^T D`` or ``D D^T``, whichever is smaller, is summed in float64, block by block, and ``eigh`` gives its vectors. The
product ``U_r S_r V_r^T`` is the best of its rank, as that of an SVD: an error of the eigenvectors, about 1e-16 of the
largest eigenvalue, changes the distance to the matrix in second order. Vectors get the sign that makes their largest
component positive. One thread and blocks by shape alone: on one processor all runs make the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, Stream

# Elements of a block that is read at once: 8 MiB in float64.
_BLOCK = 1 << 20
# What numpy takes for a call: buffers of 8,192 elements; and views, scalars.
_OVERHEAD = 8192 * 8 * 2 + 65536


@dataclass(frozen=True, slots=True)
class Streamed:
    """A matrix ``[rows, columns]``, or the first minus the second of two, in float64."""

    streams: tuple[Stream, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.streams[0].meta.shape
        return rows, columns

    def blocks(self, height: int = 0) -> Iterator[tuple[slice, Array]]:
        """Yields rows and what they hold, ``height`` of them or as many as a block has."""
        rows, columns = self.shape
        height = height or block_rows(rows, columns)
        for top in range(0, rows, height):
            low = slice(top, min(top + height, rows))
            yield low, self.read(low)

    def read(self, rows: slice) -> Array:
        """Returns some rows."""
        _, columns = self.shape
        count = rows.stop - rows.start
        first, *others = (one.read(rows.start * columns, count * columns) for one in self.streams)
        wide = first.astype(np.float64).reshape(count, columns)
        for other in others:
            wide -= other.reshape(count, columns)
        return wide


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading directions of a matrix.

    Attributes
    ----------
    vectors
        ``[r, columns]`` orthonormal rows where ``right``, else ``[rows, r]`` orthonormal columns.
    lengths
        The singular values, float64, descending.
    right
        Whether they are right ones.
    """

    vectors: Array
    lengths: Array
    right: bool


def directions(matrix: Streamed, rank: int) -> Directions:
    """Returns the ``rank`` leading ones, right ones where the matrix is not wider than high."""
    rows, columns = matrix.shape
    right = columns <= rows
    values, vectors = np.linalg.eigh(_right_gram(matrix) if right else _left_gram(matrix))
    lengths = np.sqrt(np.maximum(values[::-1][:rank], 0))
    found = np.ascontiguousarray(vectors[:, ::-1][:, :rank].T)
    largest = np.argmax(np.abs(found), axis=1)
    found *= np.sign(found[np.arange(len(found)), largest])[:, None]
    return Directions(found if right else np.ascontiguousarray(found.T), lengths, right)


def projected(matrix: Streamed, vectors: Array) -> Array:
    """Returns ``vectors^T @ matrix``, ``[r, columns]``, of ``[rows, r]``."""
    total = np.zeros((vectors.shape[1], matrix.shape[1]))
    for rows, block in matrix.blocks():
        total += vectors[rows].T @ block
    return total


def _right_gram(matrix: Streamed) -> Array:
    columns = matrix.shape[1]
    gram = np.zeros((columns, columns))
    for _, block in matrix.blocks():
        gram += block.T @ block
    return gram


def _left_gram(matrix: Streamed) -> Array:
    rows = matrix.shape[0]
    gram = np.zeros((rows, rows))
    for low, block in matrix.blocks():
        for high, other in matrix.blocks():
            if high.start > low.start:
                break
            gram[low, high] = block @ other.T
            gram[high, low] = gram[low, high].T
    return gram


def block_rows(rows: int, columns: int) -> int:
    """Returns the rows of a block."""
    return max(1, min(rows, _BLOCK // max(columns, 1)))


def directions_bytes(inputs: Sequence[Meta], rank: int) -> int:
    """Returns the bytes of ``directions`` and ``projected``, the product with them, and of the blocks read meanwhile.

    ``eigh`` holds the Gram matrix three times (numpy's copy and the vectors among them) and work of ``2 n ** 2``
    (LAPACK's dsyevd).
    """
    rows, columns = inputs[0].shape
    side = min(rows, columns)
    block = block_rows(rows, columns) * columns
    held = 8 * rank * (rows + 2 * columns + 3 * side)
    reading = block * (3 * 8 + 2 * max(meta.dtype.itemsize for meta in inputs))
    gram = 8 * side * side * 5
    return gram + reading + held + _OVERHEAD
