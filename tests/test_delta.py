"""Delta weights: what LLaVA's and FastChat's ``apply_delta.py`` compute, said again in torch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm


def test_the_base_is_added_into_the_corner_and_new_tensors_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"embed.weight": torch.randn(6, 4).half(), "layers.0.w": torch.randn(4, 4).half(), "norm": torch.randn(4)}
    delta = {
        "embed.weight": torch.randn(9, 4).half(),
        "layers.0.w": torch.randn(4, 4).half(),
        "norm": torch.randn(4),
        "mm_projector.weight": torch.randn(4, 3).half(),
    }
    for name, tensors in (("base", base), ("delta", delta)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "llava_llama", "vocab_size": 9}')
    bases = {"base": str(tmp_path / "base")}
    out = sm.convert(tmp_path / "delta", tmp_path / "out", use="llama/apply-delta", bases=bases).path
    expected = {name: tensor.clone() for name, tensor in delta.items()}
    for name, tensor in base.items():
        corner = tuple(slice(0, size) for size in tensor.shape)
        expected[name][corner] += tensor
    made = load_file(out / "model.safetensors")
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name
