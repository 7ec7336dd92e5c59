"""A file of weights that nobody could read is not written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.errors import TargetError
from shardmerge.plan import shards
from shardmerge.plan.shard import PlannedTensor
from shardmerge.tensors import TensorEntry

ODD = ["__metadata__", "", "a\0b", "a\nb", "\x1f"]


def _mapping(folder: Path, name: str, form: str = "safetensors") -> Path:
    save_file({"weight": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "mapping.yaml").write_text(
        f"shardmerge: 1\nsources: {{s: model.safetensors}}\noutput: {{path: out, format: {form}}}\n"
        f"tensors: {{{name}: s:weight}}\n"
    )
    return folder / "mapping.yaml"


def test_the_name_of_the_metadata_is_refused(tmp_path: Path) -> None:
    """The reference reader takes it for the metadata, which a tensor's fields are not."""
    with pytest.raises(TargetError) as caught:
        shardmerge.run(_mapping(tmp_path, "__metadata__"))
    assert caught.value.code == "unusable-name"
    assert caught.value.where.startswith("mapping.yaml:4:")
    assert not (tmp_path / "out").exists()


def test_the_reference_reader_refuses_it(tmp_path: Path) -> None:
    save_file({"__metadata_": np.zeros(1, np.float32)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes().replace(b'"__metadata_":', b'"__metadata__"').replace(b'__"{', b'__":{')
    length = int.from_bytes(data[:8], "little")
    (tmp_path / "file").write_bytes((length + 1).to_bytes(8, "little") + data[8:])
    with pytest.raises(SafetensorError), safe_open(tmp_path / "file", "numpy"):
        pass


@pytest.mark.parametrize("name", ODD)
def test_other_names_that_no_reader_takes(tmp_path: Path, name: str) -> None:
    """From a torch file: its keys may be any text."""
    torch = pytest.importorskip("torch", reason="torch writes the checkpoint")
    torch.save({"weight": torch.ones(2), name: torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(TargetError) as caught:
        shardmerge.convert(tmp_path / "a.pth", tmp_path / "out")
    assert caught.value.code == "unusable-name"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_name_that_is_too_long() -> None:
    """What a mapping or a checkpoint of today cannot make; whatever makes it, it is not written."""
    name = "x" * 4097
    with pytest.raises(TargetError) as caught:
        shards.lay_out([PlannedTensor(name, TensorEntry(name, DTYPES["F32"], (0,), ()), "rule", name)], 1 << 30)
    assert caught.value.code == "unusable-name"


def test_a_lone_surrogate(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch writes the checkpoint")
    torch.save({"a\ud800": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(shardmerge.ShardmergeError):
        shardmerge.convert(tmp_path / "a.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 4096, "ä.ß", "a/b", '"', "weight\u2028", "__metadata__2"])
def test_names_that_every_reader_takes(tmp_path: Path, name: str) -> None:
    save_file({name: np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    shardmerge.convert(tmp_path / "model.safetensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert list(file.keys()) == [name]
    shardmerge.verify(tmp_path / "out")


def test_a_torch_file_has_no_such_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch reads it")
    shardmerge.run(_mapping(tmp_path, "__metadata__", "bin"))
    assert list(torch.load(tmp_path / "out" / "pytorch_model.bin")) == ["__metadata__"]


def test_a_header_that_no_reader_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_LARGEST_HEADER", 4000)
    save_file({"weight": np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(TargetError) as caught:
        shardmerge.convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert caught.value.code == "header-too-large"
