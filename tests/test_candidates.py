"""A directory with several candidates: what a convention chooses is said, and what none decides is an error."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from tests.conftest import GOLDEN, shardmerge

SHARD = "model-{:05d}-of-{:05d}.safetensors"


def model(folder: Path, value: float, name: str = "model.safetensors") -> Path:
    """Writes a model whose only tensor says which one it is."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"w": torch.tensor([value, value])}
    save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    return folder / name


def index(folder: Path, shards: dict[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"weight_map": shards}))


def value(source: Path | str, tmp_path: Path) -> float:
    """Converts, and says which model came out."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    sm.convert(source, out)
    return float(load_file(out / "model.safetensors")["w"][0])


def refused(source: Path, tmp_path: Path) -> sm.ShardmergeError:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return caught.value


def paths(hint: str) -> list[str]:
    """Returns the paths that a hint gives to paste."""
    return re.findall(r"(?<!\S)/\S+", hint)


# --- a convention decides ---


@pytest.mark.parametrize(
    "second", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"]
)
def test_the_model_that_transformers_would_load_is_read_and_the_other_named(second: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1).parent
    if second.endswith("json"):
        part = "pytorch_model-00001-of-00001.bin" if "bin" in second else SHARD.format(1, 1)
        model(folder, 2, part)
        index(folder, {"w": part}, second)
    else:
        model(folder, 2, second)
    assert value(folder, tmp_path) == 1
    (warning,) = sm.inspect(folder).warnings
    assert second in warning
    (other,) = paths(warning.replace(";", " "))
    assert value(other, tmp_path) == 2


def test_quiet_runs_say_it_too(tmp_path: Path) -> None:
    model(tmp_path / "m", 1)
    model(tmp_path / "m", 2, "pytorch_model.bin")
    assert "pytorch_model.bin" in shardmerge("convert", tmp_path / "m", tmp_path / "out", "-q").stderr


def test_an_index_over_the_one_file_is_no_second_model(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1).parent
    index(folder, {"w": "model.safetensors"})
    assert sm.inspect(folder).warnings == ()


def test_shards_that_the_index_does_not_name(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1, SHARD.format(1, 1)).parent
    index(folder, {"w": SHARD.format(1, 1)})
    model(folder, 2, SHARD.format(2, 7))
    assert value(folder, tmp_path) == 1
    assert SHARD.format(2, 7) in sm.inspect(folder).warnings[0]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "lit_model.pth", "ema.pt"])
def test_copies_of_another_layout_are_noted(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1).parent
    model(folder, 2, name)
    assert value(folder, tmp_path) == 1
    catalog = sm.inspect(folder)
    assert (catalog.warnings, name in catalog.notes[0]) == ((), True)


def test_a_final_model_above_its_checkpoints(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1).parent
    for step in (5, 10):
        model(folder / f"checkpoint-{step}", step)
    assert value(folder, tmp_path) == 1
    assert "checkpoint-5/, checkpoint-10/" in sm.inspect(folder).notes[0]


def test_leftovers_of_an_unfinished_save(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1).parent
    (folder / "model.safetensors.tmp").write_bytes(b"half")
    assert "did not end: model.safetensors.tmp" in sm.inspect(folder).warnings[0]


@pytest.fixture
def tags(tmp_path: Path) -> Path:
    """Two tags of one run and ``latest``."""
    source = next(path for path in sorted(GOLDEN.glob("zero/*llama_z2*")))
    tag = next(path.parent for path in source.rglob("*_model_states.pt"))
    for step in (2, 10):
        shutil.copytree(tag, tmp_path / "ck" / f"global_step{step}")
    (tmp_path / "ck" / "latest").write_text("global_step10")
    return tmp_path / "ck"


def test_other_tags_are_noted_and_a_newer_one_is_a_warning(tags: Path) -> None:
    catalog = sm.inspect(tags)
    assert Path(catalog.path).name == "global_step10"
    assert "global_step2" in catalog.notes[0]
    (tags / "latest").write_text("global_step2")
    assert "global_step10 is newer" in sm.inspect(tags).warnings[0]


def test_a_tag_of_another_name_is_not_newer(tags: Path) -> None:
    (tags / "global_step10").rename(tags / "best-100")
    (tags / "latest").write_text("global_step2")
    assert (sm.inspect(tags).warnings, "best-100" in sm.inspect(tags).notes[0]) == ((), True)


def test_tags_without_latest(tags: Path, tmp_path: Path) -> None:
    (tags / "latest").unlink()
    error = refused(tags, tmp_path)
    assert error.code == "several-tags"
    assert [Path(path).name for path in paths(error.hint)] == ["global_step10", "global_step2"]
    for path in paths(error.hint):
        assert sm.inspect(path).entries


def test_the_gathered_model_beside_a_tag(tags: Path, tmp_path: Path) -> None:
    model(tags, 7)
    assert "model.safetensors" in " ".join(sm.inspect(tags).notes)
    next((tags / "global_step10").glob("*model_states.pt")).unlink()
    error = refused(tags, tmp_path)
    path = paths(error.each()[-1].hint)[-1]
    assert value(path, tmp_path) == 7


def test_a_tag_that_was_removed(tags: Path, tmp_path: Path) -> None:
    shutil.rmtree(tags / "global_step10")
    assert refused(tags, tmp_path).code == "missing-tag"
    model(tags, 7)
    assert value(tags, tmp_path) == 7
    assert "global_step10, which is not here" in sm.inspect(tags).warnings[0]


def test_a_work_dir_whose_newest_is_not_the_last(tmp_path: Path) -> None:
    for step in (10, 20):
        model(tmp_path / "w", step, f"iter_{step}.pth")
    (tmp_path / "w" / "last_checkpoint").write_text("/gone/iter_10.pth")
    assert value(tmp_path / "w", tmp_path) == 10
    assert "iter_20.pth is newer" in sm.inspect(tmp_path / "w").warnings[0]
    (tmp_path / "w" / "last_checkpoint").write_text("/gone/iter_20.pth")
    assert "iter_10.pth" in sm.inspect(tmp_path / "w").notes[0]


def test_an_adapter_among_others(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "a" / "second"):
        model(folder, 1, "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
    assert "second/" in " ".join(sm.inspect(tmp_path / "a").notes)
    model(tmp_path / "a", 2, "adapter_model.bin")
    model(tmp_path / "a", 3)
    warnings = " ".join(sm.inspect(tmp_path / "a").warnings)
    assert "adapter_model.bin" in warnings
    assert value(paths(warnings)[0], tmp_path) == 3


# --- no convention decides ---


@pytest.mark.parametrize(
    ("folders", "name"),
    [
        (("checkpoint-5", "checkpoint-10"), "model.safetensors"),
        (("checkpoint-5",), "pytorch_model.bin"),
        (("english", "german"), "adapter_model.safetensors"),
        (("unet", "text_encoder"), "model.safetensors"),
    ],
)
@pytest.mark.parametrize("config", [False, True])
def test_checkpoints_in_directories_inside(
    folders: tuple[str, ...], name: str, tmp_path: Path, *, config: bool
) -> None:
    for number, folder in enumerate(folders):
        model(tmp_path / "m" / folder, number, name)
        if "adapter" in name:
            (tmp_path / "m" / folder / "adapter_config.json").write_text("{}")
    if config:
        (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    error = refused(tmp_path / "m", tmp_path)
    assert error.code == ("nothing-to-convert" if config else "several-checkpoints")
    assert {Path(path).name for path in paths(error.hint)} == set(folders)
    for path in paths(error.hint):
        assert set(sm.inspect(path).entries) == {"w"}


def test_an_optimizer_beside_is_no_candidate(tmp_path: Path) -> None:
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        model(tmp_path / "m" / folder, 1)
    assert [Path(path).name for path in paths(refused(tmp_path / "m", tmp_path).hint)] == ["pytorch_model_fsdp_0"]


def test_several_files_and_indexes_give_lines_to_paste(tmp_path: Path) -> None:
    model(tmp_path / "f", 1, "a.safetensors")
    model(tmp_path / "f", 2, "b.pth")
    error = refused(tmp_path / "f", tmp_path)
    assert error.code == "several-files"
    assert sorted(value(path, tmp_path) for path in paths(error.hint)) == [1, 2]
    for number, name in enumerate(("unet.safetensors", "vae.safetensors")):
        part = model(tmp_path / "i", number, f"{number}.safetensors").name
        index(tmp_path / "i", {"w": part}, f"{name}.index.json")
    error = refused(tmp_path / "i", tmp_path)
    assert sorted(value(path, tmp_path) for path in paths(error.hint)) == [0, 1]


def test_one_model_in_two_formats_is_no_question(tmp_path: Path) -> None:
    model(tmp_path / "m", 1, "open_clip_model.safetensors")
    model(tmp_path / "m", 2, "open_clip_pytorch_model.bin")
    assert value(tmp_path / "m", tmp_path) == 1


# --- parts of a model ---


def shards(folder: Path, total: int = 3) -> dict[str, torch.Tensor]:
    folder.mkdir()
    whole = {f"w{number}": torch.full((2,), float(number)) for number in range(1, total + 1)}
    for number in range(1, total + 1):
        save_file({f"w{number}": whole[f"w{number}"]}, folder / SHARD.format(number, total))
    return whole


def test_a_shard_alone_stands_for_the_whole(tmp_path: Path) -> None:
    whole = shards(tmp_path / "m")
    index(tmp_path / "m", {f"w{number}": SHARD.format(number, 3) for number in range(1, 4)})
    for number in range(1, 4):
        catalog = sm.inspect(tmp_path / "m" / SHARD.format(number, 3))
        assert set(catalog.entries) == set(whole)
        assert "one part" in catalog.notes[0]


@pytest.mark.parametrize("which", ["", SHARD.format(2, 3)])
def test_shards_without_an_index(which: str, tmp_path: Path) -> None:
    whole = shards(tmp_path / "m")
    catalog = sm.inspect(tmp_path / "m" / which)
    assert set(catalog.entries) == set(whole)
    assert "no index" in catalog.warnings[0]
    (tmp_path / "m" / SHARD.format(3, 3)).unlink()
    error = refused(tmp_path / "m" / which, tmp_path)
    assert error.code == "missing-shard"
    assert SHARD.format(3, 3) in error.what


def test_shards_of_two_models(tmp_path: Path) -> None:
    shards(tmp_path / "m")
    save_file({"w1": torch.ones(2)}, tmp_path / "m" / SHARD.format(2, 3))
    assert refused(tmp_path / "m", tmp_path).code == "duplicate-name"


# --- state of a run is no model ---


def states() -> dict[str, object]:
    """What transformers, accelerate, torch and DeepSpeed save beside a model, made by torch where it can be."""
    parameter = torch.nn.Parameter(torch.ones(4))
    adam, scaler = torch.optim.AdamW([parameter]), torch.amp.GradScaler("cpu")
    parameter.grad = torch.ones(4)
    adam.step()
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 1)
    generators = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    seeds = {"step": 3, "random_state": random.getstate(), "torch_manual_seed": torch.get_rng_state()}
    named = {"state": {"layer.weight": {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "rng_state.pth": generators,
        "rng_state_0.pth": generators | {"cuda": torch.zeros(16, dtype=torch.uint8)},
        "random_states_0.pkl": seeds,
        "optimizer.pt": adam.state_dict(),
        "optimizer.bin": named,
        "optimizer_1.bin": adam.state_dict(),
        "scheduler.pt": scheduler.state_dict() | {"last": torch.ones(1)},
        "scaler.pt": scaler.state_dict()
        | {"_scale": torch.ones(1), "scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5},
        "optim_world_size_4_rank_0.pt": named,
        "bf16_zero_states.pt": {"optimizer_state_dict": {"x": torch.ones(2)}, "ds_config": {}, "w": torch.ones(2)},
    }


@pytest.mark.parametrize("name", states())
@pytest.mark.parametrize("renamed", [False, True])
def test_state_is_refused_by_what_it_is(name: str, tmp_path: Path, *, renamed: bool) -> None:
    path = tmp_path / ("anything.pth" if renamed else name)
    torch.save(states()[name], path)
    assert refused(path, tmp_path).code == "not-a-model"


def test_moments_in_a_safetensors_file(tmp_path: Path) -> None:
    moments = {f"layer.{n}.exp_avg{sq}": torch.ones(2) for n in range(2) for sq in ("", "_sq")}
    save_file(moments, tmp_path / "o.safetensors")
    assert refused(tmp_path / "o.safetensors", tmp_path).code == "not-a-model"
    save_file(moments | {"layer.0.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert sm.inspect(tmp_path / "m.safetensors").entries


@pytest.mark.parametrize("config", [False, True])
def test_a_directory_of_state_alone_has_no_model(tmp_path: Path, *, config: bool) -> None:
    (tmp_path / "ck").mkdir()
    for name, state in states().items():
        if name != "bf16_zero_states.pt":
            torch.save(state, tmp_path / "ck" / name)
    if config:
        (tmp_path / "ck" / "config.json").write_text('{"model_type": "mine"}')
    error = refused(tmp_path / "ck", tmp_path)
    assert error.code == ("nothing-to-convert" if config else "unknown-format")
    assert "rng_state.pth, rng_state_0.pth: the state of random generators" in error.found
    model(tmp_path / "ck", 4, "weights.pth")
    assert value(tmp_path / "ck", tmp_path) == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.gguf", "GGUF"), ("flax_model.msgpack", "Flax"), ("tf_model.h5", "TensorFlow"), ("model.onnx", "ONNX"),
     ("m.nemo", "NeMo"), ("m.tar", "tar"), ("m.ckpt", "Lightning")],
)  # fmt: skip
@pytest.mark.parametrize("config", [False, True])
def test_weights_of_other_kinds_are_refused_by_name(name: str, kind: str, tmp_path: Path, *, config: bool) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(b"?" * 64)
    if config:
        (tmp_path / "m" / "config.json").write_text("{}")
    error = refused(tmp_path / "m", tmp_path)
    assert kind in error.what + error.found
    assert name in error.found


@pytest.mark.parametrize("config", [False, True])
def test_links_that_lead_nowhere_are_said(tmp_path: Path, *, config: bool) -> None:
    """What ``cp -r`` makes of a snapshot of the hub cache."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to("../../blobs/3f2a")
    (tmp_path / "m" / "merges.txt").symlink_to("../../blobs/4d1c")
    if config:
        (tmp_path / "m" / "config.json").write_text("{}")
    error = refused(tmp_path / "m", tmp_path)
    assert error.found.startswith("model.safetensors: links to files that are not there; remove this copy,")


def test_a_lightning_file_is_named_to_be_passed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    torch.save({"state_dict": {"w": torch.tensor([3.0, 3.0])}}, tmp_path / "m" / "last.ckpt")
    error = refused(tmp_path / "m", tmp_path)
    assert value(paths(error.hint)[0], tmp_path) == 3


@pytest.mark.parametrize("place", ["", ".cache/huggingface/download"])
def test_a_download_that_did_not_end(place: str, tmp_path: Path) -> None:
    (tmp_path / "m" / place).mkdir(parents=True)
    (tmp_path / "m" / place / "model.safetensors.incomplete").write_bytes(b"half")
    (tmp_path / "m" / "config.json").write_text("{}")
    assert "did not end" in refused(tmp_path / "m", tmp_path).found
