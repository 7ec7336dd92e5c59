"""The tables of architectures against transformers: what its own classes save, in each of three versions."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.errors import ShardmergeError
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.known_models import known_model
from shardmerge.targets.settings import ANY_MODEL, not_understood
from shardmerge.targets.tables import every_table, find_table
from shardmerge.tensors import Shape
from tests.architecture_cases import CASES
from tests.load_environments import VERSIONS, interpreter, ready

pytestmark = pytest.mark.load

_SCRIPT = Path(__file__).with_name("architecture_cases.py")
# Its classes are in no version of transformers; tests/golden/make/make_internlm2.py ran them.
OWN_CODE = "internlm2"
_GOLDEN = Path(__file__).parent / "golden" / "architectures" / "internlm2.json"
SAVED = (*VERSIONS, OWN_CODE)
# What a version lacks or refuses, by class and number of the case. Every other one it saves.
_LACKS = {
    "4.51.3": {
        "InternVLVisionModel 0", "InternVLVisionModel 1", "InternVLVisionModel 2", "InternVLForConditionalGeneration 0",
        "InternVLForConditionalGeneration 1", "Gemma3TextForSequenceClassification 0", "DeepseekV3ForCausalLM 2",
        "DeepseekV3ForSequenceClassification 0", "DeepseekV3ForTokenClassification 0",
    },
    "4.57.1": set(),
    "5.23.0": {"MistralForCausalLM 3"},
    OWN_CODE: set(),
}  # fmt: skip


@cache
def kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


@cache
def made(version: str) -> dict[str, Any]:
    """Returns what a version saves, asked once; a model of each text family is kept."""
    if version == OWN_CODE:
        saved: dict[str, Any] = json.loads(_GOLDEN.read_text("utf-8"))
        return saved
    if not ready(version):
        pytest.skip(f"transformers {version} is not installed: `make test` builds its environment")
    folder = Path(kept().name, version)
    folder.mkdir()
    return asked(version, "save", folder)


def asked(version: str, verb: str, folder: Path) -> dict[str, Any]:
    command = [interpreter(version), "-I", _SCRIPT, verb, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cases(version: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields the class, the number of the case, and what was saved."""
    yield from ((kind, number, held) for kind, number, held in made(version)["cases"] if held)


def shapes(tensors: dict[str, list[int]]) -> dict[str, Shape]:
    return {name: tuple(shape) for name, shape in tensors.items()}


@pytest.mark.parametrize("version", SAVED)
def test_names_and_shapes_are_those_of_the_files(version: str) -> None:
    for kind, number, held in cases(version):
        model, files = read_architecture(held["config"], "config.json"), shapes(held["files"])
        bare = {name.removeprefix(model.table.prefix): shape for name, shape in model.tensors(kind).items()}
        known = known_model(held["config"], files, "config.json")
        assert known is not None, kind
        assert {known.canonical(name): shape for name, shape in files.items()} == known.tensors, (kind, number)
        if not model.table.renames:
            assert files in (model.tensors(kind), bare), (kind, number)


@pytest.mark.parametrize("version", VERSIONS)
def test_names_in_memory_are_known_too(version: str) -> None:
    """A training saves what a model has in memory: 5.x stacks experts there, and renames DINOv2."""
    for kind, _, held in cases(version):
        memory = shapes(held["memory"])
        known = known_model(held["config"], memory, "config.json")
        assert known is not None, kind
        named = {known.canonical(name): shape for name, shape in memory.items()}
        assert known.tensors.items() <= named.items() <= {**known.optional, **known.tensors}.items(), kind


@pytest.mark.parametrize("version", SAVED)
def test_every_class_of_every_table_was_saved(version: str) -> None:
    saved = {f"{kind} {number}": held for kind, number, held in made(version)["cases"]}
    assert {name for name, held in saved.items() if not held} == _LACKS[version]
    tables = [table for table in every_table() if (table.model_type == OWN_CODE) == (version == OWN_CODE)]
    assert {name.split()[0] for name in saved} == {kind for table in tables for kind in table.classes}
    assert version == OWN_CODE or set(CASES) == {table.model_type for table in tables}


