"""The card of a merge, as huggingface_hub reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import shardmerge
from shardmerge.targets.model_card import CardModel, license_of, model_card
from tests.conftest import GOLDEN

MODELS = GOLDEN / "mergekit" / "models"
MERGE = (
    "shardmerge: 1\nsources: {chat: chat, code: code, idle: base}\noutput: {path: out%s}\n"
    "target: {name: hf/model, text: chat}\ntensors:\n"
    '  "{r...}": {op: slerp, of: ["chat:{r...}", "code:{r...}"], t: 0.5}\n'
)
APACHE = "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\nlicense: none of this\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copytree(MODELS, tmp_path, dirs_exist_ok=True)
    return tmp_path


def card(place: Path, more: str = "", text: str = MERGE) -> ModelCard | None:
    (place / "mapping.yaml").write_text(text.replace("%s", more).replace(", idle: base", ""), "utf-8")
    out = shardmerge.run(place / "mapping.yaml", options=shardmerge.Options(sync=False)).path
    return ModelCard.load(out / "README.md") if (out / "README.md").is_file() else None


def test_a_merge_says_what_it_is(place: Path) -> None:
    for name in ("chat", "code"):
        (place / name / "README.md").write_text(APACHE)
    found = card(place)
    assert found is not None
    data = found.data.to_dict()
    assert data == {"library_name": "transformers", "license": "apache-2.0", "tags": ["merge", "shardmerge"]}
    assert "with `slerp`" in found.text
    assert "| chat | `chat` | apache-2.0 |" in found.text
    assert (place / "mapping.yaml").read_text() in found.text
    assert "# A model" not in found.text  # the card of the base describes the base


def test_licenses_that_differ_are_not_made_one(place: Path) -> None:
    (place / "chat" / "README.md").write_text(APACHE)
    (place / "code" / "README.md").write_text('---\nlicense: other\nlicense_name: "llama3"\n---\n')
    found = card(place)
    assert found is not None
    assert "license" not in found.data.to_dict()
    assert "| code | `code` | other, llama3 |" in found.text
    assert "The licenses differ" in found.text


def test_models_of_the_hub_are_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = place / "hub" / "models--org--chat"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    shutil.move(place / "chat", snapshot / "snapshots" / "abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    found = card(place, text=MERGE.replace("{chat: chat", "{chat: org/chat@main"))
    assert found is not None
    data = found.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (["org/chat"], "merge")
    assert "[org/chat](https://huggingface.co/org/chat)" in found.text


@pytest.mark.parametrize("more", [", card: false", ", files: none", ", files: {exclude: [README.md]}"])
def test_a_card_that_is_not_wanted(more: str, place: Path) -> None:
    assert card(place, more) is None


def test_what_is_no_merge_keeps_its_own_card(place: Path) -> None:
    (place / "chat" / "README.md").write_text(APACHE)
    plain = MERGE[: MERGE.index('  "{r...}"')].replace(", code: code", "") + '  "{r...}": "chat:{r...}"\n'
    kept = card(place, text=plain)
    assert kept is not None
    assert "# A model" in kept.text
    shutil.rmtree(place / "out")
    asked = card(place, ", card: true", plain)
    assert asked is not None
    assert "from layers of several models" in asked.text


def test_hostile_cards_say_nothing() -> None:
    assert license_of(b"license: mit\n") == {}  # no metadata
    assert license_of(b"---\nlicense: [a, b]\nlicense_link: x y\n---\n") == {}
    assert license_of(b"---\r\nlicense: mit\r\n---\r\n") == {"license": "mit"}
    assert license_of(b"\xff---\nlicense: mit\n---\n") == {}
    made = model_card([CardModel("a", "x`|\ny", "", {})], [], "text: |\n  ````\n").decode()
    assert "| a | `x \\| y` | not stated |" in made
    assert "`````yaml" in made
