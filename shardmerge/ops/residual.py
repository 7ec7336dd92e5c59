"""What is left of a weight after an adapter took its start out of it: PiSSA and OLoRA.

Formulas as in peft 0.21 (``LoraLayer.pissa_init``, ``olora_init``), which makes the residual anew whenever it loads
such an adapter. The products are those of peft's factors; the factors themselves, with their signs, are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES, one_thread
from shardmerge.ops.contract import Arithmetic, Meta, State, Stream, Typed, result_dtype
from shardmerge.ops.leading import Streamed, directions, directions_bytes, projected
from shardmerge.ops.parts import count_overflows

# Rows of a result that are made together: part of the bits.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Start:
    """What is taken off: ``left[rows] @ right``, with ``left`` that of the weight by ``right`` where it is None."""

    left: Array | None
    right: Array

    def taken(self, rows: slice, weight: Array) -> Array:
        """Returns what is taken off some rows."""
        left = weight @ self.right.T if self.left is None else self.left[rows]
        return left @ self.right


@dataclass(frozen=True, slots=True)
class Residual(Arithmetic):
    """The weight ``[out, in]`` without the start of an adapter of this rank.

    Attributes
    ----------
    init
        ``pissa``: the leading singular directions. ``olora``: ``scale`` times ``Q[:, :r] @ R[:r]`` of its QR.
    """

    init: str
    rank: int
    scale: float

    multiplies: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """``without pissa of rank 16``."""
        return f"without {self.init} of rank {self.rank}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``start of the adapter taken off (pissa r 16)``."""
        del inputs
        return f"start of the adapter taken off ({self.init} r {self.rank})"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the shape as it is."""
        (one,) = inputs
        if len(one.shape) != 2 or one.dtype.kind != "float" or not 0 < self.rank <= min(one.shape):
            raise MappingError(
                "op-shape",
                f"{self.label}: this initialisation does not exist for a tensor of {list(one.shape)}, {one.dtype.name}",
                expected=f"a float matrix of at least {self.rank} rows and columns",
            )
        return Meta(result_dtype(inputs), one.shape)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return _ROWS * inputs[0].shape[1]

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """The directions, and the search for them."""
        return directions_bytes(inputs, self.rank) + PRODUCT_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what is taken off."""
        matrix = Streamed((inputs[0],))
        with one_thread():
            if self.init == "pissa":
                found = directions(matrix, self.rank)
                if found.right:
                    return _Start(None, found.vectors)
                return _Start(found.vectors, projected(matrix, found.vectors))
            first = np.concatenate([block[:, : self.rank] for _, block in matrix.blocks()])
            left = np.linalg.qr(first)[0]
            return _Start(left * self.scale, projected(matrix, left))

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """A block in float64, twice, and masks of the whole."""
        return _ROWS * (3 * inputs[0].shape[1] + self.rank) * 8 + 8 * 8192 * 4 + PRODUCT_BYTES + 8 * count

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        assert isinstance(state, _Start)
        width = state.right.shape[1]
        weight, result = tiles[0].reshape(-1, width), out.reshape(-1, width)
        top = start // width
        with np.errstate(all="ignore"), one_thread():
            for low in range(0, len(weight), _ROWS):
                wide = weight[low : low + _ROWS].astype(np.float64)
                wide -= state.taken(slice(top + low, top + low + len(wide)), wide)
                np.copyto(result[low : low + _ROWS], wide, casting="unsafe")
        return count_overflows(out, tiles)