@pytest.mark.parametrize("version", SAVED)
def test_fields_and_defaults_are_those_of_the_configuration_class(version: str) -> None:
    for model_type, stated in made(version)["defaults"].items():
        table = find_table(model_type)
        assert table is not None
        if stated is None or table.parts:
            continue
        values = read_architecture({"model_type": model_type}, "config.json").values
        for key, value in stated.items():
            if table.fields.get(key) is not None and value is not None:  # null: another name of a field
                side = value[0] if isinstance(value, list) and key in table.square else value
                assert values[key] == (tuple(side) if isinstance(side, list) else side), (model_type, key)
        theta = stated.get("rope_theta", (stated.get("rope_parameters") or {}).get("rope_theta"))
        assert theta in (None, table.rope_theta), model_type


@pytest.mark.parametrize("version", SAVED)
def test_every_field_that_a_config_has_is_understood(version: str) -> None:
    for kind, number, held in cases(version):
        config = held["config"]
        table = find_table(config["model_type"])
        assert table is not None
        understood = {*table.fields, *table.other_fields, *table.parts}
        assert not_understood(config, (*ANY_MODEL, *understood)) == {}, (kind, number)


# ---- hf/text


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hf/text`` makes of a model of each text family, of the oldest version and of the newest."""
    top = tmp_path_factory.mktemp("written")
    for version in (VERSIONS[0], VERSIONS[-1]):
        made(version)
        for source in sorted(Path(kept().name, version).iterdir()):
            mapping = top / "mapping.yaml"
            mapping.write_text(
                f"shardmerge: 1\nsources: {{a: {source}}}\noutput: {source.name}-{version}\n"
                'target: {name: hf/text, text: a}\ntensors: {"{rest...}": "a:{rest...}"}\n'
            )
            out = sm.run(mapping, options=sm.Options(sync=False)).path
            shutil.copy(source / "logits.st", out / "logits.st")
    mapping.unlink()
    return top


@pytest.mark.parametrize("version", VERSIONS)
def test_hf_text_writes_what_every_version_loads_with_the_same_logits(version: str, written: Path) -> None:
    """5.x saves rope, layer types and numbers of experts under names that 4.x does not read."""
    found = asked(version, "load", written)
    assert len(found) == 2 * len([table for table in every_table() if table.kind == "text" and not table.own_code])
    odd = {name: result for name, result in found.items() if result[0] != [[], [], []] or not result[1] < 1e-5}
    assert odd == {}


def test_layers_that_no_version_loads_may_be_there(tmp_path: Path) -> None:
    """DeepSeek-V3 has its layers for multi-token prediction in the files; on loading they are ignored."""
    made(VERSIONS[-1])
    source = tmp_path / "source"
    shutil.copytree(Path(kept().name, VERSIONS[-1], "deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    more = {name.replace("layers.2.", "layers.3."): one.clone() for name, one in tensors.items() if "layers.2." in name}
    more["model.layers.3.eh_proj.weight"] = torch.ones(24, 48)
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    out = sm.convert(source, tmp_path / "out", options=sm.Options(sync=False))
    assert load_file(out.path / "model.safetensors").keys() == tensors.keys() | more.keys()
    assert any("layers.3." in warning for warning in out.plan.warnings)
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {a: source}\noutput: text\ntarget: {name: hf/text, text: a}\n"
        'tensors: {"{rest...}": "a:{rest...}"}\n'
    )
    text = sm.run(tmp_path / "mapping.yaml", options=sm.Options(sync=False)).path
    assert load_file(text / "model.safetensors").keys() == tensors.keys()
    config = json.loads((source / "config.json").read_text("utf-8")) | {"num_nextn_predict_layers": 0}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ShardmergeError) as refused:
        sm.convert(source, tmp_path / "other", options=sm.Options(sync=False))
    assert refused.value.code == "config-disagrees"
