"""Reads the renames between generations of transformers into shardmerge/mapping/generations.yaml.

    PYTHONPATH=. python tests/golden/make/make_generations.py --work DIR --out shardmerge/mapping/generations.yaml \
        --python 4.51.3=PYTHON --python 4.52.4=PYTHON ...

from the root of the repository, with one interpreter for each version; `read_from` in the file says which.

One source of truth: each version's own tables (``_checkpoint_conversion_mapping`` of 4.x, ``conversion_mapping.py`` of
5.x), carried out by that version. ``tests/model_generations.py`` builds a model of each type in the oldest version that has it
and loads it in all others; a tensor is known by its bytes. What came out is said in templates of shardmerge, and
every template is checked: each name of each model, in every version, on disk and in memory, must be made of the name
that the oldest version saves, by exactly one row. What templates cannot say stops the script.

The names that 4.51 (or the oldest version that has the model) saves are called ``4.51``: every later version saves them,
and all load them. A version in which the names in memory change is a generation. ``saved by 5.5`` is what 5.5
wrote by mistake, and 5.6 and later read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from shardmerge.mapping.generations import generations as known
from shardmerge.mapping.generations import names_of
from shardmerge.mapping.pattern import Template
from tests import model_generations
from tests.model_generations import MODELS

OLDEST = "4.51"
# What from_pretrained of 5.5 followed by save_pretrained writes: neither its names in memory nor those of its files.
MISTAKE = ("5.5.4", "saved by 5.5")

# Wrong on their part, and nothing that they read again: Mixtral's `mlp` became `block_sparse_moe` in the encoder too.
BROKEN = {("llava_next-mixtral", "5.5.4", "model"), ("llava_next-mixtral", "5.6.0", "model")}

Names = dict[str, str]  # name in the oldest files: name elsewhere


def run(work: pathlib.Path, pythons: Mapping[str, str]) -> None:
    """Builds and loads all models in every version."""
    script = pathlib.Path(model_generations.__file__)
    older: list[str] = []
    for version, python in pythons.items():
        out = work / version
        out.mkdir(parents=True)
        subprocess.run([python, "-W", "ignore", script, "--out", out, "--from", *older], check=True)
        older.append(str(out))


@dataclass
class Model:
    """One model in all versions.

    Attributes
    ----------
    files
        Tensors as the oldest version saved them.
    columns
        By (version, "model" or "memory"): what each tensor of ``files`` is called, and what has no such tensor.
    """

    case: str
    files: dict[str, np.ndarray]
    columns: dict[tuple[str, str], Names] = field(default_factory=dict)
    fused: dict[tuple[str, str], dict[str, np.ndarray]] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    home: pathlib.Path = pathlib.Path()

    @property
    def type(self) -> str:
        """Its model type."""
        return MODELS[self.case][1]

    @property
    def newest(self) -> str:
        """The newest version."""
        return list(self.report)[-1]

    def part_type(self, key: str) -> str:
        """Returns the model type of a part, as the newest version writes it."""
        config = json.loads((self.home / self.newest / self.case / "config.json").read_text())
        return str(config[key]["model_type"])


def read(work: pathlib.Path, versions: Iterable[str]) -> list[Model]:
    """Returns the models with their names in every version."""
    found = []
    for case in MODELS:
        homes = [version for version in versions if (work / version / case).is_dir()]
        files = load_file(work / homes[0] / case / "model.safetensors")
        model = Model(case, files, home=work)
        by_bytes = {tensor.tobytes(): name for name, tensor in files.items()}
        if len(by_bytes) != len(files):
            raise SystemExit(f"{case}: two tensors are equal")
        for version, kind in itertools.product(homes, ("model", "memory")):
            tensors = load_file(work / version / case / f"{kind}.safetensors")
            known = {name: by_bytes.get(tensor.tobytes()) for name, tensor in tensors.items()}
            model.columns[version, kind] = {old: name for name, old in known.items() if old}
            model.fused[version, kind] = {name: tensors[name] for name, old in known.items() if not old}
            model.report[version] = json.loads((work / version / "report.json").read_text())[case]
        found.append(model)
    return found


# ---- from names to templates


def numbered(name: str) -> tuple[str, ...]:
    """Returns the segments of a name, numbers replaced by captures."""
    letters = iter("ijkl")
    return tuple(f"{{{next(letters)}}}" if part.isdigit() else part for part in name.split("."))


def rows(columns: Mapping[str, Names]) -> list[dict[str, str]]:
    """Returns the templates of names that are renamed by the segments in front of what all versions call alike."""
    groups: dict[tuple[tuple[str, ...], ...], dict[tuple[str, ...], None]] = defaultdict(dict)
    for old in columns[OLDEST]:
        parts = [numbered(names[old]) for names in columns.values()]
        same = 0
        while all(len(one) > same and one[-1 - same] == parts[0][-1 - same] for one in parts):
            same += 1
        tail = parts[0][len(parts[0]) - same :]
        front = tuple(one[: len(one) - same] for one in parts)
        groups[front][tail] = None
    return [row for front, tails in sorted(groups.items()) for row in said(columns, front, list(tails))]


def said(columns: Mapping[str, Names], front: tuple[tuple[str, ...], ...], tails: list[tuple[str, ...]]) -> list[dict]:
    """Returns the rows of one group: whole names, and first words with anything behind them."""
    whole = sorted(tail for tail in tails if len(tail) == 1)
    first = sorted({tail[0] for tail in tails if len(tail) > 1})
    if any(word.startswith("{") for word in first):
        raise SystemExit(f"{front}: a number after the front is not said")
    ends = [".".join(tail) for tail in whole] + ([f"{one_of(first)}.{{rest...}}"] if first else [])
    return [
        {label: ".".join((*one, end)) for label, one in zip(columns, front, strict=True)}
        for end in ends
    ]  # fmt: skip


def one_of(words: Iterable[str]) -> str:
    """Returns the piece of a template that is one of some words."""
    found = sorted(words)
    return found[0] if len(found) == 1 else f"{{n:{'|'.join(found)}}}"


def without_repeats(row: Mapping[str, str]) -> dict[str, str]:
    """Leaves out what a generation calls as the one before it."""
    kept: dict[str, str] = {}
    last = ""
    for label, template in row.items():
        if label.startswith("saved"):
            if template != row[OLDEST]:
                kept[label] = template
        elif template != last:
            kept[label] = last = template
    return kept


# ---- models


def label(version: str) -> str:
    """Returns a version without its last number."""
    return ".".join(version.split(".")[:2])


def generations(model: Model) -> dict[str, tuple[str, str]]:
    """Returns the columns of a model in which the names change: by label, the version and place they are read at."""
    oldest = next(iter(model.columns))
    found = {OLDEST: oldest}
    last = oldest
    for key, names in model.columns.items():
        if key[1] == "memory" and (names, set(model.fused[key])) != (model.columns[last], set(model.fused[last])):
            found[label(key[0])] = last = key
    wrong = (MISTAKE[0], "model")
    if model.columns.get(wrong) not in (None, *(model.columns[key] for key in found.values())):
        found[MISTAKE[1]] = wrong
    return found


def wrapper(model: Model) -> dict[str, Any]:
    """Returns the entry of a model with parts: its own names, with a capture where a part's stand."""
    found = generations(model)
    later = [version for name, (version, _) in found.items() if name != OLDEST]
    moved = later[0] if later else next(iter(model.columns))[0]  # here `model.` came in front
    labels = [name for name in found if name in (OLDEST, label(moved), MISTAKE[1])]  # parts kept their names in these
    place = label(moved) if later else OLDEST
    columns = {name: dict(model.columns[found[name]]) for name in labels}
    own, parts = [], {}
    for key, prefix in sorted(model.report[model.newest]["parts"].items()):
        part = key.removesuffix("_config")
        parts[part] = [key, model.part_type(key)]
        own.append(taken_out(model, columns, place, prefix, part))
    return {"parts": parts, "names": [without_repeats(row) for row in (*own, *rows(columns))]}


