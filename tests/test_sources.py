"""Everything people really pass: sharded .bin, nested dictionaries, hub ids, directories; and the lazy view of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import shardmerge as sm
from tests.conftest import read_all, same_values, shardmerge


def assert_holds(source: Path | str, tensors: dict[str, torch.Tensor], **options: str) -> None:
    found = read_all(sm.inspect(source, **options))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert same_values(found[name], tensor.detach().double().numpy()), name


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A state dict with views: transposed, sliced, expanded, and two names on one storage."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "plain": torch.randn(3, 4).bfloat16(),
        "transposed": base.t(),
        "columns": base[:, 2:5],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "rows": base[2:4],
        "tied.a": base,
        "tied.b": base,
        "ids": torch.arange(7),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_shared_storages_of_a_torch_file(state: dict, tmp_path: Path, *, legacy: bool) -> None:
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert_holds(tmp_path / "x.pth", state)
    catalog = sm.inspect(tmp_path / "x.pth")
    assert dict(catalog.aliases) == {"tied.b": "tied.a"}
    sm.convert(tmp_path / "x.pth", tmp_path / "out")
    assert_holds(tmp_path / "out", state)


@pytest.mark.parametrize("key", ["state_dict", "module", "model", "model_state_dict"])
def test_the_state_dict_inside_a_training_file_is_found(state: dict, tmp_path: Path, key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    torch.save({"epoch": 3, "optimizer": optimizer, key: state}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", state)


def test_a_root_named_by_the_user(state: dict, tmp_path: Path) -> None:
    torch.save({"ema": {"shadow": state}, "model": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", {"w": torch.ones(2)})
    assert_holds(tmp_path / "x.pt", state, root="ema.shadow")
    done = shardmerge("inspect", tmp_path / "x.pt", "--root", "emma", code=2)
    assert "ema" in done.stderr


def test_placeholders_of_zero_3_count_as_absent(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(0), "b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    catalog = sm.inspect(tmp_path)
    assert set(catalog.entries) == {"b"}
    assert catalog.absent == {"a"}
    assert "placeholders" in shardmerge("inspect", tmp_path).stdout


def test_a_sharded_bin_with_its_index(tmp_path: Path) -> None:
    first, second = {"a": torch.randn(3), "c": torch.randn(2, 2)}, {"b": torch.arange(4)}
    torch.save(first, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin") | {"b": "pytorch_model-00002-of-00002.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    assert_holds(tmp_path, {**first, **second})
    assert_holds(index, {**first, **second})
    assert "total_size 1; the headers add up to 60" in shardmerge("inspect", tmp_path).stdout


def test_a_hub_id_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of huggingface_hub: snapshots are links into blobs, refs hold commits."""
    repo = tmp_path / "hub" / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (repo / folder).mkdir(parents=True)
    save_file({"w": torch.arange(3)}, repo / "blobs" / "1234")
    (repo / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/1234")
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert_holds("org/name", {"w": torch.arange(3)})
    assert_holds("org/name@abc", {"w": torch.arange(3)})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_holds("org/name", {"w": torch.arange(3)})
    with pytest.raises(sm.UsageError) as caught:
        sm.inspect("org/name@other")
    assert caught.value.code == "not-in-cache"


def test_a_directory_with_several_candidates_is_not_guessed(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    assert "[several-files]" in shardmerge("inspect", tmp_path, code=1).stderr
    (tmp_path / "a.pth").unlink()
    assert_holds(tmp_path, {"w": torch.ones(1)})


@pytest.mark.parametrize(
    "index",
    [
        np.s_[3], np.s_[-1], np.s_[2:5], np.s_[:, 1:3], np.s_[..., 2], np.s_[1:5:2, :, 1:4:2], np.s_[4, 1:, ::3],
        np.s_[::-1], np.s_[5:2], np.s_[:], np.s_[1, 2, 3],
    ],
    ids=str,
)  # fmt: skip
def test_slices_are_what_numpy_gives(tmp_path: Path, index: object) -> None:
    values = torch.arange(6 * 5 * 7, dtype=torch.float32).reshape(6, 5, 7)
    save_file({"w": values}, tmp_path / "x.safetensors")
    lazy = sm.open_checkpoint(tmp_path / "x.safetensors")["w"]
    assert np.array_equal(lazy[index], values.numpy()[index])
    assert np.array_equal(np.asarray(lazy), values.numpy())
    assert torch.equal(lazy.torch(), values)


def test_a_slice_reads_only_its_bytes(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1000, 100)}, tmp_path / "x.safetensors")
    checkpoint = sm.open_checkpoint(tmp_path / "x.safetensors")
    pool = checkpoint["w"]._reader._pool
    assert pool.bytes_read == 0  # opening reads the header only
    checkpoint["w"][10:20]
    assert pool.bytes_read == 10 * 400
    assert pool.reads == 1
    checkpoint["w"][:, 5]
    assert pool.bytes_read == 10 * 400 + 1000 * 4
    for index in (1000, (0, 0, 0), "x"):
        with pytest.raises((IndexError, TypeError)):
            checkpoint["w"][index]


def test_bfloat16_arrives_in_torch_bit_for_bit(tmp_path: Path) -> None:
    module = nn.Linear(5, 3).bfloat16()
    torch.save(module.state_dict(), tmp_path / "x.pt")
    checkpoint = sm.open_checkpoint(tmp_path / "x.pt")
    assert torch.equal(checkpoint["weight"].torch(), module.weight)
    assert str(checkpoint["weight"].dtype) == "BF16"


def test_a_plain_conversion_keeps_the_side_files_a_model_needs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.ones(4)}, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "float32"}))
    (model / "tokenizer.json").write_text("{}")
    (model / "trainer_state.json").write_text("{}")
    shardmerge("convert", model, tmp_path / "out", "--dtype", "bf16", "-q")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "config.json",
        "model.safetensors",
        "shardmerge.json",
        "tokenizer.json",
    ]


def test_inspecting_into_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    import subprocess
    import sys

    save_file({f"w{i}": torch.ones(1) for i in range(5000)}, tmp_path / "x.safetensors")
    command = f"{sys.executable} -m shardmerge inspect {tmp_path}/x.safetensors | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("safetensors: 5000 tensors")


def test_loose_tensors_beside_a_model_are_named_not_taken(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "loss": torch.tensor(0.5)}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", {"w": torch.ones(2)})
    assert "1 tensors beside model are not part of it: loss" in shardmerge("inspect", tmp_path / "x.pt").stdout


def test_a_directory_of_config_alone_is_a_base_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert shardmerge("inspect", tmp_path).stdout.startswith("config without weights: 0 tensors")
    assert "[nothing-to-convert]" in shardmerge("convert", tmp_path, tmp_path / "out", code=2).stderr
