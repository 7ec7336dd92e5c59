"""Low-rank adapters: LoRA and DoRA merged into a weight, a block of rows at a time.

Formulas as in peft 0.21 (``tuners/lora/layer.py``, ``dora.py``). An adapter of an embedding, or one trained with
``fan_in_fan_out``, is the same sum over transposed views, a convolution's over reshaped ones: the planner makes those.

The product is summed in float64, and ``base + scale * B @ A`` rounded to float32 once. Measured with OpenBLAS 0.3.31:
the bits of a float32 product change with the number of BLAS threads, with the processor and with the height of the
block; those of a float64 product rounded to float32 were the same for 1 and 2 threads, Haswell and Nehalem kernels,
blocks of 16 to 64 rows, at every rank from 8 to 512. Products of 16-bit numbers are exact in float64, and so are
nearly all their sums. It costs half the speed: on one core 170, 90 and 20 million elements a second at ranks 64, 128
and 512.

peft casts ``scale * B @ A`` to the adapter's type before it adds, so on a 16-bit base it rounds twice; here the cast
behind the op rounds a float32 sum. On a float32 base both are the same up to the rounding of peft's own product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES, multiply
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, State, Stream, result_dtype

# One product is [BLOCK_ROWS, r] @ [r, BLOCK_COLUMNS]: part of the result, so it depends on no budget. 32 rows of a
# 14,336 wide layer are 1.8 MB and still fit a tile; a panel of A at r = 512 is 2 MB in float64, a second-level cache.
BLOCK_ROWS = 32
BLOCK_COLUMNS = 512

# What numpy takes for a call on a part of rows: one buffer of 8,192 elements; and views, scalars.
_OVERHEAD = 8192 * 8 + 8192


@dataclass(frozen=True, slots=True)
class Lora(Arithmetic):
    """``base + scale * B @ A``. Inputs: A ``[r, in]``, B ``[out, r]``, base ``[out, in]``.

    Attributes
    ----------
    scale
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    like: ClassVar[int] = -1

    scale: float

    @property
    def label(self) -> str:
        """``lora x 0.5``."""
        return f"lora x {self.scale:g}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, base = inputs
        _check(self.label, a, b, base)
        return Meta(result_dtype(inputs), base.shape)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return max(1, BLOCK_ROWS * inputs[-1].shape[1])

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of B and of the base; A is in the state."""
        width, rank = inputs[-1].shape[1], inputs[0].shape[0]
        return ((0, 0), (_rows(start, width) * rank, _rows(count, width) * rank), (start, count))

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """A as stored."""
        rank, width = inputs[0].shape
        return rank * width * inputs[0].dtype.itemsize + _OVERHEAD

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A."""
        rank, width = inputs[0].meta.shape
        return inputs[0].read(0, rank * width).reshape(rank, width)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """In float64: B's rows, a panel of A, one product block with the base there; masks; and the BLAS's own."""
        rank, width = inputs[0].shape
        rows, columns = _rows(count, width), min(width, BLOCK_COLUMNS)
        return 8 * rank * (rows + columns) + min(rows, BLOCK_ROWS) * columns * (8 + 8 + 3) + _OVERHEAD + PRODUCT_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        a = _matrix(state)
        base, result = _as_rows(tiles[-1], a.shape[1]), _as_rows(out, a.shape[1])
        overflows = 0
        with np.errstate(all="ignore"):
            for rows, columns, product, total in self.blocks(a, tiles[1], base):
                np.add(total, product, out=total)
                overflows += _narrow(total, result[rows, columns], product, base[rows, columns])
        return overflows

    def blocks(self, a: Array, b: Array, base: Array) -> Iterator[tuple[slice, slice, Array, Array]]:
        """Yields rows, columns, ``scale * B @ A`` and the base there, in float64, in buffers used again for the next.

        Panel by panel of A, so that each is widened once for all blocks below each other.
        """
        b = b.astype(np.float64).reshape(len(base), len(a))
        products, bases = np.empty((2, min(len(base), BLOCK_ROWS) * min(base.shape[1], BLOCK_COLUMNS)))
        for left in range(0, base.shape[1], BLOCK_COLUMNS):
            columns = slice(left, left + BLOCK_COLUMNS)
            panel = a[:, columns].astype(np.float64)
            for top in range(0, len(base), BLOCK_ROWS):
                rows = slice(top, top + BLOCK_ROWS)
                part = base[rows, columns]
                product, total = (buffer[: part.size].reshape(part.shape) for buffer in (products, bases))
                multiply(b[rows], panel, product)
                product *= self.scale
                np.copyto(total, part)
                yield rows, columns, product, total
            del panel


@dataclass(frozen=True, slots=True)
class Dora(Arithmetic):
    """``magnitude * W / ||W||`` by rows, where ``W = base + scale * B @ A``.

    Inputs: A ``[r, in]``, B ``[out, r]``, magnitude ``[out]``, base ``[out, in]``. The norm is that of ``W`` itself, as
    in peft, with no epsilon: a row of zeros has no direction and becomes NaN, which is counted as overflow.
    """

    like: ClassVar[int] = -1

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
        _check(self.label, a, b, base, magnitude)
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
        return (a, b, (_rows(start, width), _rows(count, width)), base)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """That of A."""
        return self._lora.state_peak(inputs)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A."""
        return self._lora.prepare(inputs)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """That of LoRA, and four numbers a row."""
        return self._lora.peak(inputs, count) + 4 * 8 * _rows(count, inputs[-1].shape[1])

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows: first with ``W``, then each row times its factor."""
        a = _matrix(state)
        base, result = _as_rows(tiles[-1], a.shape[1]), _as_rows(out, a.shape[1])
        with np.errstate(all="ignore"):
            norms = self.fill(a, tiles[1], base, result)
            return _scale_rows(tiles[2].astype(np.float64) / norms, result, base)

    def fill(self, a: Array, b: Array, base: Array, result: Array) -> Array:
        """Fills ``result`` with ``W``; returns the norm of each row, summed in float64 before the rounding."""
        squares = np.zeros(len(base))
        for rows, columns, product, total in self._lora.blocks(a, b, base):
            np.add(total, product, out=total)
            np.copyto(result[rows, columns], total, casting="unsafe")
            squares[rows] += np.square(total, out=total).sum(axis=1)
        return np.sqrt(squares, out=squares)


