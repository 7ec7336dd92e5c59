"""Bad input: a clear error with its code and exit code, nothing left behind, sources untouched."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from benchmarks.synthetic import write_zero
from shardmerge.storage import writing
from tests.conftest import shardmerge
from tests.staged import assert_nothing_done

SHAPES = {"a.weight": (7, 5), "b.weight": (3,), "c.weight": (11, 2)}


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its digest."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def zero(tmp_path: Path) -> Path:
    """A ZeRO-2 tag directory of three ranks."""
    return write_zero(tmp_path / "run", SHAPES, stage=2, world=3, fill=True)


def refused(code: str, exit_code: int, *arguments: object, root: Path) -> str:
    """Runs a command that must fail, and checks that the folder it works in is as it was."""
    before = tree(root)
    done = shardmerge(*arguments, code=exit_code)
    assert f"[{code}]" in done.stderr
    assert not done.stdout
    assert tree(root) == before
    assert not list(root.rglob("*.partial-*"))
    return done.stderr


def test_a_truncated_shard(zero: Path, tmp_path: Path) -> None:
    rank = zero / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with rank.open("r+b") as file:
        file.truncate(rank.stat().st_size // 2)
    done = shardmerge("convert", zero, tmp_path / "out", code=1)
    assert str(rank) in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_truncated_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    with path.open("r+b") as file:
        file.truncate(2000)
    text = refused("truncated-file", 1, "convert", path, tmp_path / "out", root=tmp_path)
    assert "2000 bytes" in text
    assert "hint: copy or download the file again" in text


def test_a_missing_rank(zero: Path, tmp_path: Path) -> None:
    (zero / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    text = refused("missing-rank", 1, "convert", zero, tmp_path / "out", root=tmp_path)
    assert "rank 1" in text
    assert "3 files" in text


def test_ranks_of_two_runs(zero: Path, tmp_path: Path) -> None:
    """The same model and settings, one optimizer step apart: only the step counter tells."""
    path = zero / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] += 1
    torch.save(state, path)
    text = refused("mixed-runs", 1, "convert", zero, tmp_path / "out", root=tmp_path)
    assert "optimizer step" in text


def test_a_rank_of_another_model(zero: Path, tmp_path: Path) -> None:
    other = write_zero(tmp_path / "other", {"a.weight": (70, 5)}, stage=2, world=3, fill=True)
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(other / name, zero / name)
    refused("zero-layout", 1, "convert", zero, tmp_path / "out", root=tmp_path)


def test_more_ranks_than_the_run_had(zero: Path, tmp_path: Path) -> None:
    name = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    shutil.copy(zero / name.format(2), zero / name.format(3))
    refused("mixed-runs", 1, "convert", zero, tmp_path / "out", root=tmp_path)


def mapping(folder: Path, tensors: str, drop: str = "", sources: str = "src: model.safetensors") -> Path:
    path = folder / "mapping.yaml"
    text = f"shardmerge: 1\nsources:\n  {sources}\noutput: out\ntensors:\n{tensors}\n{drop}"
    path.write_text(text)
    return path


def test_a_key_in_no_rule(tmp_path: Path) -> None:
    save_file({"llm.a": torch.ones(2), "extra.b": torch.ones(2)}, tmp_path / "model.safetensors")
    path = mapping(tmp_path, '  "{rest...}": src:llm.{rest...}')
    text = refused("unmatched-source", 1, "run", path, root=tmp_path)
    assert "- src:extra.b" in text


def test_a_rule_that_matches_nothing(tmp_path: Path) -> None:
    save_file({"llm.a": torch.ones(2)}, tmp_path / "model.safetensors")
    path = mapping(tmp_path, '  "{rest...}": src:llm.{rest...}\n  "b": src:lmm.a')
    text = refused("rule-matches-nothing", 1, "run", path, root=tmp_path)
    assert f"{path}:7:3" in text
    assert "src:llm.a" in text


def test_all_problems_of_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mapping.yaml"
    path.write_text("shardmerge: 1\nsorces: {a: b}\noutput: {path: out, dtype: int3}\ntensors: {'{x}': 'a:{y}'}\n")
    done = shardmerge("run", path, code=1)
    for expected in ("unknown-key", "did you mean `sources`", "unknown-dtype", f"{path}:2:1", f"{path}:3:28"):
        assert expected in done.stderr


def test_the_disk_is_too_small(zero: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmerge.publish.checks.free_bytes", lambda path: 1000)
    before = tree(tmp_path)
    with pytest.raises(sm.ResourceError) as caught:
        sm.convert(zero, tmp_path / "out")
    assert caught.value.code == "disk-too-small"
    assert caught.value.exit_code == 4
    assert tree(tmp_path) == before
    assert writing.free_bytes(tmp_path) > 1000


def test_the_room_is_what_an_ordinary_user_has(disk: Callable[[str], Path]) -> None:
    """As df says it, which leaves out what ext4 keeps for root."""
    folder = disk("ext4")
    command = ["df", "--block-size=1", "--output=avail", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert writing.free_bytes(folder / "not" / "there") == int(said.split()[-1])


# Runs in a mount namespace of its own, so that the small disk goes with the process, however it ends.
_FULL_DISK = """
import sys
from pathlib import Path
import shardmerge
from shardmerge.publish import checks as publish
source, disk = Path(sys.argv[1]), Path(sys.argv[2])
check = publish.free_bytes
def check_then_fill(path):
    free = check(path)
    (disk / "taken").write_bytes(bytes(free - 1_000_000))
    return free
publish.free_bytes = check_then_fill
options = shardmerge.Options(shard_size=1_000_000)
try:
    shardmerge.convert(source, disk / "out", options=options)
