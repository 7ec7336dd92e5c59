"""The table of layouts, ``layouts.json``: what names and shapes tell a layout, and the ways from there.

JSON and not YAML, since every plain conversion of a bare state dict looks into it, and reads no other YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from shardmerge.tensors import TensorEntry

# What may be left out of a name.
_OPTIONAL = re.compile(r"\(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class KnownTensor:
    """A tensor that a layout has: one of some ``names``; a float tensor of ``rank`` dimensions, of any for None.

    In names every number is a 0, and ``*`` stands for any text.
    """

    names: tuple[str, ...]
    rank: int | None

    def is_in(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Tells whether it is among tensors, whose names have a 0 for every number."""
        return any(self._fits(tensors[name]) for text in self.names for name in _alike(text, tensors))

    def _fits(self, entry: TensorEntry) -> bool:
        return self.rank is None or (len(entry.shape) == self.rank and entry.dtype.kind == "float")


@dataclass(frozen=True, slots=True)
class Want:
    """A source that a preset can do without and a layout cannot: why, and the file that it may have instead."""

    why: str
    unless_file: str = ""


@dataclass(frozen=True, slots=True)
class Road:
    """A preset, what it makes where it names no target, which of its sources this is, and a file that must be there."""

    preset: str
    to: str = ""
    role: str = ""
    beside: str = ""


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
    roads, needs
        Presets from here, and the sources that are needed besides those that they say.
    adapter
        Of an adapter what stands before peft's own names; None for what is no adapter.
    alpha_inside
        Whether an adapter's own tensors say how strongly it counts.
    own_base
        Whether it holds the model that it was trained on.
    drops
        Templates of what an adapter holds for another model than the first.
    """

    name: str
    has: tuple[KnownTensor, ...]
    without: tuple[str, ...]
    model_types: tuple[str, ...]
    by_config: bool
    roads: tuple[Road, ...]
    needs: Mapping[str, Want]
    adapter: str | None
    alpha_inside: bool
    own_base: bool
    drops: tuple[str, ...]

    def open_roads(self, files: Collection[str]) -> tuple[Road, ...]:
        """Returns the roads whose files lie beside the checkpoint."""
        return tuple(one for one in self.roads if one.beside in ("", *files))

    def fits(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Tells whether a checkpoint has this layout; its names have a 0 for every number."""
        return all(one.is_in(tensors) for one in self.has) and not any(_alike(one, tensors) for one in self.without)


@dataclass(frozen=True, slots=True)
class LayoutTable:
    """All layouts; names of model types that have none of their own; what trainers put before a model's names."""

    layouts: tuple[Layout, ...]
    titles: Mapping[str, str]
    trainers: tuple[str, ...]


@cache
def layout_table() -> LayoutTable:
    """Returns the table."""
    read = json.loads(Path(__file__).with_name("layouts.json").read_text("utf-8"))
    layouts = tuple(
        Layout(
            one["name"],
            tuple(map(_tensor, one["has"])),
            tuple(one.get("without", ())),
            tuple(one.get("model_types", ())),
            one.get("by_config", False),
            tuple(map(_road, one.get("roads", ()))),
            {role: Want(**want) for role, want in one.get("needs", {}).items()},
            one.get("adapter"),
            one.get("alpha_inside", False),
            one.get("own_base", False),
            tuple(one.get("drops", ())),
        )
        for one in read["layouts"]
    )
    return LayoutTable(layouts, read["titles"], tuple(read["trainers"]))


def _alike(text: str, names: Mapping[str, object]) -> list[str]:
    """Returns those of some names, with a 0 for every number, that are like an entry of the table."""
    if "*" not in text:
        return [text] if text in names else []
    first, *middle, last = text.split("*")
    inside = ((name, name[len(first) :]) for name in names if name.startswith(first) and name.endswith(last))
    return [name for name, rest in inside if _in_order(rest, [*middle, last])]


def _in_order(text: str, pieces: list[str]) -> bool:
    """Tells whether pieces stand in a text one behind the other; each where it first can, so that time is linear."""
    for piece in pieces:
        _, found, text = text.partition(piece) if piece else ("", "x", text)
        if not found:
            return False
    return True


def _tensor(text: str) -> KnownTensor:
    """Reads ``a.(b.)c | d.*: 2``."""
    alternatives, _, rank = text.partition(": ")
    names = (name for one in alternatives.split(" | ") for name in _spelled_out(one))
    return KnownTensor(tuple(names), int(rank) if rank else None)


def _spelled_out(text: str) -> list[str]:
    """Returns the names with and without each part in parentheses."""
    choices = [(part, "") if index % 2 else (part,) for index, part in enumerate(_OPTIONAL.split(text))]
    return ["".join(one) for one in product(*choices)]


def _road(text: str) -> Road:
    """Reads ``PRESET to WORD``, ``PRESET as ROLE`` or ``PRESET with FILE``."""
    preset, *words = text.split()
    said = dict(zip(words[::2], words[1::2], strict=True))
    return Road(preset, said.get("to", ""), said.get("as", ""), said.get("with", ""))