@dataclass(frozen=True, slots=True)
class DoraOnto(Arithmetic):
    """DoRA onto a weight that other adapters have changed: ``magnitude * (base + D) / ||untouched + D||`` by rows.

    ``D`` is ``scale * B @ A``. The norm is that of the weight that the adapter was trained on, as in peft 0.21
    (``DoraLinearVariant.merge_unsafe``; huggingface/peft#3608), where all adapters are active on one model.

    Inputs: A ``[r, in]``, B ``[out, r]``, magnitude ``[out]``, untouched ``[out, in]``, base ``[out, in]``.
    """

    like: ClassVar[int] = -1

    scale: float

    @property
    def label(self) -> str:
        """``dora x 0.5 onto changed rows``."""
        return f"dora x {self.scale:g} onto changed rows"

    @property
    def _dora(self) -> Dora:
        return Dora(self.scale)

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, magnitude, untouched, base = inputs
        self._dora.infer((a, b, magnitude, untouched))
        self._dora.infer((a, b, magnitude, base))
        return Meta(result_dtype(inputs), base.shape)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """A block of whole rows."""
        return self._dora.unit(inputs)

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows of all but A."""
        *others, base = self._dora.ranges(inputs, start, count)
        return (*others, base, base)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """That of A."""
        return self._dora.state_peak(inputs)

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns A."""
        return self._dora.prepare(inputs)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """That of DoRA: the norms come first, and their buffers are gone before the sum is made."""
        return self._dora.peak(inputs, count)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows: the norms over the untouched weight, then the sum, then each row times its factor."""
        a = _matrix(state)
        untouched, base, result = (_as_rows(one, a.shape[1]) for one in (*tiles[-2:], out))
        with np.errstate(all="ignore"):
            norms = self._dora.fill(a, tiles[1], untouched, result)
            self._dora.fill(a, tiles[1], base, result)
            return _scale_rows(tiles[2].astype(np.float64) / norms, result, base)


def _scale_rows(factors: Array, result: Array, base: Array) -> int:
    """Multiplies each row of ``result`` by its factor; returns how many are not finite where ``base`` is."""
    overflows = 0
    for left in range(0, result.shape[1], BLOCK_COLUMNS):
        columns = slice(left, left + BLOCK_COLUMNS)
        for top in range(0, len(result), BLOCK_ROWS):
            rows = slice(top, top + BLOCK_ROWS)
            wide = result[rows, columns].astype(np.float64)
            wide *= factors[rows, None]
            overflows += _narrow(wide, result[rows, columns], base[rows, columns])
            del wide
    return overflows


def _narrow(wide: Array, out: Array, *inputs: Array) -> int:
    """Rounds float64 into ``out``; returns how many results of finite inputs are not finite. Three masks at most."""
    np.copyto(out, wide, casting="unsafe")
    lost = np.isfinite(out)
    if lost.all():
        return 0
    np.logical_not(lost, out=lost)
    for values in inputs:
        lost &= np.isfinite(values)
    return int(np.count_nonzero(lost))


def _rows(elements: int, width: int) -> int:
    return elements // width if width else 0


def _as_rows(flat: Array, width: int) -> Array:
    return flat.reshape(-1, width) if width else flat.reshape(0, 0)


def _check(label: str, a: Meta, b: Meta, base: Meta, *others: Meta) -> None:
    odd = [meta.dtype.name for meta in (a, b, base, *others) if meta.dtype.kind != "float"]
    if odd:
        raise MappingError("op-shape", f"{label}: {odd[0]} is no float type", hint=_PACKED)
    fits = len(a.shape) == len(b.shape) == len(base.shape) == 2
    if not fits or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != base.shape:
        raise MappingError(
            "op-shape",
            f"{label}: A, B and the base do not fit",
            found=f"A {list(a.shape)}, B {list(b.shape)}, base {list(base.shape)}",
            expected="A [r, in], B [out, r], base [out, in]",
            hint="name the base that the adapter was trained on",
        )


_PACKED = "packed weights cannot be added to: name the 16-bit model that was quantized"


def _matrix(state: State) -> Array:
    assert isinstance(state, np.ndarray)
    return state


def _scale(values: Mapping[str, ParamValue]) -> float:
    value = values["scale"]
    assert isinstance(value, (int, float))
    return float(value)


_SCALE = Param("scale", "number", "`alpha / r`, or `alpha / sqrt(r)` for rsLoRA.", 1.0)

KINDS = (
    OpKind(
        name="lora",
        about="Adds `scale * B @ A` to a weight, in float32, rounded once. For whole adapters use `adapters:`, which "
        "finds the pairs, the scale and the special cases by itself.",
        example='q.weight: {op: lora, a: "adapter:q.lora_A", b: "adapter:q.lora_B", of: "src:q.weight", scale: 0.5}',
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
