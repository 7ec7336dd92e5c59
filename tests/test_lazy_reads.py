"""What a slice of a tensor that is not in memory reads: counted in bytes."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import shardmerge
from shardmerge.lazy import LazyTensor
from tests.conftest import GOLDEN

ROWS, COLUMNS = 300, 200
WHOLE = ROWS * COLUMNS * 4


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """TIES of two models over a base: what is trimmed depends on all values, so an op reads ahead of its tiles."""
    random = np.random.default_rng(0)
    for name in ("base", "one", "two"):
        save_file({"w": random.standard_normal((ROWS, COLUMNS)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\n"
        "sources: {base: base.safetensors, one: one.safetensors, two: two.safetensors}\n"
        'tensors:\n  w: {op: ties, base: "base:w", of: ["one:w", "two:w"], density: 0.5}\n'
    )
    return tmp_path / "mapping.yaml"


def _read(tensor: LazyTensor) -> int:
    return tensor._reader._pool.bytes_read


@pytest.mark.parametrize(
    "index", [(slice(0, 32), 7), (slice(None), 0), (slice(0, 50, 7), slice(3, 9)), slice(5, 6), (3, 4)], ids=str
)
def test_a_slice_of_a_merge_reads_no_more_than_the_tensor(merge: Path, index: object) -> None:
    whole = shardmerge.open_checkpoint(merge)["w"]
    expected, most = whole.numpy()[index], _read(whole)
    assert most <= 3 * 3 * WHOLE  # each model twice to look at it, once to merge it
    part = shardmerge.open_checkpoint(merge)["w"]
    assert np.array_equal(part[index], expected)
    assert _read(part) <= most


def test_a_column_of_a_plain_tensor_reads_its_elements(merge: Path) -> None:
    tensor = shardmerge.open_checkpoint(merge.with_name("one.safetensors"))["w"]
    tensor[:32, 7]
    assert _read(tensor) == 32 * 4


def _one_each(folder: Path) -> dict[str, Path]:
    """Checkpoints whose tensors are read through each of the things that help: ops, boxes, strides, and nothing."""
    rows = np.arange(60, dtype=np.float32).reshape(6, 10)
    torch.save({"w": torch.from_numpy(rows).T}, folder / "strided.pt")
    return {
        "ops": folder / "mapping.yaml",
        "strides": folder / "strided.pt",
        "boxes": GOLDEN / "dcp" / "fsdp2_columns_w2_fp32" / "ckpt",
        "ranks": GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt",
        "nothing": folder / "one.safetensors",
    }


def _descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("kind", ["ops", "strides", "boxes", "ranks", "nothing"])
def test_files_are_closed_with_the_last_of_what_reads_them(merge: Path, kind: str) -> None:
    """At once: a reference cycle would keep them open until the garbage collector comes."""
    path = _one_each(merge.parent)[kind]

    def use() -> None:
        for tensor in shardmerge.open_checkpoint(path).values():
            assert tensor.numpy(copy=True).shape == tensor[...].shape

    use()  # imports what it needs
    gc.collect()
    gc.disable()
    try:
        before = _descriptors()
        use()
        assert _descriptors() == before
    finally:
        gc.enable()
