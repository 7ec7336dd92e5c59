"""How transformers renamed the tensors of models from generation to generation: ``generations.yaml``, read.

A generation is called after the version in which names changed in memory. ``4.51`` is what that version and all later
ones save. The file is made by ``tests/golden/make/make_generations.py`` from transformers' own tables.

A model has parts with models of their own (``text_config``, ``vision_config``), and each of them was renamed when its
own class was. So one spelling of a model is a generation for the model and one for each part: what 5.23 saves of a
LLaVA built from a config has the outer names of 4.51 and those of 5.6 inside of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TypeAlias, TypedDict

import yaml

from shardmerge.errors import MappingError
from shardmerge.targets.config_numbers import JsonObject

# What a tensor is called, by generation; one that is not there has the name of the one before.
NameRow: TypeAlias = Mapping[str, str]

OLDEST = "4.51"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """One tensor that newer versions have in memory for many in the files.

    Attributes
    ----------
    split
        Templates of the tensors of expert ``{e}``; one below the other they are its part of the fused tensor.
    fused
        The template of the fused tensor [experts, rows, columns].
    since
        The generation that has it.
    """

    split: tuple[str, ...]
    fused: str
    since: str


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A model inside of the model, ``{text...}`` in its rows; or the model itself, under ``""``."""

    name: str
    rows: tuple[NameRow, ...]
    experts: tuple[FusedExperts, ...] = ()

    def labels(self) -> tuple[str, ...]:
        """Returns the generations in which the part has names of its own, the oldest first."""
        rows = {label: None for row in self.rows for label in row}
        return tuple(sorted(rows | {one.since: None for one in self.experts}, key=_order))


@dataclass(frozen=True, slots=True)
class ModelNames:
    """All that is known of the names of a model: ``parts`` by name, the model itself under ``""``."""

    model_type: str
    parts: Mapping[str, ModelPart]

    def spellings(self) -> Iterator[Mapping[str, str]]:
        """Yields every spelling: a generation for each part."""
        names = list(self.parts)
        for labels in product(*(self.parts[name].labels() or (OLDEST,) for name in names)):
            yield dict(zip(names, labels, strict=True))

    def generation(self, label: str) -> Mapping[str, str]:
        """Returns the spelling of a generation."""
        return dict.fromkeys(self.parts, label)

    def templates(self, spelling: Mapping[str, str]) -> dict[str, str]:
        """Returns the names in one spelling, under a key that is the same in all; experts are not among them."""
        found: dict[str, str] = {}
        for number, row in enumerate(self.parts[""].rows):
            outer = called(row, spelling[""])
            inner = self._inside(outer)
            if inner is None:
                found[f"{number}"] = outer
                continue
            for inside, one in enumerate(inner.rows):
                found[f"{number}.{inside}"] = outer.replace(f"{{{inner.name}...}}", called(one, spelling[inner.name]))
        return found

    def experts(self, spelling: Mapping[str, str]) -> Iterator[tuple[FusedExperts, bool]]:
        """Yields what newer versions fuse, with the names of the spelling, and whether it is fused there."""
        for row in self.parts[""].rows:
            outer = called(row, spelling[""])
            inner = self._inside(outer)
            if inner is None:
                continue
            front = outer.replace(f"{{{inner.name}...}}", "")
            for one in inner.experts:
                split = tuple(front + name for name in one.split)
                yield (
                    FusedExperts(split, front + one.fused, one.since),
                    _order(spelling[inner.name]) >= _order(one.since),
                )

    def every(self, spelling: Mapping[str, str]) -> dict[str, str]:
        """Returns all names in one spelling, those of experts as they are there, fused or not."""
        found = self.templates(spelling)
        for number, (one, fused) in enumerate(self.experts(spelling)):
            if fused:
                found[f"fused {number}"] = one.fused
            else:
                found |= {f"split {number}.{i}": name for i, name in enumerate(one.split)}
        return found

    def _inside(self, outer: str) -> ModelPart | None:
        return next((part for name, part in self.parts.items() if name and f"{{{name}...}}" in outer), None)


