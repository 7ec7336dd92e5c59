"""What a run takes up of an earlier one, and what it does not."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shardmerge.plan.tables import human_bytes
from shardmerge.publish.part_receipts import sealed
from tests import part_flips
from tests.conftest import shardmerge
from tests.crash_model import Disk, Node
from tests.killing import FAIL, KILL, Machine, Ran, Trap
from tests.scene import WAYS, Scene, claim

PARTS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four tensors of half a MiB, a file each in the result."""
    _save(tmp_path / "model.safetensors", seed=0)
    return tmp_path / "model.safetensors"


def _save(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    save_file({f"w{n}": rng.standard_normal((256, 512)).astype(np.float32) for n in range(PARTS)}, path)


def _command(source: Path, *more: object) -> list[object]:
    out = source.parent / "out"
    return ["convert", source, out, "--shard-size", "600KB", "--workers", "1", "--json", *more]


def _stopped(runs: Machine, source: Path, *more: object) -> Path:
    """Runs until all files are made, and not published; returns the staging directory."""
    assert runs.run(*_command(source, *more)).code == 0
    shutil.rmtree(source.parent / "out")
    assert runs.run(*_command(source, *more), trap=Trap(KILL, at=claim(runs.calls))).code == -9
    (root,) = source.parent.glob("out.partial-*")
    assert len(list(root.glob("parts/*.json"))) == PARTS
    return root


def _made(runs: Machine, source: Path, *more: object) -> int:
    """Runs to the end; returns how many files were made. The result is right, and nothing is left over."""
    ran = runs.run(*_command(source, *more))
    assert ran.code == 0, ran.err
    out = source.parent / "out"
    found = {name: array for path in out.glob("*.safetensors") for name, array in load_file(path).items()}
    expected = load_file(source)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert sorted(path.name for path in source.parent.iterdir()) == ["model.safetensors", "out"]
    return int(ran.json()["parts_made"])


def _refused(ran: Ran, code: str) -> dict[str, str]:
    assert ran.code == 1, ran.err
    error: dict[str, str] = ran.json()["errors"][0]
    assert error["code"] == code
    return error


def _receipt(root: Path, number: int = 1) -> Path:
    return root / "parts" / f"{number:05d}.json"


def _edit(path: Path, **changed: object) -> None:
    """Changes what a file says, and where it has a digest of itself that too."""
    value = {**json.loads(path.read_text()), **changed}
    digest = value.pop("receipt_sha256", "")
    text = json.dumps(value).encode()
    path.write_bytes(sealed(text) if digest else text)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _file(root: Path, number: int = 1) -> Path:
    return root / "model" / json.loads(_receipt(root, number).read_text())["file"]


def _unsampled(path: Path) -> int:
    """A byte between the blocks of 4 KiB that are looked at again, 16 of them, spread evenly."""
    return (path.stat().st_size - 4096) // 15 + 6000


# --- what does not mix ---


def test_a_changed_source(runs: Machine, source: Path) -> None:
    """The same header, the same size, other numbers: as a training run saves again."""
    _stopped(runs, source)
    _save(source, seed=1)
    error = _refused(runs.run(*_command(source)), "other-plan-staged")
    assert error["found"] == f"a source changed since: {source}"
    assert _made(runs, source, "--fresh") == PARTS


def test_other_options(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source, "--format", "bin")
    error = _refused(runs.run(*_command(source)), "other-plan-staged")
    assert error["where"] == str(root)
    assert "options" in error["found"]
    assert runs.run("clean", source.parent / "out").code == 0
    assert _made(runs, source) == PARTS


def test_what_other_options_left_beside_a_result_is_told_of(runs: Machine, source: Path) -> None:
    """Where it is, how large, and what removes it, to the letter."""
    out = source.parent / "out"
    assert runs.run(*_command(source)).code == 0
    more = "--format", "bin", "--overwrite"
    assert runs.run(*_command(source, *more)).code == 0
    at = claim(runs.calls)
    assert runs.run(*_command(source, "--overwrite")).code == 0
    assert runs.run(*_command(source, *more), trap=Trap(KILL, at=at)).code == -9
    (root,) = source.parent.glob("out.partial-*")
    (found,) = runs.run(*_command(source)).json()["left_over"]
    assert found["path"] == str(root)
    assert found["nbytes"] >= sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    size = human_bytes(found["nbytes"])
    said = runs.run("convert", source, out, "--shard-size", "600KB", "-q").err
    assert said.startswith(f"warning: an unfinished run with other options left {root} ({size}); to remove it: ")
    words = shlex.split(said.partition("to remove it: ")[2])
    assert words[0] == "shardmerge"
    assert shardmerge(*words[1:]).stdout == f"removed: {root}\n"
    assert runs.run(*_command(source)).json()["left_over"] == []


def test_what_a_process_is_at_work_on_is_not_removed(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    with (root / "begun.json").open():
        error = shardmerge("clean", source.parent / "out", code=1).stderr
    assert f"[staging-in-use]\n  at: {root}\n  found: process {os.getpid()}\n" in error
    assert _made(runs, source) == 0


def test_another_version(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    _edit(root / "begun.json", shardmerge="0.0.9")
    error = _refused(runs.run(*_command(source)), "other-plan-staged")
    assert "made by shardmerge 0.0.9" in error["found"]
    assert _made(runs, source, "--fresh") == PARTS


def test_a_part_of_another_version(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    _edit(_receipt(root), shardmerge="0.0.9")
    assert _made(runs, source) == 1


def test_a_receipt_of_another_plan(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    _edit(_receipt(root), plan="0" * 64)
    assert _made(runs, source) == 1


def test_the_receipt_of_another_part(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    shutil.copy(_receipt(root, 2), _receipt(root, 1))
    assert _made(runs, source) == 1


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_torn_receipt(runs: Machine, source: Path, left: int) -> None:
    root = _stopped(runs, source)
    data = _receipt(root).read_bytes()
    _receipt(root).write_bytes(data[:left])
    assert _made(runs, source) == 1


def test_what_was_begun_and_not_written_down(runs: Machine, source: Path) -> None:
    """As a power cut may leave it after --no-sync: each part says of which plan it is, and the directory's name."""
    root = _stopped(runs, source)
    (root / "begun.json").write_bytes(b"")
    error = _refused(runs.run(*_command(source, "--format", "bin")), "other-plan-staged")
    assert "unknown plan" in error["found"]
    assert _made(runs, source) == 0


def test_what_was_begun_is_written_down_again(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    (root / "begun.json").write_bytes(b"")
    for receipt in root.glob("parts/*.json"):
        receipt.unlink()
    assert runs.run(*_command(source), trap=Trap(KILL, at=claim(_calls(runs, source)))).code == -9
    assert json.loads((root / "begun.json").read_text())["schema"]
    assert _made(runs, source) == 0


def _calls(runs: Machine, source: Path) -> list[object]:
    """The calls of a run beside, that makes all."""
    aside = source.parent / "aside"
    aside.mkdir()
    shutil.copy2(source, aside / source.name)
    assert runs.run(*_command(aside / source.name)).code == 0
    shutil.rmtree(aside)
    return list(runs.calls)


@pytest.mark.parametrize("name", ["out [12]*?", "[!o]ut"])
def test_a_name_that_is_a_pattern(runs: Machine, source: Path, name: str) -> None:
    """It stands for itself: its own parts are found, and no others are."""
    command = [*_command(source)[:2], source.parent / name, *_command(source)[3:]]
    assert runs.run(*command, trap=Trap(KILL, at=claim(_calls(runs, source)))).code == -9
    other = source.parent / "out 1xy.partial-0123456789abcdef"
    (other / "parts").mkdir(parents=True)
    (other / "parts" / "00000.json").write_text("{}")
    _refused(runs.run(*command, "--dtype", "bfloat16"), "other-plan-staged")
    assert runs.run(*command).json()["parts_made"] == 0
    assert other.is_dir()


# --- what is looked at again ---


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_flipped_bit_of_what_was_left(form: str, tmp_path: Path) -> None:
    """``python -m tests.part_flips`` does the same with more than a thousand."""
    scene = part_flips.Scene(tmp_path, form)
    for kind, recheck, outcome in part_flips.flipped(scene, 20):
        assert outcome in part_flips.ALLOWED[recheck], (kind, recheck, outcome)


def test_parts_in_two_places(runs: Machine, source: Path) -> None:
    """One was about to publish when another made the directory anew and put a part there; then both were killed."""
    root = _stopped(runs, source)
    (root / "ready-gone").mkdir()
    _file(root).rename(root / "ready-gone" / _file(root).name)
    assert _made(runs, source) == 0


def test_a_part_that_is_damaged_while_somebody_publishes(runs: Machine, source: Path) -> None:
    """He was killed: what he had claimed is taken back, and what is missing in it is made."""
    assert runs.run(*_command(source)).code == 0
    at = claim(runs.calls) + 1
    shutil.rmtree(source.parent / "out")
    assert runs.run(*_command(source), trap=Trap(KILL, at=at)).code == -9
    (file, *_) = source.parent.glob("out.partial-*/ready-*/*.safetensors")
    file.unlink()
    assert _made(runs, source) == 1


def test_a_part_that_is_gone_or_has_another_size(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    _file(root, 0).unlink()
    with _file(root, 1).open("ab") as file:
        file.write(b"\0")
    assert _made(runs, source) == 2


def test_a_damaged_part(runs: Machine, source: Path) -> None:
    """Samples find lost blocks and other files; one bit between them is found by --recheck, and by `verify`."""
    root = _stopped(runs, source)
    _flip(_file(root), 100)
    _flip(_file(root, 2), _unsampled(_file(root, 2)))
    assert _made(runs, source, "--recheck") == 2
    root = _again(runs, source)
    _flip(_file(root), 100)
    _flip(_file(root, 3), -1)
    assert _made(runs, source) == 2


def test_a_torch_file_is_compared_whole(runs: Machine, source: Path) -> None:
    """It ends with a directory, and its checksums are written into it after all else."""
    root = _stopped(runs, source, "--format", "bin")
    _flip(_file(root), _unsampled(_file(root)))
    assert runs.run(*_command(source, "--format", "bin", "--recheck")).json()["parts_made"] == 1


def test_what_was_made_keeps_its_directories(runs: Machine, source: Path) -> None:
    """A part without its receipt yet: whoever fails then gives nothing up that somebody may be at."""
    assert runs.run(*_command(source)).code == 0
    at = next(n for n, call in enumerate(runs.calls, 1) if call.name == "rename" and "/model/" in call.b)
    shutil.rmtree(source.parent / "out")
    assert runs.run(*_command(source), trap=Trap(KILL, at=at + 1)).code == -9
    (root,) = source.parent.glob("out.partial-*")
    assert list((root / "parts").iterdir()) == []
    assert runs.run(*_command(source), trap=Trap(FAIL, at=1, only="open", number=errno.ENOSPC)).code == 4
    assert list((root / "parts").iterdir()) == []
    assert _made(runs, source) == PARTS


def test_files_that_are_all_gone_are_missed(runs: Machine, scene: Scene) -> None:
    """Receipts are there, and nobody has what they are of: that does not change by waiting."""
    scene.begin(WAYS["plain"], scene.keep_made(runs, WAYS["plain"]))
    assert scene.staging is not None
    shutil.rmtree(scene.staging / "model")
    _refused(runs.run("finish", scene.plan(), "--out", scene.out, "--json"), "parts-missing")
    assert scene.run(runs, WAYS["plain"]).json()["parts_made"] == 3
    scene.published(WAYS["plain"])


def _again(runs: Machine, source: Path, *more: object) -> Path:
    shutil.rmtree(source.parent / "out")
    return _stopped(runs, source, *more)


@pytest.mark.parametrize("place", ["sampled", "between"])
def test_damage_found_while_finishing(runs: Machine, source: Path, place: str) -> None:
    """`finish` says which part it is and publishes nothing; with it the same run makes the part again."""
    root = _stopped(runs, source)
    plan = source.parent.parent / f"{source.parent.name}.json"
    (source.parent / "mapping.yaml").write_text(
        f"shardmerge: 1\nsources: {{s: {source.name}}}\noutput: {{path: out, shard_size: 600KB}}\n"
        "tensors: {'{rest...}': 's:{rest...}'}\n"
    )
    assert runs.run("plan", source.parent / "mapping.yaml", "--out", plan).code == 0
    (source.parent / "mapping.yaml").unlink()
    _flip(_file(root), 100 if place == "sampled" else _unsampled(_file(root)))
    found = runs.run("finish", plan, "--out", source.parent / "out", "--json", *["--recheck"] * (place == "between"))
    assert found.code == 3, found.err
    assert found.json()["errors"][0]["code"] == "part-differs"
    assert not (source.parent / "out").exists()
    assert (root / "model").is_dir()
    assert _made(runs, source, "--recheck") == 1


def test_parts_that_were_not_synced(runs: Machine, source: Path) -> None:
    """Where they were made they are kept; of another machine, or of one that was started again, all is compared."""
    root = _stopped(runs, source, "--no-sync")
    receipts = [json.loads(path.read_text()) for path in sorted(root.glob("parts/*.json"))]
    assert not any(receipt["synced"] for receipt in receipts)
    _edit(_receipt(root, 2), machine="elsewhere 1234")
    for number in (1, 2, 3):
        _flip(_file(root, number), _unsampled(_file(root, number)))
    _edit(_receipt(root, 3), machine=receipts[3]["machine"].split()[0] + " another-boot")
    ran = runs.run(*_command(source))
    assert ran.json()["parts_made"] == 2  # 2 and 3; that 1 was damaged here, `verify` finds
    verdict = runs.run("verify", source.parent / "out", "--json")
    assert verdict.code == 3
    assert "w1" in verdict.out


def test_what_was_not_synced_is_synced_before_it_is_published(runs: Machine, scene: Scene) -> None:
    way = WAYS["plain"]
    scene.begin(way)
    scene.place.mkdir()
    before = Node.of(scene.root)
    assert scene.run(runs, way, None, "--no-sync").code == 0
    at = claim(runs.calls)
    scene.begin(way)
    scene.place.mkdir()
    assert scene.run(runs, way, Trap(KILL, at=at), "--no-sync").code == -9
    calls = runs.calls
    assert not [call for call in calls if call.name == "fsync"]
    assert scene.run(runs, way).json()["parts_made"] == 0
    names = ("projector/model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    found = list(Disk(scene.root, before, scene.out, names).broken(calls + runs.calls))
    assert [one for one in found if "result" in one] == []


def test_fresh_begins_anew(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    (root / "model" / "left.over").write_bytes(b"")
    assert runs.run(*_command(source)).json()["errors"][0]["hint"] == "start again with --fresh"
    assert _made(runs, source, "--fresh") == PARTS


def test_fresh_is_not_content_with_what_is_published(runs: Machine, source: Path) -> None:
    assert _made(runs, source) == PARTS
    assert _made(runs, source) == 0
    _refused(runs.run(*_command(source, "--fresh")), "output-exists")
    assert _made(runs, source, "--fresh", "--overwrite") == PARTS


def test_fresh_that_is_refused_removes_nothing(runs: Machine, source: Path) -> None:
    root = _stopped(runs, source)
    (source.parent / "out").mkdir()
    (source.parent / "out" / "thesis.tex").write_text("years of work")
    _refused(runs.run(*_command(source, "--fresh")), "output-exists")
    assert len(list(root.glob("parts/*.json"))) == PARTS
    shutil.rmtree(source.parent / "out")
    assert _made(runs, source) == 0


@pytest.mark.parametrize("command", ["run", "finish"])
def test_fresh_is_for_whoever_makes_all(runs: Machine, source: Path, command: str) -> None:
    part = ["--part", "0/2"] if command == "run" else []
    ran = runs.run(command, source.with_name("plan.json"), "--out", source.with_name("out"), *part, "--fresh", "--json")
    assert ran.code == 2
    assert ran.json()["errors"][0]["code"] == "no-effect"
