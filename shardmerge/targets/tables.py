"""The tables of architectures: what names and shapes a model type has, as its file in ``architectures/`` says.

A file is data: fields of config.json with their defaults, and a tree of names, each with its shape as small formulas
over the fields, behind a name ``if`` and a condition. ``docs/guides/architectures.md`` says how to write one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias, cast

from shardmerge.formulas import Formula

FOLDER = Path(__file__).with_name("architectures")

Default: TypeAlias = "Formula | int | float | bool | tuple[int, ...] | None"
_Tree: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class NameNode:
    """A name in the tree: a tensor, or a module with names inside of it.

    Attributes
    ----------
    name
        Dots included; ``{layer}`` stands for each number of a kind.
    number
        That kind, ``""`` for none.
    condition
        Where it is there; None for always.
    shape
        Of a tensor; None for a module.
    inside
        Of a module.
    """

    name: str
    number: str
    condition: Formula | None
    shape: tuple[Formula, ...] | None
    inside: tuple[NameNode, ...] = ()


@dataclass(frozen=True, slots=True)
class InnerModel:
    """A model inside of another.

    Attributes
    ----------
    usual
        Its config where the whole says nothing of it, and its model type where it does not say that.
    kind
        Of the tables that it may have; ``""`` for the usual model type alone.
    prefix
        Of its names in the whole.
    """

    usual: Mapping[str, object]
    kind: str
    prefix: str


@dataclass(frozen=True, slots=True)
class ArchitectureTable:
    """What a file says of an architecture: its keys, each of which ``docs/guides/architectures.md`` explains."""

    model_type: str
    title: str
    kind: str
    tokenizer: str
    rope_theta: float
    own_code: bool
    fields: Mapping[str, Default]
    null_fields: Mapping[str, Default]
    sizes: Mapping[str, Formula]
    zero: frozenset[str]
    square: frozenset[str]
    other_fields: frozenset[str]
    must: tuple[Formula, ...]
    lengths: Mapping[str, str]
    numbers: Mapping[str, Formula]
    parts: Mapping[str, InnerModel]
    in_memory: tuple[str, ...]
    unread: tuple[tuple[str, Formula, Formula, str], ...]
    renames: tuple[tuple[str, str], ...]
    prefix: str
    tensors: tuple[NameNode, ...]
    classes: Mapping[str, tuple[NameNode, ...]]
    bare: frozenset[str]
    tied: tuple[tuple[str, str], ...]

    @property
    def main_class(self) -> str:
        """The class that loads a config which names none."""
        return next(iter(self.classes))

    @property
    def family(self) -> str:
        """What the names of its classes begin with."""
        return re.split(r"For[A-Z]|Model|VisionModel|TextModel", self.main_class, maxsplit=1)[0]


@cache
def model_types(kind: str = "") -> tuple[str, ...]:
    """Returns the model types that have a table, of one kind or all."""
    every = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return tuple(name for name in every if not kind or table_of(name).kind == kind)


def every_table() -> Iterator[ArchitectureTable]:
    """Yields all tables."""
    yield from map(table_of, model_types())


def find_table(model_type: object) -> ArchitectureTable | None:
    """Returns the table of what a config says as its ``model_type``; None where there is none."""
    if not isinstance(model_type, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", model_type):
        return None
    return table_of(model_type) if (FOLDER / f"{model_type}.yaml").is_file() else None


def no_table(model_type: str) -> ArchitectureTable:
    """Returns the table of what has none: no field is known, and no tensor."""
    about = {"model_type": model_type, "title": model_type, "kind": "", "tensors": {}, "classes": {"": {}}}
    return _Reader("").table(about)


@cache
def table_of(model_type: str) -> ArchitectureTable:
    """Returns the table of a model type that has one."""
    return read_table(FOLDER / f"{model_type}.yaml")


def read_table(path: Path) -> ArchitectureTable:
    """Returns what a file says."""
    return _Reader(path.name).table(_content(path))


def _content(path: Path) -> _Tree:
    """Returns the keys of a file, and those of the table that it is ``like``, where it does not say them itself."""
    import yaml

    # libyaml reads a table in under 1 ms, Python's reader in 15; a PyYAML that was built without it has the latter.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    said = dict(_tree(yaml.load(path.read_bytes(), loader)))
    like = said.pop("like", "")
    return {**_content(FOLDER / f"{like}.yaml"), **said} if like else said


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one file; a mistake in it is ours, and comes out as what it breaks."""

    where: str

    def table(self, content: _Tree) -> ArchitectureTable:
        said = dict(content)
        table = ArchitectureTable(
            model_type=str(said.pop("model_type")),
            title=str(said.pop("title")),
            kind=str(said.pop("kind")),
            tokenizer=str(said.pop("tokenizer", "")),
            rope_theta=float(str(said.pop("rope_theta", 10000.0))),
            own_code=bool(said.pop("own_code", False)),
            fields={key: self._default(value) for key, value in _tree(said.pop("fields", {})).items()},
            null_fields={key: self._default(value) for key, value in _tree(said.pop("null_fields", {})).items()},
            sizes={key: self._formula(value) for key, value in _tree(said.pop("sizes", {})).items()},
            zero=frozenset(_names(said.pop("zero", []))),
            square=frozenset(_names(said.pop("square", []))),
            other_fields=frozenset(_names(said.pop("other_fields", []))),
            must=tuple(map(self._formula, _names(said.pop("must", [])))),
            lengths={key: str(value) for key, value in _tree(said.pop("lengths", {})).items()},
            numbers={key: self._formula(value) for key, value in _tree(said.pop("numbers", {})).items()},
            parts={key: _part(_tree(value)) for key, value in _tree(said.pop("parts", {})).items()},
            in_memory=tuple(_names(said.pop("in_memory", []))),
            unread=tuple(self._unread(_tree(said.pop("unread", {})))),
            renames=tuple((key, str(value)) for key, value in _tree(said.pop("renames", {})).items()),
            prefix=str(said.pop("prefix", "")),
            tensors=tuple(self._nodes(_tree(said.pop("tensors")))),
            classes={name: tuple(self._nodes(_tree(more))) for name, more in _tree(said.pop("classes")).items()},
            bare=frozenset(_names(said.pop("bare", []))),
            tied=tuple((key, str(value)) for key, value in _tree(said.pop("tied", {})).items()),
        )
        assert not said, f"{self.where}: unknown keys {sorted(said)}"
        return table

    def _nodes(self, tree: _Tree) -> Iterator[NameNode]:
        for key, value in tree.items():
            name, _, condition = key.partition(" if ")
            number = re.search(r"\{(\w+)\}", name)
            yield NameNode(
                name,
                number[1] if number else "",
                self._formula(condition) if condition else None,
                None if isinstance(value, dict) else tuple(self._shape(str(value))),
                tuple(self._nodes(value)) if isinstance(value, dict) else (),
            )

    def _unread(self, tree: _Tree) -> Iterator[tuple[str, Formula, Formula, str]]:
        for prefix, said in tree.items():
            first, count, sign = _names(said)
            yield prefix, self._formula(first), self._formula(count), sign

    def _shape(self, text: str) -> Iterator[Formula]:
        """Yields the sizes of a shape; ``()`` is that of a single number."""
        if text != "()":
            yield from map(self._formula, text.split(","))

    def _default(self, value: object) -> Default:
        if isinstance(value, str):
            return self._formula(value)
        return tuple(value) if isinstance(value, list) else cast("Default", value)

    def _formula(self, text: object) -> Formula:
        return Formula.parse(str(text), self.where, conditions=True)


def _part(said: _Tree) -> InnerModel:
    return InnerModel(_tree(said["usual"]), str(said.get("kind", "")), str(said.get("prefix", "")))


def _tree(value: object) -> _Tree:
    assert isinstance(value, dict)
    return value


def _names(value: object) -> list[str]:
    assert isinstance(value, list)
    return value
