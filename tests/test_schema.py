"""The JSON Schema, asked by the jsonschema package: it takes what the reader takes, and refuses what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

import shardmerge as sm
from shardmerge import api
from shardmerge.mapping import preset_files, spec
from shardmerge.mapping.preset_files import list_presets, read_preset
from shardmerge.mapping.reader import parse_spec
from shardmerge.ops.registry import OPS
from shardmerge.targets.registry import TARGETS
from tests.conftest import shardmerge

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
MAPPING = jsonschema.Draft202012Validator(api.schema())
PRESET = jsonschema.Draft202012Validator(api.schema(preset=True))


def complaints(text: str, validator=MAPPING) -> list[str]:
    found = sorted(validator.iter_errors(yaml.safe_load(text)), key=str)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


def test_they_are_schemas() -> None:
    for validator in (MAPPING, PRESET):
        jsonschema.Draft202012Validator.check_schema(validator.schema)


@pytest.mark.parametrize("name", list_presets())
def test_presets(name: str) -> None:
    assert complaints(read_preset(name), PRESET) == []


MAPPINGS = [path for path in (ROOT / "docs").rglob("*.yaml") if path.parent.name != "architectures"]


@pytest.mark.parametrize("path", sorted(MAPPINGS), ids=lambda path: path.name)
def test_examples(path: Path) -> None:
    assert complaints(path.read_text("utf-8")) == []


HEAD = "shardmerge: 1\nsources: {a: x.pth, b: {path: y, required: false}}\n"


@pytest.mark.parametrize("name", OPS)
def test_the_examples_of_ops(name: str) -> None:
    rules = "".join(f"  {line}\n" for line in OPS[name].example.replace("src:", "a:").splitlines())
    assert complaints(f"{HEAD}tensors:\n{rules}") == []


GOOD = [
    "use: xtuner/llava-to-hf",
    "tensors: {x: a:x}",
    'tensors: {x: ["a:x", "b:x"]}',
    "use: xtuner/llava-to-hf\noutput: out",
    "tensors: {x: a:x}\noutput: {path: out, dtype: bf16, shard_size: 5GB, format: bin, keep: [x], dtypes: {y: fp32}}",
    "tensors: {x: a:x}\noutput: {path: out, format: dcp, root: app.model}",
    'tensors: {x: a:x}\noutput: {path: out, format: dcp, root: ""}',
    'tensors: {x: {op: split, of: "a:x", sizes: [n, 2 * n, 3], take: 0}}\nlet: {n: 4}',
    'tensors: {x: {op: split, of: "a:x", sizes: 4, take: 0}}',
    'tensors: {x: {op: concat, of: "a:x.{e*}", dim: 1}}',
    'tensors: {x: {op: concat, of: ["a:x", {op: transpose, of: "b:x"}]}}',
    'tensors: {"x.{r}": {op: chunk, of: "a:x", chunks: 2, take: r, for: {r: 2}}}',
    "tensors: {x: {op: fill, shape: [2], value: 0.5}}",
    "tensors: {x: a:x}\ndrop: [a:y, 'b:{rest...}']",
    "tensors: {x: a:x}\ntarget: hf/llama",
    "tensors: {x: a:x}\ntarget: {name: hf/llama, text: a}",
    "tensors: {x: a:x}\nadapters: [{from: a, onto: b, r: 8, alpha: 16, rslora: true}]",
    "tensors: {x: a:x}\nvocabulary: {rows: 128320, new: normal, seed: 3, tokens: [<image>], pad: <pad>, trim: true}",
    "tensors: {1: a:2}",
]

BAD = [
    "output: out",  # neither rules nor a preset
    "tensors: {x: a:x}\nsuorces: {}",
    "tensors: [a:x]",
    "tensors: {x: x}",
    "tensors: {x: A:x}",
    "tensors: {x: []}",
    "tensors: {x: [[a:x]]}",
    "tensors: {x: {of: a:x}}",
    "tensors: {x: {op: splitt, of: a:x}}",
    "tensors: {x: {op: transpose}}",
    "tensors: {x: {op: transpose, of: [a:x, b:x]}}",
    "tensors: {x: {op: transpose, of: a:x, dims: 1}}",
    "tensors: {x: {op: split, of: a:x, take: 0}}",
    "tensors: {x: {op: concat, of: [x, b:x]}}",
    "tensors: {x: a:x}\noutput: {dtype: bf16}",
    "tensors: {x: a:x}\noutput: {path: out, format: npz}",
    "tensors: {x: a:x}\noutput: {path: out, dtpye: bf16}",
    "tensors: {x: a:x}\nlet: {a-b: 1}",
    "tensors: {x: a:x}\nlet: [1]",
    "tensors: {x: a:x}\ndrop: a:y",
    "tensors: {x: a:x}\ndrop: [y]",
    "tensors: {x: a:x}\ntarget: {text: a}",
    "tensors: {x: a:x}\nadapters: [{from: a}]",
    "tensors: {x: a:x}\nadapters: [{from: a, onto: b, rank: 3}]",
    "tensors: {x: a:x}\nvocabulary: {rows: many}",
    "tensors: {x: a:x}\nvocabulary: {new: random}",
    "tensors: {x: a:x}\nvocabulary: {trim: maybe}",
]

WHOLE = [
    ("shardmerge: 1\ntensors: {x: a:x}\n", False),
    ("sources: {a: x}\ntensors: {x: a:x}\n", False),
    ("shardmerge: 2\nsources: {a: x}\ntensors: {x: a:x}\n", False),
    ("shardmerge: '1'\nsources: {a: x}\ntensors: {x: a:x}\n", True),
    ("shardmerge: 1\nsources: {A: x}\ntensors: {x: a:x}\n", False),
    ("shardmerge: 1\nsources: {a: {required: true}}\ntensors: {x: a:x}\n", False),
    ("shardmerge: 1\nsources: {a: {path: x, view: fp16}}\ntensors: {x: a:x}\n", False),
    ("shardmerge: 1\nsources: {a: {path: x, required: maybe}}\ntensors: {x: a:x}\n", False),
    ("shardmerge: 1\nsources: {a: {path: x, view: module, root: model, strip: m.}}\ntensors: {x: a:x}\n", True),
    ("shardmerge: 1\nsources: {a: }\ntensors: {x: a:x}\n", False),
]

SNIPPETS = [(HEAD + text + "\n", True) for text in GOOD] + [(HEAD + text + "\n", False) for text in BAD] + WHOLE


@pytest.mark.parametrize(("text", "good"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_reader_and_the_schema_agree(text: str, good: bool) -> None:
    try:
        parse_spec(text, "m.yaml")
        read = ""
    except sm.ShardmergeError as error:
        read = str(error)
    assert (not read) == good, read
    assert (not complaints(text)) == good, complaints(text)


def test_every_key_of_the_reader_is_there() -> None:
    schema = api.schema()
    assert set(schema["properties"]) == set(spec.KEYS)
    assert set(api.schema(preset=True)["properties"]) == set(preset_files.KEYS)
    assert {f"op-{name}" for name in OPS} <= set(schema["$defs"])
    for target in TARGETS.values():
        text = f"shardmerge: 1\nsources: {{a: x}}\ntensors: {{x: a:x}}\ntarget: {{name: {target.name}"
        for key in (*target.roles, *target.options):
            assert complaints(f"{text}, {key}: a}}\n") == []
        assert complaints(f"{text}, no-such-role: a}}\n") != []


@pytest.mark.parametrize("name", ["mapping", "preset"])
def test_the_copy_beside_the_docs_is_current(name: str) -> None:
    copy = json.loads((REFERENCE / f"{name}.schema.json").read_text("utf-8"))
    assert copy == api.schema(preset=name == "preset"), "run `python docs/write_schema.py`"


def test_on_the_command_line() -> None:
    assert json.loads(shardmerge("schema").stdout) == api.schema()
    assert json.loads(shardmerge("schema", "--preset").stdout) == api.schema(preset=True)
