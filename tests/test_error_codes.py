"""Every error code has an explanation, which a command and a page show."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardmerge import errors
from shardmerge.cli.error_codes import error_codes
from tests.conftest import shardmerge
from tests.raised_codes import raised

GROUPS: dict[str, set[type[errors.ShardmergeError]]] = {
    "checkpoint": {errors.CheckpointError, errors.UnreadableError},
    "mapping": {errors.MappingError},
    "target": {errors.TargetError},
    "adapter": {errors.MappingError, errors.TargetError},
    "output": {errors.OutputError, errors.PublishedError},
    "usage": {errors.UsageError},
    "verification": {errors.VerificationError},
    "resource": {
        errors.ResourceError, errors.InterruptedRunError, errors.RefusedError, errors.ShardmergeError
    },
}  # fmt: skip


def test_every_code_of_the_source_is_found() -> None:
    assert raised().unresolved == []


def test_the_explanations_are_those_of_the_codes_that_are_raised() -> None:
    assert set(error_codes()) == set(raised().classes)


def test_the_group_of_a_code_is_that_of_its_errors() -> None:
    classes = raised().classes
    assert {one.group for one in error_codes().values()} == set(GROUPS)
    assert [one.code for one in error_codes().values() if not GROUPS[one.group] & classes[one.code]] == []


@pytest.mark.parametrize("part", ["about", "do"])
def test_an_explanation_is_whole_sentences(part: str) -> None:
    texts = [getattr(one, part) for one in error_codes().values()]
    assert [text for text in texts if not re.fullmatch(r"\S.{5,230}[.`]", text)] == []
    assert [text for text in texts if re.search(r"\bnobody\b|\bspeaks? of\b", text)] == []


def test_a_code_is_explained() -> None:
    one = error_codes()["missing-rank"]
    shown = " ".join(shardmerge("errors", "missing-rank").stdout.split())
    assert shown == f"missing-rank (checkpoint) {one.about} {one.do}"
    assert shardmerge("errors", "[missing-rank]").stdout == shardmerge("errors", "missing-rank").stdout


def test_all_codes_are_listed() -> None:
    shown = shardmerge("errors").stdout
    assert re.findall(r"^  ([a-z0-9-]+)  ", shown, re.MULTILINE) == list(error_codes())
    assert re.findall(r"^(\w+)$", shown, re.MULTILINE) == list(GROUPS)
    assert max(map(len, shown.splitlines())) <= 80


def test_an_unknown_code_names_its_neighbour() -> None:
    done = shardmerge("errors", "missing-rnk", code=2)
    assert "[unknown-code]" in done.stderr
    near = re.search("did you mean `(.+)`", done.stderr)
    assert near
    assert shardmerge("errors", near[1]).stdout.startswith("missing-rank ")
    assert "hint: `shardmerge errors` lists all codes" in shardmerge("errors", "xyzzy", code=2).stderr


def test_codes_as_json() -> None:
    found = json.loads(shardmerge("errors", "--json").stdout)
    assert found["schema"] == 1
    assert [one["code"] for one in found["codes"]] == list(error_codes())
    (one,) = json.loads(shardmerge("errors", "disk-full", "--json").stdout)["codes"]
    assert (one["group"], one["about"]) == ("resource", error_codes()["disk-full"].about)


def in_a_terminal(*arguments: str) -> str:
    """What a command writes to stderr where that is a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shardmerge", *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    return shown


def test_a_terminal_names_the_command_that_explains(tmp_path: Path) -> None:
    gone, last = str(tmp_path / "gone"), "\nexplain: shardmerge errors missing-path\n"
    assert in_a_terminal("inspect", gone).endswith(last)
    assert "explain:" not in in_a_terminal("inspect", gone, "-q")
    assert "explain:" not in shardmerge("inspect", gone, code=2).stderr


def test_several_errors_name_it_once(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("shardmerge: 1\nsourcs: {s: a}\ntensors: {a: t:a}\n")
    shown = in_a_terminal("plan", str(tmp_path / "m.yaml"))
    codes = list(dict.fromkeys(re.findall(r"\[([a-z-]+)\]$", shown, re.MULTILINE)))
    assert len(codes) > 1
    assert shown.count("explain: ") == 1
    assert shown.endswith(f"explain: shardmerge errors CODE, for CODE in {', '.join(codes)}\n")
