"""The table of layouts, ``layouts.json``: what names and shapes tell a layout, and the ways from there.

JSON and not YAML, since every plain conversion of a bare state dict looks into it, and reads no other YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from shardmerge.tensors import TensorEntry

_FILE = Path(__file__).with_name("layouts.json")
# What may be left out of a name.
_OPTIONAL = re.compile(r"\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """A tensor that a layout has.

    Attributes
    ----------
    names
        A name of the checkpoint is one of them, where every number is a 0 and ``*`` stands for any text.
    rank
        Its number of dimensions, a float tensor; None for any tensor.
    """

    names: tuple[str, ...]
    rank: int | None

    @classmethod
    def parse(cls, text: str) -> KnownTensor:
        """Returns what an entry of the table says: ``a.(b.)c | d.*: 2``."""
        alternatives, _, rank = text.partition(": ")
        names = (name for one in alternatives.split(" | ") for name in _spelled_out(one))
        return cls(tuple(names), int(rank) if rank else None)

    def is_in(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Tells whether it is among tensors, whose names have a 0 for every number."""
        return any(self._fits(tensors[name]) for text in self.names for name in _alike(text, tensors))

    def _fits(self, entry: TensorEntry) -> bool:
        return self.rank is None or (len(entry.shape) == self.rank and entry.dtype.kind == "float")


@dataclass(frozen=True, slots=True)
class Want:
    """A source that a preset can do without, and this layout cannot.

    Attributes
    ----------
    why
        For people.
    unless
        With such a tensor in the checkpoint it is not needed.
    unless_file
        Likewise a file beside the weights.
    """

    why: str
    unless: str = ""
    unless_file: str = ""


@dataclass(frozen=True, slots=True)
class Road:
    """A preset that leads away from a layout.

    Attributes
    ----------
    preset
        Its name.
    to
        What it makes, where the preset names no target.
    role
        Which of its sources the checkpoint is; empty for the first that it needs.
    """

    preset: str
    to: str = ""
    role: str = ""

    @classmethod
    def parse(cls, text: str) -> Road:
        """Returns what an entry of the table says: ``PRESET to WORD`` or ``PRESET as ROLE``."""
        preset, *words = text.split()
        said = dict(zip(words[::2], words[1::2], strict=True))
        return cls(preset, said.get("to", ""), said.get("as", ""))


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout.

    Attributes
    ----------
    name
        For people.
    has, without
        All of the first are there, and none of the second.
    model_types
        What config.json says of such a model; empty for the layouts of other tools.
    by_config
        Whether nothing but that tells it from another one.
    roads
        Presets from here.
    needs
        Sources that are needed besides those that the preset says, by role.
    adapter
        Of an adapter what stands before peft's own names; None for what is no adapter.
    refused
        Why nothing leads on.
    """

    name: str
    has: tuple[KnownTensor, ...]
    without: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    by_config: bool = False
    roads: tuple[Road, ...] = ()
    needs: Mapping[str, Want] = field(default_factory=dict)
    adapter: str | None = None
    refused: str = ""

    def fits(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Tells whether a checkpoint has this layout; its names have a 0 for every number."""
        return all(one.is_in(tensors) for one in self.has) and not any(_alike(one, tensors) for one in self.without)


@cache
def layouts() -> tuple[Layout, ...]:
    """Returns every layout that is known here."""
    return tuple(
        Layout(
            one["name"],
            tuple(map(KnownTensor.parse, one["has"])),
            tuple(one.get("without", ())),
            tuple(one.get("model_types", ())),
            one.get("by_config", False),
            tuple(map(Road.parse, one.get("roads", ()))),
            {role: Want(**want) for role, want in one.get("needs", {}).items()},
            one.get("adapter"),
            one.get("refused", ""),
        )
        for one in _file()["layouts"]
    )


def titles() -> Mapping[str, str]:
    """Returns names for people of model types whose tensors are called as those of another one."""
    found: dict[str, str] = _file()["titles"]
    return found


def trainers() -> tuple[str, ...]:
    """Returns what a trainer's own module calls the model inside, as it stands before the names."""
    return tuple(_file()["trainers"])


@cache
def _file() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    return read


def has_name(text: str, names: Mapping[str, object]) -> bool:
    """Tells whether one of some names, with a 0 for every number, is like an entry of the table."""
    return bool(_alike(text, names))


def _spelled_out(text: str) -> list[str]:
    """Returns the names with and without each part in parentheses."""
    parts = _OPTIONAL.split(text)
    choices = [(part, "") if index % 2 else (part,) for index, part in enumerate(parts)]
    return ["".join(one) for one in product(*choices)]


def _alike(text: str, names: Mapping[str, object]) -> list[str]:
    if "*" not in text:
        return [text] if text in names else []
    first, *middle, last = text.split("*")
    return [
        name
        for name in names
        if name.startswith(first) and name.endswith(last) and _in_order(name[len(first) :], [*middle, last])
    ]


def _in_order(text: str, pieces: list[str]) -> bool:
    """Tells whether pieces stand in a text one behind the other; each where it first can, so that time is linear."""
    for piece in pieces:
        _, found, text = text.partition(piece) if piece else ("", "x", text)
        if not found:
            return False
    return True
