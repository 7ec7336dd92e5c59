"""Errors show the line of the mapping that they are about, and the pages show them as they are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardmerge.cli.snippets import error_lines, snippet
from shardmerge.errors import MappingError
from tests.conftest import shardmerge

DOCS = Path(__file__).parent.parent / "docs"
HEAD = "shardmerge: 1\nsources: {trained: models/fused, other: models/other}\noutput: out\n"
SPLIT = '  "q.{i}": {op: split, of: "trained:layers.{i:int}.qkv.weight", sizes: '
MISTAKES = [
    'tensors:\n  "q.{i}": {op: spilt, of: "trained:layers.{i:int}.qkv.weight", sizes: [16, 8, 8], take: 0}\n',
    f"tensors:\n{SPLIT}[16, 16, 16], take: 0}}\n",
    f"tensors:\n{SPLIT}[trained.config.hidden_sise, 8, 8], take: 0}}\n",
    f"tensors:\n{SPLIT}[16, 8, 8], take: 3}}\n",
    f"let: {{half: 4 **}}\ntensors:\n{SPLIT}[half, 8, 8], take: 0}}\n",
    'tensors:\n  "q.{i}": {op: concat, of: ["trained:layers.{i:int}.qkv.weight", "other:layers.0.qkv.bias"]}\n',
    'tensors:\n  "shard.{r:02}.embed.weight": {op: chunk, of: "other:embed.weight", chunks: 8, take: 0}\n',
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    tensors = {
        "fused": {f"layers.{i}.qkv.weight": torch.zeros(32, 16) for i in range(2)},
        "other": {"embed.weight": torch.zeros(8, 2)},
    }
    for name, some in tensors.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        save_file(some, tmp_path / "models" / name / "model.safetensors")
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(sizes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown_errors(page: str, heading: str) -> list[str]:
    """Returns the errors that a section of a page shows, each with its lines."""
    text = (DOCS / page).read_text("utf-8")
    section = text[text.index(heading) :]
    return re.findall(r"^```\n(error: .+?)^```$", section, re.DOTALL | re.MULTILINE)


def test_the_guide_shows_mistakes_as_they_are_printed(folder: Path) -> None:
    shown = shown_errors("guides/mapping-language.md", "## Typical mistakes")
    assert len(shown) == len(MISTAKES)
    for text, block in zip(MISTAKES, shown, strict=True):
        (folder / "a.yaml").write_text(HEAD + text)
        assert block in shardmerge("plan", "a.yaml", code=1).stderr


def test_the_reference_shows_mistakes_as_they_are_printed(folder: Path) -> None:
    texts = [
        f"{HEAD[:-12]}output:\n  path: out\n  # half the size\n\n  dtpye: bfloat16\n",
        f"{HEAD}\ntensors:\n  {{rest...}}: src:{{rest...}}\n",
        f'{HEAD}\ntensors:\n  "{{rest...}}": [trained:module.{{rest...}}]\n',
    ]
    for text, block in zip(texts, shown_errors("reference/mapping.md", "# "), strict=True):
        (folder / "mapping.yaml").write_text(text)
        assert block in shardmerge("plan", "mapping.yaml", code=1).stderr


@pytest.mark.parametrize(
    ("line", "column", "carets"),
    [
        ("dtpye: bfloat16", 1, "^^^^^"),
        ("x: {op: spilt, of: y}", 9, "        ^^^^^"),
        ("x: {op: spilt, of: y}", 4, "   ^"),
        ("'a b': 'c d' # no", 8, "       ^^^^^"),
        ('"a\\"b": 1', 1, "^^^^^^"),
        ("x: a:b.c", 4, "   ^^^^^"),
        ("x: y", 4, "   ^"),
        ("{half: 4 ** }", 8, "       ^^^^"),
        ("{half: 4 **, b: 1}", 8, "       ^^^^"),
        ("llm.{i}.{rest...}: src:a.{i}  # why", 1, "^" * 17),
        ("llm.{i}.{rest...}: src:a.{i}  # why", 20, " " * 19 + "^" * 9),
    ],
)
def test_what_the_caret_is_under(line: str, column: int, carets: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"first: 1\n{line}\n")
    assert snippet(f"{path}:2:{column}") == ["    |", f"  2 | {line}", f"    | {carets}"]


def test_a_long_line_is_cut_around_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a" * 200 + " here: " + "b" * 200 + "\n" * 9 + "x: 1\n")
    _, text, carets = snippet(f"{path}:1:202")
    assert len(text) < 100
    assert text[carets.index("^") :].startswith("here: ")
    assert carets.endswith(" ^^^^")
    assert snippet(f"{path}:10:1") == ["     |", "  10 | x: 1", "     | ^"]


@pytest.mark.parametrize("place", ["7:1", "1:99", "1:0", "0:1", "1", ""])
def test_a_place_that_is_not_there_shows_nothing(place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("x: 1\n")
    assert snippet(f"{path}:{place}") == []
    assert snippet(f"{tmp_path}/none.yaml:1:1") == snippet(f"{tmp_path}:1:1") == []


def test_control_characters_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"x: \x1b[31mred\xff\n")
    assert snippet(f"{path}:1:1")[1] == "  1 | x:  [31mred\ufffd"


def test_the_line_stands_below_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("x: 1\n")
    error = MappingError("bad", "it is bad", where=f"{path}:1:4", hint="mend it")
    assert error_lines(error) == [
        "it is bad [bad]", f"  at: {path}:1:4", "    |", "  1 | x: 1", "    |    ^", "  hint: mend it",
    ]  # fmt: skip
