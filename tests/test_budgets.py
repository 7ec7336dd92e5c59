"""Each budget of a reader: a small sound file is read, and refused once the budget is less than what it needs.

``python -m tests.test_budgets`` takes the budgets out of the code, one after the other, and says which tests then fail.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from shardmerge.errors import ShardmergeError
from shardmerge.formulas import Formula
from shardmerge.mapping.dropping import find_dropped
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.resolve import resolve
from shardmerge.sources.pickle_vm import interpret
from shardmerge.sources.state_dict import state_dict
from shardmerge.targets.config_numbers import layers, load_object, parsed_object
from shardmerge.targets.name_expressions import compiled
from shardmerge.tensors import Extent
from tests.attacks import exhausting, seeds
from tests.attacks.hostile_zips import build, changed
from tests.fuzz import targets


def _names(data: bytes) -> None:
    state_dict(interpret(data, where="file"))


def _pickle(data: bytes) -> None:
    interpret(data, where="file")


def _framed(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    return lambda data: read(b"\0" + data)


def _json(data: bytes) -> None:
    parsed_object(data, "config.json")


def _side_file(data: bytes) -> None:
    load_object(Extent("config.json", 0, len(data)), lambda extent: data)


def _layers(data: bytes) -> None:
    layers(parsed_object(data, "config.json"), 1, "config.json")


def _tokenizer(data: bytes) -> None:
    targets.TARGETS["tokenizer"].read(b"\0" + data)


def _formula(data: bytes) -> None:
    Formula.parse(data.decode()).value(lambda name: None)


def _expression(data: bytes) -> None:
    compiled.cache_clear()
    compiled(data.decode())


def _mapping(data: bytes) -> None:
    spec = parse_spec(data.decode(), "mapping.yaml")
    catalogs = {name: targets.known_catalogs()["s"] for name in spec.sources}
    resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, user_file="mapping.yaml")


_ZIP = _framed(targets.TARGETS["zip"].read)
_HEADER = _framed(targets.TARGETS["safetensors"].read)
_INDEX = _framed(targets.TARGETS["index"].read)
_DCP = _framed(targets.TARGETS["dcp"].read)
_METADATA = (Path(targets.__file__).parent / "seeds" / "dcp" / "two-tensors").read_bytes()
_WEIGHT_MAP = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
_COUNTED = (
    b"shardmerge: 1\nsources: {s: m}\noutput: {path: out}\ndrop: ['s:w', 's:layers.{x...}']\ntensors:\n"
    b'  "w{r}": {op: slice, of: "s:e.weight", dim: 0, start: "r * 4", stop: "r * 4 + 4", for: {r: 2}}\n'
)
_BLANK = seeds.PICKLE[:-1] + b"K\1X\0\x20\0\0" + b" " * 8192 + b"s."  # beside the tensor a text that deflates well
_TOKENS = b'{"added_tokens": [], "model": {"vocab": {"a": 0}}}'


@dataclass(frozen=True)
class Budget:
    """A constant of a module, one that is too small for the data, and the code of the refusal."""

    module: str
    name: str
    less: int
    read: Callable[[bytes], object]
    data: bytes
    code: str
    about: str = ""

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}{self.about}"


BUDGETS = [
    Budget("sources.pickle_machine", "MOST_OPCODES", 5, _pickle, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.pickle_machine", "_MOST_OPEN_MARKS", 0, _pickle, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.pickle_machine", "_LONGEST_NAME", 3, _pickle, seeds.PICKLE, "damaged-pickle"),
    Budget("sources.pickle_machine", "_LONGEST_INT", 0, _pickle, b"\x80\x02\x8a\x02\1\1.", "hostile-pickle"),
    Budget("sources.pickle_frames", "MOST_PICKLE_BYTES", 9, _pickle, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.pickle_bounds", "_MOST_NODES", 1, _pickle, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.pickle_bounds", "_FREE_NODES", 0, _pickle, b"\x80\x02](" + b"}" * 99 + b"e.", "hostile-pickle"),
    Budget("sources.pickle_bounds", "_FREE_NODES", 0, _pickle, b"\x80\x04N" + b"\x94" * 99 + b".", "hostile-pickle",
           " (memos)"),
    Budget("sources.pickle_bounds", "_MOST_DEPTH", 0, _pickle, b"\x80\x02]}a.", "hostile-pickle"),
    Budget("sources.pickle_bounds", "_LARGEST_KEY", 1, _pickle, b"\x80\x02}K\5Ns.", "hostile-pickle"),
    Budget("sources.pickle_bounds", "_MOST_TUPLE_KEYS", 0, _pickle, b"\x80\x02}K\5\x85Ns.", "hostile-pickle"),
    Budget("sources.pickle_bounds", "MOST_DIMS", 0, _pickle, seeds.PICKLE, "damaged-pickle"),
    Budget("sources.state_dict", "_MOST_LEAVES", 1, _names, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.state_dict", "_FREE_LEAVES", 0, _names, exhausting._shared(3, 5, 2), "hostile-pickle"),
    Budget("sources.state_dict", "_FREE_LETTERS", 0, _names, exhausting._shared(2, 4, 900), "hostile-pickle"),
    Budget("sources.state_dict", "_MOST_NAMES", 1, _names, exhausting._many_names(3), "hostile-pickle"),
    Budget("sources.state_dict", "_LONGEST_NAME", 0, _names, seeds.PICKLE, "hostile-pickle"),
    Budget("sources.zip_directory", "_MOST_MEMBERS", 1, _ZIP, seeds.ZIP, "hostile-zip"),
    Budget("sources.zip_directory", "_LARGEST_ENTRY", 1, _ZIP, seeds.ZIP, "hostile-zip"),
    Budget("sources.zip_members", "_FREE_INFLATED", 0, _ZIP,
           build(changed(0, data=_BLANK, method=8)), "hostile-zip"),
    Budget("sources.safetensors_file", "_LARGEST_HEADER", 1, _HEADER, seeds.WEIGHTS, "damaged-header"),
    Budget("sources.safetensors_file", "_LARGEST_RANK", 0, _HEADER, seeds.WEIGHTS, "damaged-header"),
    Budget("sources.safetensors_file", "_LARGEST_SIZE", 1, _HEADER, seeds.WEIGHTS, "damaged-header"),
    Budget("sources.safetensors_file", "_LONGEST_NAME", 0, _HEADER, seeds.WEIGHTS, "damaged-header"),
    Budget("json_limits", "_FREE_CONTAINERS", 0, _HEADER, seeds.WEIGHTS, "damaged-header"),
    Budget("json_limits", "_FREE_VALUES", 0, _json, b'{"a":[' + b"1," * 99 + b"1]}", "bad-json"),
    Budget("json_limits", "_DEEPEST", 1, _json, b'{"a":{"b":1}}', "bad-json"),
    Budget("targets.config_numbers", "MAX_JSON_BYTES", 1, _side_file, b"{}", "side-file-too-large"),
    Budget("targets.config_numbers", "MAX_LAYERS", 1, _layers, b'{"num_hidden_layers": 2}', "odd-config"),
    Budget("targets.tokenizer_json", "_MAX_BYTES", 1, _tokenizer, _TOKENS, "side-file-too-large"),
    Budget("sources.hf_folder", "_LARGEST_INDEX", 1, _INDEX, _WEIGHT_MAP, "damaged-index"),
    Budget("sources.dcp_metadata", "_MOST_BYTES", 1, _DCP, _METADATA, "hostile-pickle"),
    Budget("sources.dcp_metadata", "MOST_OPCODES", 3, _DCP, _METADATA, "hostile-pickle"),
    Budget("sources.pickle_stream", "_LARGEST_FRAME", 1, _DCP, _METADATA, "damaged-pickle"),
    Budget("sources.dcp_table", "_MOST_CHUNKS", 0, _DCP, _METADATA, "hostile-pickle"),
    Budget("sources.dcp_table", "_LONGEST_PATH", 1, _DCP, _METADATA, "hostile-pickle"),
    Budget("sources.dcp_table", "_LARGEST", 1, _DCP, _METADATA, "damaged-pickle"),
    Budget("mapping.yaml_text", "LARGEST_TEXT", 1, _mapping, _COUNTED, "yaml-too-large"),
    Budget("mapping.yaml_text", "_DEEPEST", 1, _mapping, _COUNTED, "yaml-too-deep"),
    Budget("mapping.terms", "_MOST_COUNTED", 1, _mapping, _COUNTED, "op-value"),
    Budget("mapping.terms", "_MOST_TARGETS", 1, _mapping, _COUNTED, "too-many-targets"),
    Budget("mapping.terms", "_MOST_TARGETS_OF_ALL", 1, _mapping, _COUNTED, "too-many-targets"),
    Budget("formulas", "_LONGEST", 2, _formula, b"1+1", "bad-formula"),
    Budget("formulas", "_LARGEST", 1, _formula, b"1+1", "bad-formula"),
    Budget("targets.name_expressions", "_MOST", 3, _expression, b"abcdef", "ValueError"),
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_budget_is_kept(budget, monkeypatch):
    budget.read(budget.data)
    monkeypatch.setattr(import_module(f"shardmerge.{budget.module}"), budget.name, budget.less)
    with pytest.raises((ShardmergeError, ValueError)) as caught:
        budget.read(budget.data)
    assert getattr(caught.value, "code", "ValueError") == budget.code


def test_a_small_member_of_a_zip_is_small():
    """``unpack`` has its bound as an argument."""
    with pytest.raises(ShardmergeError, match="a member is larger than any checkpoint's"):
        _ZIP(build(changed(1, data=b"little" + b" " * 11)))


def _without(budget: Budget) -> str:
    """Returns how its test ends where the code does not ask for a budget."""
    path = Path(__file__).parents[1] / "shardmerge" / f"{budget.module.replace('.', '/')}.py"
    kept = path.read_text("utf-8")
    made = re.compile(rf"from |(\w+, |\w+ = )*{budget.name}(, \w+)* = ")
    use = re.compile(rf"(?<![\w.]){budget.name}\b")
    changed = [line if made.match(line) else use.sub("(1 << 200)", line) for line in kept.split("\n")]
    try:
        path.write_text("\n".join(changed), "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"{__file__}::test_a_budget_is_kept[{budget}]"]
        done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, check=False)
    finally:
        path.write_text(kept, "utf-8")
    return done.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    for one in (one for one in BUDGETS if not sys.argv[1:] or str(one) in sys.argv[1:]):
        print(f"{one}: {_without(one)}", flush=True)
