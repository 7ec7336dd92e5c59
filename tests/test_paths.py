"""Paths and links in a checkpoint: what leads out of it, what is no file, and names of any kind."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardmerge as sm
from tests.conftest import GOLDEN

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
FOLDERS = {
    "zero": GOLDEN / "zero" / "llama_z2_w2_bf16" / "ckpt",
    "dcp": GOLDEN / "dcp" / "placements_2x2_fp32" / "ckpt",
}


def model(folder: Path) -> Path:
    """A sharded model with the usual small files."""
    folder.mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": SHARD}}))
    (folder / "config.json").write_text('{"model_type": "mine"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def lead_out(path: Path) -> None:
    """Moves a file or directory out of its checkpoint, and leaves a link."""
    away = path.parents[2] / f"away-{path.name}"
    shutil.move(path, away)
    path.symlink_to(away)


def code_of(source: Path) -> str:
    """Returns the code of the error of a conversion, or ``""``."""
    try:
        sm.convert(source, source.parent / "out", sync=False)
    except sm.ShardmergeError as error:
        assert not (source.parent / "out").exists()
        return error.code
    return ""


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json"])
def test_a_link_out_of_a_model(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = model(tmp_path / "a" / "model")
    lead_out(folder / name)
    assert code_of(folder) == "link-outside"


LINKED = [
    ("zero", "global_step2"), ("zero", "latest"), ("zero", "global_step2/mp_rank_00_model_states.pt"),
    ("zero", "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), ("dcp", ".metadata"),
    ("dcp", "__0_0.distcp"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), LINKED)
def test_a_link_out_of_a_training_run(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copytree(FOLDERS[kind], tmp_path / "a" / "run", symlinks=True)
    assert code_of(tmp_path / "a" / "run") == ""
    shutil.rmtree(tmp_path / "a" / "out")
    lead_out(tmp_path / "a" / "run" / name)
    assert code_of(tmp_path / "a" / "run") == "link-outside"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_an_adapter(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "adapter"
    folder.mkdir(parents=True)
    one = np.ones((2, 2), np.float32)
    save_file({f"base_model.model.q_proj.lora_{x}.weight": one for x in "AB"}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lead_out(folder / name)
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder)
    assert caught.value.code == "link-outside"


NAMED = ["../{0}", "/etc/{0}", "a/../{0}", "./{0}", "C:{0}", "..\\{0}", "sub/{0}", "~/{0}", "{0}\0", "\u202e{0}"]


@pytest.mark.parametrize("name", NAMED)
def test_an_index_that_names_another_place(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name.format(SHARD)}}))
    shutil.copy2(folder / SHARD, tmp_path / SHARD)
    assert code_of(folder) == "unsafe-index"


@pytest.mark.parametrize("marker", ["../elsewhere", "/etc", "a/../../elsewhere", "..", "."])
def test_a_marker_that_names_another_place(marker: str, tmp_path: Path) -> None:
    """Of a DeepSpeed run: a tag is the name of a directory beside it."""
    shutil.copytree(FOLDERS["zero"], tmp_path / "run")
    shutil.copytree(FOLDERS["zero"] / "global_step2", tmp_path / "elsewhere")
    (tmp_path / "run" / "latest").write_text(marker)
    assert code_of(tmp_path / "run") in {"missing-tag", "unsafe-tag"}


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json", "tokenizer.json"])
def test_what_is_no_file(kind: str, name: str, tmp_path: Path) -> None:
    """Weights and an index are refused; a small file that is none is not there. Nothing waits for a writer."""
    folder = model(tmp_path / "model")
    (folder / name).unlink()
    NO_FILES[kind](folder / name)
    code = code_of(folder)
    if name == SHARD:
        assert code in {"missing-shard", "not-a-file", "link-outside", "unreadable-file"}
    if not code:
        assert not (tmp_path / "out" / name).exists() or name == INDEX
        assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0, 1, 2, 3, 4, 5]


NAMES = [
    "a b", "new\nline", "tab\t", "emoji-\U0001f999", "caf\u00e9", "cafe\u0301", "-o", "$HOME", "a'b\"c", "#x", "{r...}",
    "[!a]*?", "x" * 230, "a:b", "%s%n", "back\\slash", os.fsdecode(b"latin-\xe9"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_directory(name: str, tmp_path: Path) -> None:
    """Of the source, of a small file beside it, and of the output."""
    folder, out = model(tmp_path / name), tmp_path / f"{name[:190]} out"
    (folder / f"LICENSE.{name[:200]}").write_text("mine")
    sm.convert(folder, out, sync=False)
    sm.verify(out)
    assert (out / f"LICENSE.{name[:200]}").read_text() == "mine"
    shutil.rmtree(out)
    sm.convert(folder, out, sync=False)


def test_names_that_differ_in_case_or_composition_are_two(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    names = ["LICENSE.caf\u00e9", "LICENSE.cafe\u0301", "LICENSE.CAFE"]
    for name in names:
        (folder / name).write_text(name)
    sm.convert(folder, tmp_path / "out", sync=False)
    assert [(tmp_path / "out" / name).read_text() for name in names] == names


def test_hard_links_are_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    os.link(folder / SHARD, tmp_path / "other name")
    assert code_of(folder) == ""


@pytest.mark.parametrize("far", [False, True])
def test_the_hint_for_a_link_takes_no_space_where_it_can(
    far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard link on the same file system, a copy from another one."""
    folder = model(tmp_path / "model")
    away = (Path("/dev/shm") if far else tmp_path) / f"away-{os.getpid()}"
    shutil.move(folder / SHARD, away)
    (folder / SHARD).symlink_to(away)
    try:
        with pytest.raises(sm.ShardmergeError) as caught:
            sm.convert(folder, tmp_path / "out")
        command = caught.value.hint.split(": ", 1)[1].split(";")[0]
        assert command.split()[0] == ("cp" if far else "ln")
        assert os.system(command) == 0
        assert far or (folder / SHARD).samefile(away)
        assert code_of(folder) == ""
    finally:
        away.unlink()