def called(row: NameRow, label: str) -> str:
    """Returns what a generation calls a tensor; what was saved by mistake has the oldest name where it has none."""
    if label in row or not _is_version(label):
        return row.get(label, row[OLDEST])
    return row[max((one for one in row if _is_version(one) and _order(one) <= _order(label)), key=_order)]


def names_of(config: JsonObject, where: str = "") -> ModelNames:
    """Returns what is known of the names of a model, and of its parts.

    Parameters
    ----------
    config
        Its config.json.
    where
        That file, for messages.

    Raises
    ------
    MappingError
        ``unknown-renames``: the model or a part of it was renamed, and how is not known here.
    """
    tables = _tables()
    model_type = _type(config)
    entry = tables["models"].get(model_type)
    if entry is None:
        for one in _types_inside(config):  # of a model around renamed ones nobody measured what becomes
            if one in tables["not_told"] or _renames(tables["parts"].get(one)):
                raise _unknown_renames(f"{model_type} with a {one} inside", where)
        return ModelNames(model_type, {"": _part("", model_type, where)})
    parts = {"": ModelPart("", tuple(entry["names"]))}
    for name, (key, usual) in entry["parts"].items():
        inner = config.get(key) if key else None
        said = _type(inner) if isinstance(inner, dict) else ""
        parts[name] = _part(name, usual if said in ("", model_type) else said, where)
    return ModelNames(model_type, parts)


def generations() -> tuple[str, ...]:
    """Returns all generations in which something was renamed, the oldest first."""
    tables = _tables()
    entries = [*tables["models"].values(), *tables["parts"].values()]
    labels = {label for entry in entries for row in entry["names"] for label in row if _is_version(label)}
    return tuple(sorted(labels | {one["since"] for entry in entries for one in entry.get("experts", ())}, key=_order))


# ---- the file


class _Entry(TypedDict, total=False):
    """A model, or a part: ``parts`` are keys in the config, and the types that they have where none is said."""

    parts: dict[str, tuple[str, str]]
    names: list[dict[str, str]]
    experts: list[_Fused]


class _Fused(TypedDict):
    split: list[str]
    fused: str
    since: str


class _Tables(TypedDict):
    models: dict[str, _Entry]
    parts: dict[str, _Entry]
    not_told: list[str]


@cache
def _tables() -> _Tables:
    tables: _Tables = yaml.safe_load(files("shardmerge.mapping").joinpath("generations.yaml").read_text("utf-8"))
    return tables


def _part(name: str, model_type: str, where: str) -> ModelPart:
    """Returns what is known of a part; one whose names never changed keeps whatever names it has."""
    tables = _tables()
    if model_type in tables["not_told"]:
        raise _unknown_renames(model_type, where)
    entry = tables["parts"].get(model_type)
    # Words of a part are known as they stand inside of another model: alone, there is a prefix and a head.
    if entry is None or not (name or _renames(entry)):
        return ModelPart(name, ({OLDEST: "{rest...}"},))
    experts = tuple(FusedExperts(tuple(one["split"]), one["fused"], one["since"]) for one in entry.get("experts", ()))
    return ModelPart(name, tuple(entry["names"]), experts)


def _renames(entry: _Entry | None) -> bool:
    return entry is not None and ("experts" in entry or any(len(row) > 1 for row in entry["names"]))


def _unknown_renames(what: str, where: str) -> MappingError:
    return MappingError(
        "unknown-renames",
        f"transformers renamed tensors of a {what} between its versions, and the renames are unknown",
        where=where,
        expected=f"{', '.join(_tables()['models'])}, or a model whose names never changed",
        hint="write the rules yourself, with `target: {name: hf/model, text: SOURCE}`",
    )


def _types_inside(config: Mapping[str, object]) -> Iterator[str]:
    for value in config.values():
        if isinstance(value, dict):
            yield _type(value)
            yield from _types_inside(value)


def _type(config: Mapping[str, object]) -> str:
    value = config.get("model_type")
    return value if isinstance(value, str) else ""


def _is_version(label: str) -> bool:
    return label[:1].isdigit()


def _order(label: str) -> tuple[int, ...]:
    """What was saved by mistake is no generation, and comes last."""
    return tuple(map(int, label.split("."))) if _is_version(label) else (1 << 30,)
