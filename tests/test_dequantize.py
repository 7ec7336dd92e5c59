"""The bits of ``op: dequantize`` are those of the reference code: transformers, and DeepSeek's kernel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import shardmerge as sm
from shardmerge.dtypes import BY_TORCH_NAME
from shardmerge.errors import MappingError
from shardmerge.ops.arrays import numpy_dtype
from shardmerge.ops.contract import Meta
from shardmerge.ops.dequantize import Dequantize, scale_blocks
from tests.op_harness import execute

Tensor = torch.Tensor
NOW = sm.Options(sync=False)


def array(tensor: Tensor):
    """The tensor's bytes as numpy knows them."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    row = BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
    return raw.view(numpy_dtype(row)).reshape(tuple(tensor.shape))


def codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Every pattern of the type, NaN but not infinity (E5M2 has some) included, in an order of chance."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    drawn = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)
    return torch.where(torch.isinf(drawn.float()), torch.ones(()), drawn.float()).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.rand(shape, generator=generator) * 0.01 + 1e-4
    if dtype == torch.uint8:
        return torch.randint(90, 140, shape, dtype=torch.uint8, generator=generator)
    return drawn.to(dtype)


def made(weight: Tensor, scale: Tensor, block: tuple[int, ...] = (), tile: int | None = None) -> Tensor:
    return torch.from_numpy(execute(Dequantize(block), [array(weight), array(scale)], tile).array)


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, but that any NaN is NaN."""
    return left.dtype == right.dtype and torch.equal(left.nan_to_num(7e7), right.nan_to_num(7e7))


# What transformers does on these shapes is what is wanted: they divide evenly.
EVEN = {
    "blocks of 128": (codes(256, 384), scales(2, 3)),
    "blocks of 32": (codes(64, 96), scales(2, 3)),
    "one row of blocks": (codes(128, 512), scales(1, 4)),
    "per tensor": (codes(48, 80), scales(1)),
    "per tensor, a scalar": (codes(48, 80), scales().reshape(())),
    "per channel": (codes(48, 80), scales(48, 1)),
    "groups of 32": (codes(6, 96), scales(6, 3)),
    "MXFP8, exponents in bytes": (codes(6, 96), scales(6, 3, dtype=torch.uint8)),
    "ue8m0": (codes(256, 256), torch.tensor([[100, 127], [130, 120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)),
    "bfloat16 scales": (codes(256, 256), scales(2, 2, dtype=torch.bfloat16)),
    "float16 scales": (codes(256, 256), scales(2, 2, dtype=torch.float16)),
    "E5M2": (codes(256, 256, dtype=torch.float8_e5m2), scales(2, 2)),
    "experts by blocks": (codes(3, 256, 128), scales(3, 2, 1)),
    "experts, [experts, in, out] with one scale for each output": (codes(3, 16, 24), scales(3, 1, 24)),
}


@pytest.mark.parametrize("wished", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", EVEN)
def test_the_bits_of_transformers(kind: str, wished: torch.dtype) -> None:
    weight, scale = EVEN[kind]
    reference = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scale, output_dtype=wished)
    assert same(made(weight, scale).to(wished), reference)
    assert same(made(weight, scale, tile=5000).to(wished), reference)


# Last blocks that are shorter: transformers refuses most of them. DeepSeek's kernel masks them (inference/kernel.py).
PARTIAL = {
    "both axes": ((300, 200), (3, 2), ()),
    "as many equal parts would be": ((300, 128), (3, 1), ()),
    "rows": ((130, 128), (2, 1), ()),
    "columns": ((64, 160), (1, 2), ()),
    "small blocks, said": ((50, 70), (2, 3), (32, 32)),
    "experts": ((2, 130, 60), (2, 2, 1), ()),
}


@pytest.mark.parametrize("tile", [None, 5000])
@pytest.mark.parametrize("kind", PARTIAL)
def test_last_blocks_that_are_shorter(kind: str, tile: int | None) -> None:
    shape, parts, block = PARTIAL[kind]
    weight, scale = codes(*shape), scales(*parts)
    rows, columns = block or (128, 128)
    spread = scale.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., : shape[-2], : shape[-1]]
    assert same(made(weight, scale, block, tile), weight.float() * spread)


def test_one_scale_for_each_expert_and_for_each_row() -> None:
    weight = codes(3, 5, 4)
    assert same(made(weight, scales(3)), weight.float() * scales(3)[:, None, None])
    assert same(made(weight, scales(3, 5)), weight.float() * scales(3, 5)[:, :, None])
    flat = codes(6, 4)
    assert same(made(flat, scales(6)), flat.float() * scales(6)[:, None])


def test_what_becomes_infinite_is_counted() -> None:
    weight, scale = torch.full((2, 4), 448.0).to(torch.float8_e4m3fn), torch.tensor([[3e38], [1.0]])
    outcome = execute(Dequantize(), [array(weight), array(scale)])
    assert outcome.overflows == 4
    assert np.isinf(outcome.array[0]).all()


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [
        ((64, 64), (3, 1), ()),  # 64 in 3 parts
        ((64, 64), (2, 2), (16, 16)),  # 4 parts by the block
        ((64, 64), (64, 64, 1), ()),
        ((3, 64, 64), (2, 1, 1), ()),
        ((64,), (5,), ()),
    ],
)
def test_scales_that_do_not_fit(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, ...]) -> None:
    with pytest.raises(MappingError, match="do not fit") as caught:
        scale_blocks(weight, scale, block)
    assert caught.value.code == "op-shape"


@pytest.mark.parametrize(
    "dtypes", [("BF16", "F32"), ("I8", "F32"), ("U8", "U8"), ("F8_E4M3", "I8"), ("F8_E8M0", "F32")]
)
def test_only_codes_and_scales(dtypes: tuple[str, str]) -> None:
    from shardmerge.dtypes import DTYPES

    with pytest.raises(MappingError, match="not float8 codes and their scales"):
        Dequantize().infer([Meta(DTYPES[dtypes[0]], (4, 4)), Meta(DTYPES[dtypes[1]], (1,))])


def test_an_empty_tensor() -> None:
    for shape in [(0, 128), (128, 0)]:
        assert made(torch.zeros(shape, dtype=torch.float8_e4m3fn), scales(1)).shape == shape


# ---- in a mapping


def test_a_mapping_may_say_it_itself(tmp_path: Path) -> None:
    weight, scale = codes(300, 64), scales(3, 1)
    save_file({"x.weight": weight, "x.weight_scale_inv": scale, "n": torch.ones(2)}, tmp_path / "src.safetensors")
    text = "shardmerge: 1\nsources: {src: src.safetensors}\noutput: {path: out}\ntensors:\n"
    text += '  x.weight: {op: dequantize, of: ["src:x.weight", "src:x.weight_scale_inv"], dtype: float16}\n  n: src:n\n'
    (tmp_path / "mapping.yaml").write_text(text)
    sm.run(tmp_path / "mapping.yaml", options=NOW)
    found = load_file(tmp_path / "out/model.safetensors")
    assert same(found["x.weight"], (weight.float() * scale.repeat_interleave(128, 0)[:300]).half())
    assert found["n"].dtype == torch.float32


def test_every_expert_by_one_rule_and_another_op_over_it(tmp_path: Path) -> None:
    state = {f"e.{i}.weight": codes(8, 128) for i in range(3)} | {
        f"e.{i}.weight_scale_inv": scales(1, 1) for i in range(3)
    }
    save_file(state, tmp_path / "src.safetensors")
    text = "shardmerge: 1\nsources: {src: src.safetensors}\noutput: {path: out, dtype: float32}\ntensors:\n"
    numbers = '{op: dequantize, of: ["src:e.{i}.weight", "src:e.{i}.weight_scale_inv"]}'
    text += f'  "half.{{i}}.weight": {{op: slice, stop: 4, of: {numbers}}}\n'
    (tmp_path / "mapping.yaml").write_text(text)
    sm.run(tmp_path / "mapping.yaml", options=NOW)
    found = load_file(tmp_path / "out/model.safetensors")
    for i in range(3):
        assert same(found[f"half.{i}.weight"], (state[f"e.{i}.weight"].float() * scales(1, 1))[:4])