def taken_out(model: Model, columns: dict[str, Names], moved: str, prefix: str, part: str) -> dict[str, str]:
    """Takes the names of a part out of the columns and returns the row that stands for them."""
    inside = {old: new.removeprefix(prefix) for old, new in columns[moved].items() if new.startswith(prefix)}
    row = {}
    for name, names in columns.items():
        fronts = {names[old].removesuffix(inner) for old, inner in inside.items() if names[old].endswith(inner)}
        if len(fronts) != 1:
            raise SystemExit(f"{model.case}: {part} in {name} stands at {fronts}")
        row[name] = f"{fronts.pop()}{{{part}...}}"
        for old in inside:
            names.pop(old)
    return row


def known_words(model: Model) -> dict[str, list[dict[str, str]]]:
    """Returns, for each part whose names never change, a row with the words that they begin with."""
    found = {}
    for key, prefix in model.report[model.newest]["parts"].items():
        names = [name.removeprefix(prefix) for name in model.columns[model.newest, "memory"].values()
                 if name.startswith(prefix)]  # fmt: skip
        found[model.part_type(key)] = rows({OLDEST: dict(zip(names, names, strict=True))})
    return found


def alone(model: Model) -> dict[str, Any]:
    """Returns the entry of a model without parts, or of the body of one with a head."""
    found = generations(model)
    body = "model." if any(name.startswith("model.") for name in model.files) else ""
    common = set.intersection(*(set(model.columns[key]) for key in found.values()))  # the rest are experts
    columns = {
        name: {old: model.columns[key][old].removeprefix(body) for old in model.files
               if old in common and old.startswith(body)}
        for name, key in found.items()
    }  # fmt: skip
    since = next((name for name, key in found.items() if model.fused[key]), "")
    if not since:
        return {"names": [without_repeats(row) for row in rows(columns)]}
    told = experts(model, since, found[since], body)
    return {"names": [without_repeats(row) for row in beside_experts(columns)], "experts": told}


