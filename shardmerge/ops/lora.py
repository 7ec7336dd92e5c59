"""Low-rank adapters: LoRA and DoRA merged into a weight, a block of rows at a time.

Formulas as in peft 0.21 (``tuners/lora/layer.py``, ``dora.py``). An adapter of an embedding, or one trained with
``fan_in_fan_out``, is the same sum over transposed views, and a convolution's over reshaped ones: the planner makes those.

peft casts ``scale * B @ A`` to the adapter's type before it adds, so on a 16-bit base it rounds twice; here the sum is
float32 and rounded once by the cast behind it. On a float32 base both are the same up to the order of one matrix
product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES, multiply
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, State, Stream, Value, result_dtype

# Rows multiplied at a time. Part of the result, since BLAS adds up in another order for another number of rows.
# Measured with OpenBLAS on two cores, r = 512: 43, 69, 96 and 108 GFLOP/s with 8, 32, 64 and 128 rows; 32 rows of a
# 14,336 wide layer are 1.8 MB and still fit a tile.
BLOCK_ROWS = 32


@dataclass(frozen=True, slots=True)
class Lora(Arithmetic):
    """``base + scale * B @ A``. Inputs: A ``[r, in]``, B ``[out, r]``, base ``[out, in]``.

    Attributes
    ----------
    scale
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    scale: float

    @property
    def label(self) -> str:
        """``lora x 0.5``."""
        return f"lora x {self.scale:g}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, base = inputs[0], inputs[1], inputs[-1]
        _check(self.label, a, b, base)
        return Meta(result_dtype(inputs), base.shape)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return BLOCK_ROWS * inputs[-1].shape[1]

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of B and of the base; A is in the state."""
        width, rank = inputs[-1].shape[1], inputs[0].shape[0]
        first, rows = start // width, count // width
        return ((0, 0), (first * rank, rows * rank), (start, count))

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """A as stored, and in the type of the sum."""
        rank, width = inputs[0].shape
        return rank * width * (inputs[0].dtype.itemsize + result_dtype(inputs).itemsize)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A."""
        meta = inputs[0].meta
        dtype = result_dtype([stream.meta for stream in inputs]).numpy
        return inputs[0].read(0, meta.shape[0] * meta.shape[1]).astype(dtype, copy=False).reshape(meta.shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """B's rows, one product block with the base in its type, and what the BLAS library keeps."""
        width, rank = inputs[-1].shape[1], inputs[0].shape[0]
        size = result_dtype(inputs).itemsize
        return (count // width + 1) * rank * size + 2 * BLOCK_ROWS * width * size + PRODUCT_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        a = _matrix(state)
        width = a.shape[1]
        b = tiles[1].astype(a.dtype, copy=False).reshape(-1, a.shape[0])
        sums, base = out.reshape(-1, width), tiles[-1].reshape(-1, width)
        for first in range(0, len(sums), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            product = multiply(b[rows], a)
            product *= a.dtype.type(self.scale)
            np.add(product, base[rows].astype(a.dtype, copy=False), out=sums[rows])
        return 0


@dataclass(frozen=True, slots=True)
class Dora(Arithmetic):
    """``magnitude * W / ||W||`` by rows, where ``W = base + scale * B @ A``.

    Inputs: A ``[r, in]``, B ``[out, r]``, magnitude ``[out]``, base ``[out, in]``. The norm is taken in the type of the
    sum, as peft does.
    """

    scale: float

    @property
    def label(self) -> str:
        """``dora x 0.5``."""
        return f"dora x {self.scale:g}"

    @property
    def _lora(self) -> Lora:
        return Lora(self.scale)

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, magnitude, base = inputs
        _check(self.label, a, b, base)
        if magnitude.shape != base.shape[:1]:
            what = f"{self.label}: the magnitude is not one number a row"
            raise MappingError("op-shape", what, found=str(list(magnitude.shape)), expected=str([base.shape[0]]))
        return Meta(result_dtype(inputs), base.shape)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return self._lora.unit(inputs)

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of B, the magnitude and the base; A is in the state."""
        width = inputs[-1].shape[1]
        a, b, base = self._lora.ranges(inputs, start, count)
        return (a, b, (start // width, count // width), base)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """That of A."""
        return self._lora.state_peak(inputs)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A."""
        return self._lora.prepare(inputs)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """B's rows, a product block, the squares of a block, and the factors."""
        width = inputs[-1].shape[1]
        size = result_dtype(inputs).itemsize
        return self._lora.peak(inputs, count) + 2 * BLOCK_ROWS * width * size + 3 * (count // width + 1) * size

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        a = _matrix(state)
        self._lora.apply(state, (tiles[0], tiles[1], tiles[3]), start, out)
        rows = out.reshape(-1, a.shape[1])
        magnitude = tiles[2].astype(a.dtype, copy=False)
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows[first : first + BLOCK_ROWS]
            norm = np.sqrt((block * block).sum(axis=1))
            block *= (magnitude[first : first + BLOCK_ROWS] / norm)[:, None]
        return 0


def _check(label: str, a: Meta, b: Meta, base: Meta) -> None:
    odd = [meta.dtype.name for meta in (a, b, base) if meta.dtype.kind != "float"]
    if odd:
        raise MappingError("op-shape", f"{label}: {odd[0]} is no float type", hint=_PACKED)
    fits = len(a.shape) == len(b.shape) == len(base.shape) == 2
    if not fits or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != base.shape:
        raise MappingError(
            "op-shape",
            f"{label}: A, B and the base do not fit",
            found=f"A {list(a.shape)}, B {list(b.shape)}, base {list(base.shape)}",
            expected="A [r, in], B [out, r], base [out, in]",
            hint="is this the base that the adapter was trained on?",
        )


_PACKED = "packed weights cannot be added to: name the 16-bit model that was quantized"


def _matrix(state: State) -> Array:
    assert isinstance(state, np.ndarray)
    return state


def _scale(values: Mapping[str, Value]) -> float:
    value = values["scale"]
    assert isinstance(value, (int, float))
    return float(value)


_SCALE = Param("scale", "number", "`alpha / r`, or `alpha / sqrt(r)` for rsLoRA.", 1.0)

KINDS = (
    OpKind(
        name="lora",
        about="Adds `scale * B @ A` to a weight, in float32, rounded once. For whole adapters use `adapters:`, which "
        "finds the pairs, the scale and the special cases by itself.",
        example='q_proj.weight: {op: lora, a: "adapter:q.lora_A", b: "adapter:q.lora_B", of: "src:q.weight", scale: 0.5}',
        params=(_SCALE,),
        build=lambda values: Lora(_scale(values)),
        terms=("a", "b"),
        lossy="the base cannot be told from the sum",
    ),
    OpKind(
        name="dora",
        about="Adds `scale * B @ A` to a weight and gives every row the length `magnitude`, in float32, rounded once.",
        example='q_proj.weight: {op: dora, a: "adapter:q.lora_A", b: "adapter:q.lora_B", '
        'magnitude: "adapter:q.magnitude", of: "src:q.weight", scale: 0.5}',
        params=(_SCALE,),
        build=lambda values: Dora(_scale(values)),
        terms=("a", "b", "magnitude"),
        lossy="the base cannot be told from the result",
    ),
)
