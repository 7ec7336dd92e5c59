"""Renames between generations of transformers: the table against what three versions call real models' tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from shardmerge.errors import MappingError
from shardmerge.mapping.generations import generations, names_of, renamings
from tests.load_environments import VERSIONS, interpreter, ready
from tests.model_generations import MODELS

pytestmark = pytest.mark.load

SCRIPT = Path(__file__).with_name("model_generations.py")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All models, built by the oldest version that has them and loaded by the others; by version."""
    home = tmp_path_factory.mktemp("generations")
    older: list[Path] = []
    for version in VERSIONS:
        if not ready(version):
            pytest.skip(f"transformers {version} could not be installed: `python tests/load_environments.py` says why")
        command = [interpreter(version), "-W", "ignore", SCRIPT, "--out", home / version, "--from", *older]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        older.append(home / version)
    return dict(zip(VERSIONS, older, strict=True))


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118  # it has no __iter__


@pytest.mark.parametrize("case", MODELS)
def test_a_file_is_renamed_to_what_each_version_has_in_memory(saved: dict[str, Path], case: str) -> None:
    """By bytes: of all renamings of a tensor in the file, one leads to the name in memory."""
    home = next(folder / case for folder in saved.values() if (folder / case).is_dir())
    pairs = renamings(json.loads((home / "config.json").read_text()))
    on_disk = {value: name for name, value in tensors(home / "model.safetensors").items()}
    for version, folder in saved.items():
        if not (folder / case).is_dir():
            continue
        for name, value in tensors(folder / case / "memory.safetensors").items():
            if value in on_disk and on_disk[value] != name:
                made = {new.format(found) for old, new in pairs if (found := old.match(on_disk[value])) is not None}
                assert name in made, (version, on_disk[value])


def test_generations_are_the_versions_that_renamed_something() -> None:
    assert generations() == ("4.51", "4.52", "5.0", "5.6")


def test_a_model_that_was_renamed_in_ways_not_known_is_refused() -> None:
    """Dinov2 in a LLaVA: 5.x renames inside of it, and no table here says how."""
    with pytest.raises(MappingError) as caught:
        names_of({"model_type": "llava", "vision_config": {"model_type": "dinov2"}}, "config.json")
    assert caught.value.code == "unknown-renames"
    assert renamings({"model_type": "dinov2"}) == ()


def test_names_that_never_changed_are_kept_whatever_they_are() -> None:
    names = names_of({"model_type": "gpt2"})
    assert set(names.templates(names.generation("5.6")).values()) == {"{rest...}"}


def test_the_table_is_read_without_transformers() -> None:
    code = (
        "from shardmerge.mapping.generations import *; generations(); import sys; print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