except shardmerge.ResourceError as error:
    (staging,) = disk.glob("out.partial-*")
    parts = [path.suffix for path in (staging / "parts").iterdir()]
    print(error.code, (disk / "out").exists(), parts, [path.name for path in (staging / "model").iterdir()])
publish.free_bytes = check
(disk / "taken").unlink()
print(shardmerge.convert(source, disk / "out", options=options).made, sorted(path.name for path in disk.iterdir()))
"""


def test_the_disk_fills_up_all_the_same(tmp_path: Path) -> None:
    """A real full disk: another process takes the space between the check and the write. One part of two is made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=24m tmpfs {disk}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and a mount namespace")
    zero = write_zero(tmp_path / "run", {"a": (700, 300), "b": (600, 300)}, stage=2, world=2, fill=True)
    (tmp_path / "full.py").write_text(_FULL_DISK)
    run = f"{mount} && exec {sys.executable} {tmp_path / 'full.py'} {zero} {disk}"
    environment = {**os.environ, "PYTHONPATH": str(Path(sm.__file__).parent.parent)}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", run], check=False, capture_output=True, text=True, env=environment
    )
    failed, again = done.stdout.splitlines()
    assert failed == "disk-full False ['.json'] ['model-00001-of-00002.safetensors']", done.stderr
    assert again == "1 ['out']"


def test_the_output_exists(zero: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("work of weeks")
    refused("output-exists", 1, "convert", zero, out, root=tmp_path)


@pytest.mark.parametrize("below", ["", ".."])
def test_the_output_is_a_source(zero: Path, tmp_path: Path, below: str) -> None:
    refused("output-is-source", 1, "convert", zero, (zero / below).resolve(), root=tmp_path)


def test_a_source_is_never_replaced_whatever_leads_to_it(tmp_path: Path) -> None:
    """A result of ours is the source, by its own name or by a link, and may be overwritten as far as its receipt says.

    The output path may be a link too, or the file itself.
    """
    real = tmp_path / "real"
    save_file({"w": torch.ones(9)}, tmp_path / "model.safetensors")
    sm.convert(tmp_path / "model.safetensors", real)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file.safetensors").symlink_to(real / "model.safetensors")
    pairs = [("real", "real"), ("link", "real"), ("file.safetensors", "real"), ("real", "link")]
    for source, out in [*pairs, ("model.safetensors", "model.safetensors")]:
        for more in ((), ("--overwrite",)):
            refused("output-is-source", 1, "convert", tmp_path / source, tmp_path / out, *more, root=tmp_path)


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_hostile_pickle_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": _Evil(mark)}, path)
    shardmerge("inspect", path)  # inert: listed, carried, never called
    assert not mark.exists()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(_Evil(mark), 2)[:-1] + b"b.")
        archive.writestr("evil/version", "3")
    text = refused("damaged-pickle", 1, "convert", path, tmp_path / "out", root=tmp_path)
    assert "byte" in text
    assert not mark.exists()


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A directory of two shards with an honest index."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    value = {"metadata": {"total_size": 20}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        ({"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "lying-index"),
        ({"a": "model-00001-of-00002.safetensors"}, "missing-tensor-in-index"),
        ({"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00003.safetensors"}, "missing-shard"),
        ({"a": "../secret.safetensors"}, "unsafe-index"),
        ({"a": "/etc/secret.safetensors"}, "unsafe-index"),
        ({"a": "C:\\secret.safetensors"}, "unsafe-index"),
        ({"a": "model-00001-of-00002.bin"}, "unsafe-index"),
    ],
)
def test_an_index_is_never_trusted(indexed: Path, tmp_path: Path, weight_map: dict[str, str], code: str) -> None:
    shardmerge("inspect", indexed)
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    write_index(indexed, weight_map)
    if code == "missing-tensor-in-index":  # the shard that nobody names is not part of the model
        shardmerge("inspect", indexed)
        return
    refused(code, 1, "convert", indexed, tmp_path / "out", root=tmp_path)


def test_an_index_that_names_a_tensor_twice(indexed: Path) -> None:
    text = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}'
    (indexed / "model.safetensors.index.json").write_text(text)
    assert "[damaged-index]" in shardmerge("inspect", indexed, code=1).stderr


def test_a_path_that_is_not_there_names_its_neighbour(zero: Path) -> None:
    done = shardmerge("inspect", zero.parent / "global_step2", code=2)
    assert "[missing-path]" in done.stderr
    assert "global_step1" in done.stderr


def test_a_hub_id_that_is_not_in_the_cache(tmp_path: Path) -> None:
    done = shardmerge("inspect", "nobody/nothing", code=2, env={**os.environ, "HF_HOME": str(tmp_path)})
    assert "[not-in-cache]" in done.stderr
    assert "--download" in done.stderr


def test_something_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    assert "[unknown-format]" in shardmerge("inspect", tmp_path / "notes.txt", code=1).stderr
    assert "[unknown-format]" in shardmerge("inspect", tmp_path, code=1).stderr


def test_a_source_that_changes_while_it_is_read(zero: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = zero / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    write = writing.OutputFile.write

    def touched(self: writing.OutputFile, offset: int, data: memoryview) -> None:
        os.utime(rank, ns=(1, 1))
        write(self, offset, data)

    monkeypatch.setattr(writing.OutputFile, "write", touched)
    with pytest.raises(sm.CheckpointError) as caught:
        sm.convert(zero, tmp_path / "out")
    assert caught.value.code == "source-changed"
    assert_nothing_done(tmp_path / "out")


@pytest.mark.parametrize("option", [("--dtype", "int8"), ("--shard-size", "5GiB"), ("--base", "x")])
def test_options_that_mean_nothing(zero: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    done = shardmerge("convert", zero, tmp_path / "out", *option, code=2)
    assert option[1] in done.stderr