def beside_experts(columns: Mapping[str, Names]) -> list[dict[str, str]]:
    """Returns rows that match no expert: what stands in a layer is said by its words, and in the block of experts by two."""
    layered = {old: name.split(".") for old, name in columns[OLDEST].items() if name.startswith("layers.")}
    blocks = {parts[2] for parts in layered.values()} & {"mlp", "block_sparse_moe"}
    outside = {name: {old: new for old, new in names.items() if old not in layered} for name, names in columns.items()}
    words: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for old, parts in layered.items():
        depth = 4 if parts[2] in blocks else 3
        cut = [names[old].split(".") for names in columns.values()]
        if len({tuple(one[depth:]) for one in cut}) != 1:
            raise SystemExit(f"{old}: more than {depth - 2} words change")
        fronts = tuple(".".join(("layers.{i}", *one[2:depth])) for one in cut)
        if len(set(fronts)) > 1:
            words[fronts] = set()
        else:
            words[(".".join(("layers.{i}", *parts[2 : depth - 1])),)].add(parts[depth - 1])
    found = rows(outside)
    for fronts, last in sorted(words.items()):
        ends = f"{one_of(last)}.{{rest...}}" if last else "{rest...}"
        found.append({name: f"{fronts[i if len(fronts) > 1 else 0]}.{ends}" for i, name in enumerate(columns)})
    return found


def experts(model: Model, since: str, key: tuple[str, str], body: str) -> list[dict[str, Any]]:
    """Returns how tensors of experts are fused, as the tables of that version say it, checked on the values."""
    config = MODELS[model.case][2]
    found: dict[str, dict[str, Any]] = {}
    converters = [one["each"] for one in model.report[key[0]]["experts"]]
    for name, tensor in model.fused[key].items():
        tries = (sources(model, patterns, name, len(tensor)) for patterns in converters)
        each = next((one for one in tries if fuses(model, one, tensor)), None)
        if each is None:
            raise SystemExit(f"{model.case}: {name} is not a stack of experts: {model.report[key[0]]['experts']}")
        count = [k for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k) == len(tensor)]
        fused = ".".join(numbered(name.removeprefix(body)))
        split = [".".join(numbered(one.removeprefix(body))).replace("{j}", "{e}") for one in each[0]]
        found[fused] = {"split": split, "fused": fused, "since": since, "count": count[0]}
    return list(found.values())


def sources(model: Model, patterns: list[str], fused: str, count: int) -> list[list[str]]:
    """Returns for each expert the names that a converter's patterns take, in its order, of the layer of ``fused``."""
    layer = re.search(r"layers\.\d+\.", fused)
    names = [name for name in model.files if layer and layer[0] in name]
    ends = [["." + pattern.replace("*.", f"{expert}.").lstrip(".") for pattern in patterns] for expert in range(count)]
    return [[next((name for name in names if name.endswith(end)), "") for end in one] for one in ends]


