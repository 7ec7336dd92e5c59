"""What a reader refuses although nothing else would notice: each test here is the only one of its guard.

Files are made by the real writer and then damaged, or contradict each other.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge as sm
from shardmerge.errors import CheckpointError
from shardmerge.sources.safetensors_file import read_header
from tests.test_rank_sets import write_megatron


def refused(path: Path, **options: Any) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(path, **options)
    return caught.value.each()[0]


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of many zeros, of which the disk holds none."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


# --- safetensors ---


@pytest.mark.parametrize(
    ("size", "start", "what"),
    [
        (7, b"", "shorter than the 8 bytes"),
        ((100 << 20) + 64, struct.pack("<Q", (100 << 20) + 1), "header length is impossible"),
    ],
)
def test_a_header_length_is_looked_at_before_it_is_read(size: int, start: bytes, what: str, tmp_path: Path) -> None:
    """As of a shard that an index names."""
    path = sparse(tmp_path / "model.safetensors", size, start)
    with pytest.raises(CheckpointError, match=what):
        read_header(path)


# --- files of ranks ---


def rank_file(folder: Path, state: object, rank: int = 0, world: int = 1) -> None:
    torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")


def test_a_rank_without_a_tensor(tmp_path: Path) -> None:
    rank_file(tmp_path, {"step": 3})
    assert refused(tmp_path).code == "no-tensors"


def test_one_name_twice_in_a_ranks_file(tmp_path: Path) -> None:
    rank_file(tmp_path, {"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2), "c": torch.ones(2)})
    assert refused(tmp_path).code == "duplicate-name"


def test_a_sparse_tensor_in_a_ranks_file_is_not_left_out(tmp_path: Path) -> None:
    rank_file(tmp_path, {"a": torch.ones(2), "b": torch.eye(2).to_sparse()})
    error = refused(tmp_path)
    assert error.code == "unsupported-tensor"
    assert error.where.endswith(", b")


def test_a_list_of_items_larger_than_any(tmp_path: Path) -> None:
    """torch_checkpointing's metadata.pkl beside the files of two ranks."""
    for rank in range(2):
        torch.save({"a": torch.ones(2)}, tmp_path / f"model_{rank}.pt")
    sparse(tmp_path / "metadata.pkl", 1 << 32)
    assert refused(tmp_path).code == "hostile-pickle"


# --- Megatron ---


def test_iterations_without_a_tracker(tmp_path: Path) -> None:
    for step in (3, 7):
        write_megatron(tmp_path / f"iter_{step:07d}", 1, 1)
    error = refused(tmp_path)
    assert error.code == "several-tags"
    assert "iter_0000003" in f"{error.hint}{error.found}"
