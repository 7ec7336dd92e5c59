"""Every answer of `--json` is one JSON object with a schema number, an error too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import shardmerge


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {s: model.safetensors}\noutput: {path: out}\ntensors: {a: s:a}\n"
    )
    return tmp_path


ANSWERS = [
    ("run", "mapping.yaml"), ("plan", "mapping.yaml"), ("explain", "mapping.yaml", "--tensor", "a"),
    ("convert", "model.safetensors", "other"), ("convert", "model.safetensors", "other", "--dry-run"),
    ("inspect", "model.safetensors"), ("diff", "model.safetensors", "model.safetensors"), ("presets", "list"),
]  # fmt: skip


@pytest.mark.parametrize("command", ANSWERS, ids=" ".join)
def test_an_answer_has_a_schema(model: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert json.loads(shardmerge(*command, "--json").stdout)["schema"] == 1


def test_a_verdict_has_one(model: Path) -> None:
    shardmerge("convert", model / "model.safetensors", model / "out", "-q")
    found = json.loads(shardmerge("verify", model / "out", "--json").stdout)
    assert (found["schema"], found["ok"]) == (1, True)


ERRORS = [
    (2, "missing-path", ("inspect", "nothing.safetensors")),
    (2, "bad-usage", ("inspect",)),
    (2, "bad-usage", ("inspect", "a", "--nonsense")),
    (1, "output-exists", ("convert", "model.safetensors", ".")),
    (3, "reference-differs", ("verify", "out", "--reference", "different.safetensors")),
]


@pytest.mark.parametrize(("exit_code", "code", "command"), ERRORS, ids=[f"{e}-{c}" for e, c, _ in ERRORS])
def test_an_error_is_json_too(
    model: Path, exit_code: int, code: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    if command[0] == "verify":
        shardmerge("convert", "model.safetensors", "out", "-q")
        save_file({"a": np.zeros(4, np.float32)}, "different.safetensors")
    done = shardmerge(*command, "--json", code=exit_code)
    found = json.loads(done.stdout)
    assert (found["schema"], found["ok"], found["exit_code"]) == (1, False, exit_code)
    (error,) = found["errors"]
    assert error["code"] in (code, "output-is-source")
    assert error["what"]
    assert error["what"] in done.stderr.replace("Error: ", "")
    assert shardmerge(*command, code=exit_code).stdout == ""


def test_all_problems_of_a_stage_are_told(model: Path) -> None:
    (model / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {s: model.safetensors}\noutput: {path: out}\ntensors: {b: s:b, c: s:c}\n"
    )
    done = shardmerge("plan", model / "mapping.yaml", "--json", code=1)
    found = json.loads(done.stdout)["errors"]
    assert [error["code"] for error in found].count("rule-matches-nothing") == 2
    assert all(error["hint"] in done.stderr for error in found)


def test_what_the_system_refuses_is_no_bug_of_ours(model: Path) -> None:
    (model / "folder.yaml").mkdir()
    done = shardmerge("plan", model / "folder.yaml", "--json", code=2)
    assert json.loads(done.stdout)["errors"][0]["code"]


def test_a_place_in_a_mapping_has_line_column_and_snippet(model: Path) -> None:
    text = "shardmerge: 1\nsources: {s: model.safetensors, vison: b}\noutput: {path: out}\nuse: hf/nothing\n"
    (model / "mapping.yaml").write_text(text + "unknown: 1\n")
    found = json.loads(shardmerge("plan", model / "mapping.yaml", "--json", code=1).stdout)["errors"]
    (error,) = found
    assert (error["code"], error["line"], error["column"]) == ("unknown-key", 5, 1)
    assert error["snippet"] == "unknown: 1"
    assert error["where"] == f"{model / 'mapping.yaml'}:5:1"


def test_a_place_that_is_a_file_has_no_line(model: Path) -> None:
    (error,) = json.loads(shardmerge("inspect", model / "gone", "--json", code=2).stdout)["errors"]
    assert "line" not in error


def test_a_source_that_nothing_uses_is_shown_at_its_name(model: Path) -> None:
    text = (
        "shardmerge: 1\nuse: peft/merge\nsources: {base: model.safetensors, adaptr: model.safetensors}\noutput: out\n"
    )
    (model / "mapping.yaml").write_text(text)
    done = shardmerge("plan", model / "mapping.yaml", "--json", code=1)
    found = json.loads(done.stdout)["errors"]
    (error,) = [one for one in found if one["what"] == "nothing uses the source `adaptr`"]
    assert error["snippet"][error["column"] - 1 :].startswith("adaptr:")
    assert f"  3 | {error['snippet']}\n    | {' ' * (error['column'] - 1)}^^^^^^\n" in done.stderr
