"""The README: its code runs, its mapping is one, its commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.recordings import lay_out
from shardmerge.mapping.preset_files import load_preset, with_preset
from shardmerge.mapping.reader import load_spec
from tests.test_docs import COMMANDS, ROOT, options

README = (ROOT / "README.md").read_text("utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(found)


def test_its_python_runs(tmp_path: Path) -> None:
    lay_out(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("[[")
    assert (tmp_path / "out" / "llava" / "model.safetensors").is_file()


def test_its_mapping_is_one(tmp_path: Path) -> None:
    (tmp_path / "mapping.yaml").write_text(block("yaml"), "utf-8")
    spec = load_spec(tmp_path / "mapping.yaml")
    assert with_preset(spec, load_preset(spec.use)).rules


def test_its_commands_and_options_exist() -> None:
    found = re.findall(r"shardmerge (\w+)((?: [^#&|\n]*)?)", " \n".join(re.findall(r"^\$ (.*)$", README, re.MULTILINE)))
    assert len(found) >= 4
    for name, rest in found:
        assert {word for word in rest.split() if word.startswith("-")} <= options(COMMANDS[name])


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))
def test_its_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).is_file()


def test_it_is_one_screen() -> None:
    assert len(README.splitlines()) <= 85
