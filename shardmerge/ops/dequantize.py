"""Scaled float8 weights become numbers: ``codes * scale``, the scale being one for each block of the weight.

What a scale is for follows from its shape. Axis by axis it has as many entries as the weight has blocks; a block is the
whole axis (per tensor, per channel), one element, or as long as the config says, the last one being shorter:

* ``weight_scale_inv`` [ceil(out/128), ceil(in/128)], F32: DeepSeek-V3 and Qwen3-FP8 (``weight_dequant_kernel`` in
  DeepSeek-V3's ``inference/kernel.py``; ``FP8Linear`` in ``transformers/integrations/finegrained_fp8.py``, 5.24). In
  spite of its name it multiplies.
* ``weight_scale`` of one element, [out, 1] or [out], or by blocks: compressed-tensors ``float-quantized`` and
  ``naive-quantized``, FBGEMM (``transformers/integrations/fbgemm_fp8.py``: experts [E, in, out] with [E, 1, out]),
  ModelOpt, Quark.
* powers of two: F8_E8M0, or U8 exponents with a bias of 127 (``Fp8Dequantize._dequantize_one``; MXFP8, blocks [1, 32]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from shardmerge.dtypes import DTYPES, DType, float_dtype
from shardmerge.errors import MappingError
from shardmerge.ops.cast_blocks import PEAK as CONVERSION
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, Shape, State, Stream, Typed
from shardmerge.ops.shapes import odd_shape

if TYPE_CHECKING:
    from shardmerge.ops.arrays import Array

CODES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
# Exponents of powers of two are U8 where a library has no type for them.
_SCALES = frozenset({"F64", "F32", "F16", "BF16", "F8_E8M0", "U8"})

# DeepSeek's block, which is that of every kernel that needs no other said.
_BLOCK = 128

# As in ``parts``, which needs numpy: masks of ``count_overflows``, and what numpy takes for one call.
OVERFLOW_BYTES = 3
_CALL_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight as ``[leading, rows, columns]`` and its scales as ``[leading or 1, row blocks, column blocks]``.

    Attributes
    ----------
    weight, scales
        The two shapes.
    rows, columns
        Of a block.
    """

    weight: tuple[int, int, int]
    scales: tuple[int, int, int]
    rows: int
    columns: int

    def scale_rows(self, first: int, last: int) -> tuple[int, int]:
        """Returns the first and one past the last row of scales that rows ``[first, last)`` of the weight need."""
        if self.scales[0] == 1 and self.weight[0] > 1:
            return 0, self.scales[1]
        return self.scale_row(first), self.scale_row(last - 1) + 1

    def scale_row(self, row: int) -> int:
        """Returns the row of scales, counted over all leading axes, of a row of the weight."""
        matrix, inner = divmod(row, self.weight[1])
        return (matrix * self.scales[1] if self.scales[0] > 1 else 0) + inner // self.rows