def fuses(model: Model, names: list[list[str]], tensor: np.ndarray) -> bool:
    """Tells whether a tensor is the stack of its experts, each of whose tensors stand one below the other."""
    if not all(map(all, names)):
        return False
    made = [np.concatenate([model.files[name] for name in one]) for one in names]
    return len({one.shape for one in made}) == 1 and np.array_equal(np.stack(made), tensor)


# ---- the file


def entries(models: Iterable[Model], versions: list[str], renamed: Iterable[str]) -> dict[str, Any]:
    """Returns all that the file says."""
    whole: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for model in models:
        inner = model.report[model.newest]["parts"]
        for name, told in known_words(model).items():
            parts.setdefault(name, {"names": told})
        if model.case != model.type:
            continue
        if inner:
            whole[model.type] = wrapper(model)
            continue
        if len(generations(model)) == 1:
            continue
        parts[model.type] = alone(model)
        if any(name.startswith("model.") for name in model.files):
            heads = sorted(name for name in model.files if not name.startswith("model."))
            names = [{OLDEST: "model.{body...}"}, *({OLDEST: head} for head in heads)]
            whole[model.type] = {"parts": {"body": ["", model.type]}, "names": names}
    told = {*whole, *(name for name, one in parts.items() if renames(one))}
    return {"read_from": versions, "models": whole, "parts": parts, "not_told": sorted(set(renamed) - told)}


def renames(entry: Mapping[str, Any]) -> bool:
    """Tells whether an entry says more than words."""
    return "experts" in entry or any(len(row) > 1 for row in entry["names"])


def check(models: Iterable[Model]) -> None:
    """Checks the file by the code that reads it: each name of each version is made of the oldest one, by one row alone."""
    for model in models:
        for (version, kind), names in model.columns.items():
            if (model.case, version, kind) in BROKEN:
                continue
            config = json.loads((model.home / version / model.case / "config.json").read_text())
            told = names_of(config)
            start = told.templates(told.generation(OLDEST))
            if kind == "memory":  # of all generations the one that this version has
                place = max((one for one in known() if order(one) <= order(label(version))), key=order)
                spellings = [told.generation(place)]
            else:
                spellings = list(told.spellings())
            if not any(same(names, start, told.templates(one)) for one in spellings):
                raise SystemExit(f"{model.case}: the names of {version} ({kind}) are not those of the table")
        print(f"{model.case}: {len(model.columns)} columns of {len(model.files)} names are as the table says")


def order(text: str) -> tuple[int, ...]:
    """Returns a version as numbers."""
    return tuple(map(int, text.split(".")))


def same(names: Names, start: Mapping[str, str], end: Mapping[str, str]) -> bool:
    """Tells whether each new name is what the one row that matches the old one makes of it."""
    rules = [(Template.parse(start[key]), Template.parse(end[key])) for key in start]
    for old, new in names.items():
        made = [rule[1].format(found) for rule in rules if (found := rule[0].match(old)) is not None]
        if made != [new] and not (not made and ".experts." in old):  # experts were checked as they were read
            return False
    return True


HEAD = """\
# How transformers renamed the tensors of models, read from its own tables by tests/golden/make/make_generations.py, which
# checks every line on real models of every version named. Do not edit: run the script.
#
# A row says one name in several generations: what 4.51 and every later version saves, and from which version on it is
# called otherwise in memory. A generation that is not there has the name of the one before it. `saved by 5.5` is what
# that version wrote by mistake. `{text...}` stands for what the part under that key of the config is called.
"""


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--python", action="append", default=[], help="VERSION=PYTHON, oldest first")
    given = parser.parse_args()
    pythons = dict(one.split("=", 1) for one in given.python)
    if not given.work.exists():
        run(given.work, pythons)
    versions = list(pythons)
    models = read(given.work, versions)
    reports = [json.loads((given.work / version / "report.json").read_text()) for version in versions]
    renamed = {name for report in reports for name in report["renamed_types"]}
    said = entries(models, versions, renamed)
    given.out.write_text(HEAD + yaml.safe_dump(said, sort_keys=False, width=150, default_flow_style=None), "utf-8")
    check(models)


if __name__ == "__main__":
    main()