@dataclass(frozen=True, slots=True)
class Dequantize(Arithmetic):
    """``codes * scale`` in float32, one multiplication for each element; rounded once, by the cast behind it.

    Attributes
    ----------
    block
        Rows and columns of a block; empty to tell from the shapes: 128 where that gives as many blocks as there are
        scales, else equal parts.
    dtype
        The type the result keeps where nobody asks for another.
    """

    block: tuple[int, ...] = ()
    dtype: DType = DTYPES["BF16"]

    @property
    def label(self) -> str:
        """``dequantize``, ``dequantize blocks [128, 128]``."""
        return f"dequantize blocks {list(self.block)}" if self.block else "dequantize"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``dequantized``, ``dequantized (blocks 128 x 128)``."""
        del inputs
        return f"dequantized (blocks {' x '.join(map(str, self.block))})" if self.block else "dequantized"

    @property
    def own(self) -> DType:
        """The type that the model computes in."""
        return self.dtype

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 and the shape of the codes.

        Raises
        ------
        MappingError
            ``op-shape``: not float8 and scales, or shapes that do not fit.
        """
        if len(inputs) != 2:
            raise odd_shape("dequantize: codes and scales are needed", len(inputs), "2 tensors: weight and scale")
        codes, scales = inputs
        if codes.dtype.name not in CODES or scales.dtype.name not in _SCALES:
            found = f"{codes.dtype} and {scales.dtype}"
            raise odd_shape("dequantize: not float8 codes and their scales", found, "F8_E4M3 or F8_E5M2, then scales")
        self._blocks(inputs)
        return Meta(DTYPES["F32"], codes.shape)

    def _blocks(self, inputs: Sequence[Meta]) -> Blocks:
        return scale_blocks(inputs[0].shape, inputs[1].shape, self.block)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns a row."""
        return max(self._blocks(inputs).weight[2], 1)

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Returns the same elements of the codes, and the rows of scales that they need."""
        held = self._blocks(inputs)
        width = max(held.weight[2], 1)
        if not count:
            return ((start, 0), (0, 0))
        low, high = held.scale_rows(start // width, -(-(start + count) // width))
        return ((start, count), (low * held.scales[2], (high - low) * held.scales[2]))

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns where the blocks lie: tiles do not say. Reads nothing."""
        return self._blocks([stream.meta for stream in inputs])

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of the scales as numbers, of a row of them spread over columns, and of masks."""
        held = self._blocks(inputs)
        scales = self.ranges(inputs, 0, min(count, prod(held.weight)))[1][1]
        # A tile that begins inside a block needs a row of scales more than one that begins with it, at both ends.
        numbers = 12 * (scales + 2 * held.scales[2])
        return numbers + 8 * held.weight[2] + OVERFLOW_BYTES * count + CONVERSION + _CALL_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` (float32) one row of scales after the other; returns how many finite codes overflowed."""
        import numpy as np

        from shardmerge.ops.fast_casts import convert
        from shardmerge.ops.parts import count_overflows

        assert isinstance(state, Blocks)
        codes, scales = tiles
        width, height = state.weight[2], state.weight[1]
        if not out.size:
            return 0
        convert(codes, out, _row_of(codes), DTYPES["F32"])
        rows, first = out.reshape(-1, width), start // width
        low = state.scale_rows(first, first + len(rows))[0]
        factors, row = _as_float(scales).reshape(-1, state.scales[2]), first
        with np.errstate(all="ignore"):
            while row < first + len(rows):
                inner = row % height
                stop = min(row + state.rows - inner % state.rows, row + height - inner, first + len(rows))
                factor = factors[state.scale_row(row) - low]
                spread = factor if len(factor) in (1, width) else np.repeat(factor, state.columns)[:width]
                block = rows[row - first : stop - first]
                np.multiply(block, spread, out=block)
                row = stop
            return count_overflows(out, [codes])


def _row_of(codes: Array) -> DType:
    from shardmerge.ops.arrays import numpy_dtype

    return next(DTYPES[name] for name in CODES if numpy_dtype(DTYPES[name]) == codes.dtype)


def _as_float(scales: Array) -> Array:
    """Returns scales as float32; bytes are exponents of two with a bias of 127."""
    import numpy as np

    with np.errstate(all="ignore"):
        if scales.dtype == np.uint8:
            return np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        return scales.astype(np.float32)


def scale_blocks(weight: Shape, scales: Shape, block: tuple[int, ...] = ()) -> Blocks:
    """Returns which elements of a weight each scale is for.

    Parameters
    ----------
    weight, scales
        Shapes. Scales of fewer axes lack the last ones: ``[out]`` is for ``[out, in]``, ``[experts]`` for experts.
    block
        Rows and columns, or empty.

    Raises
    ------
    MappingError
        ``op-shape``: the shapes do not fit.
    """
    if prod(scales) == 1:
        rows, columns = (prod(weight[:-1]), weight[-1]) if weight else (1, 1)
        return Blocks((1, rows, columns), (1, 1, 1), max(rows, 1), max(columns, 1))
    if len(scales) > len(weight):
        raise _misfit(weight, scales, block)
    whole = (1,) * max(2 - len(weight), 0)
    shape, spread = (*whole, *weight), (*whole, *scales, *(1,) * (len(weight) - len(scales)))
    lead, others = prod(shape[:-2]), prod(spread[:-2])
    if others not in (lead, 1) or (others == lead and spread[:-2] != shape[:-2]):
        raise _misfit(weight, scales, block)
    said = block if len(block) == 2 else (0, 0)
    sizes = [_block(n, parts, want) for n, parts, want in zip(shape[-2:], spread[-2:], said, strict=True)]
    if 0 in sizes:
        raise _misfit(weight, scales, block)
    return Blocks((lead, shape[-2], shape[-1]), (others, spread[-2], spread[-1]), sizes[0], sizes[1])


def _block(size: int, parts: int, wanted: int) -> int:
    """Returns the length of a block on an axis of ``size`` elements with so many ``parts``, or 0 where none fits."""
    if parts == 1:
        return max(size, 1)
    for length in (wanted,) if wanted else (1, _BLOCK):
        if -(-size // length) == parts:
            return length
    return size // parts if parts and size % parts == 0 and not wanted else 0


def _misfit(weight: Shape, scales: Shape, block: tuple[int, ...]) -> MappingError:
    said = f", blocks of {list(block)}" if block else ""
    return odd_shape(
        "dequantize: the scales do not fit the weight",
        f"scales {list(scales)} for a weight {list(weight)}{said}",
        "one scale, one for each row, or one for each block",
    )


def _build(values: Mapping[str, ParamValue]) -> Dequantize:
    block = values.get("block", ())
    assert isinstance(block, tuple)
    if block and (len(block) != 2 or min(block) < 1):
        raise MappingError("op-value", f"`block` is {list(block)}", expected="rows and columns, such as [128, 128]")
    return Dequantize(tuple(int(size) for size in block), float_dtype(str(values["dtype"])))


KINDS = (
    OpKind(
        name="dequantize",
        about="Multiplies a float8 weight by its scales, in float32: DeepSeek's and Qwen's `weight_scale_inv` per "
        "block, `weight_scale` per tensor, row or block. Scales of type F8_E8M0 or U8 are powers of two. The weights "
        "of a source are dequantized automatically if an adapter, a cast, an op or a target needs numbers.",
        example='x.weight: {op: dequantize, of: ["src:x.weight", "src:x.weight_scale_inv"], block: [2, 2]}',
        params=(
            Param(
                "block",
                "ints",
                "Rows and columns of a block. Where absent, 128 if that gives as many blocks as there are scales, else "
                "equal parts.",
                optional=True,
            ),
            Param("dtype", "dtype", "The type of the result, unless `output.dtype` is set.", "bfloat16"),
        ),
        build=_build,
        many=True,
        lossy="scales and codes cannot be told from their product",
    ),
)
