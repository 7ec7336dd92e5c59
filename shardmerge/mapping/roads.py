"""Where a recognised checkpoint can go, and which of the ways is wanted. Never chosen in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.mapping.layout_table import Layout
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.preset_files import Preset, list_presets, load_preset
from shardmerge.mapping.recognition import Recognised

SAME_NAMES = "same-names"


@dataclass(frozen=True, slots=True)
class PresetRoad:
    """A preset that leads away from a layout.

    Attributes
    ----------
    layout, preset
        From where, and by what.
    to
        What it makes.
    role
        Which of the preset's sources the checkpoint is.
    """

    layout: Layout
    preset: Preset
    to: str
    role: str

    @property
    def title(self) -> str:
        """For people."""
        return self.preset.title


@dataclass(frozen=True, slots=True)
class AdapterRoad:
    """An adapter, merged into the model it was trained on."""

    layout: Layout
    to: str = "hf/model"
    title: str = "The adapter merged into the model it was trained on (`adapters:`)"


@dataclass(frozen=True, slots=True)
class SameNamesRoad:
    """Every tensor keeps its name: for a cast, for a part, to be edited."""

    to: str = SAME_NAMES
    title: str = "Every tensor keeps its name, rules to edit"


Way = PresetRoad | AdapterRoad | SameNamesRoad


def ways(recognised: Recognised) -> tuple[Way, ...]:
    """Returns every way from here, that of the same names last."""
    layouts = [one for one in recognised.layouts if not one.refused]
    presets = (road for one in layouts for road in _presets(one))
    return (*(AdapterRoad(one) for one in layouts if one.adapter is not None), *presets, SameNamesRoad())


def _presets(layout: Layout) -> Iterator[PresetRoad]:
    known = list_presets()
    for road in layout.roads:
        if road.preset in known:
            preset = load_preset(road.preset)
            to = road.to or (preset.target.name if preset.target else preset.name)
            role = road.role or next(name for name, about in preset.roles.items() if about.required)
            yield PresetRoad(layout, preset, to, role)


def choose(recognised: Recognised, to: str, where: str) -> Way:
    """Returns the one way that leads to ``to``.

    Parameters
    ----------
    recognised
        What the checkpoint is.
    to
        A target (``hf/llava``), another tool's name (``torchtune``), a preset, or ``same-names``; empty where there is
        one way only. An adapter then goes into its base, and what no preset reads keeps its names.
    where
        The checkpoint's path.

    Raises
    ------
    MappingError
        ``no-road``: nothing goes to that target, or an adapter of a kind that nothing reads. ``several-roads``: more
        than one way is left, with all of them.
    """
    refused = next((one for one in recognised.layouts if one.refused), None)
    if refused is not None:
        raise MappingError("no-road", f"nothing here reads a {refused.name}", where=where, hint=refused.refused)
    every = ways(recognised)
    if not to:
        return _only(every, recognised, where)
    left = [one for one in every if to in _names(one)]
    if not left:
        known = list(dict.fromkeys(name for one in every for name in reversed(_names(one))))
        raise MappingError(
            "no-road",
            f"nothing leads from this checkpoint to {to!r}",
            where=where,
            found=recognised.title,
            expected=", ".join(known),
            hint=did_you_mean(to, known),
        )
    return left[0] if len(left) == 1 else _several(left, recognised, where)


def _names(way: Way) -> tuple[str, ...]:
    return (way.preset.name, way.to) if isinstance(way, PresetRoad) else (way.to,)


def _only(every: tuple[Way, ...], recognised: Recognised, where: str) -> Way:
    adapters = [one for one in every if isinstance(one, AdapterRoad)]
    if len(adapters) == len(recognised.layouts) == 1:
        return adapters[0]
    return every[0] if len(every) <= 2 else _several(every, recognised, where)


def _several(left: Iterable[Way], recognised: Recognised, where: str) -> Way:
    """Raises ``several-roads``."""
    left = tuple(left)
    targets = [one.to for one in left]
    lines = [f"--to {one.to if targets.count(one.to) == 1 else _names(one)[0]}: {one.title}" for one in left]
    raise MappingError(
        "several-roads",
        "several conversions are possible, and nothing here decides which is wanted",
        where=where,
        found=recognised.title,
        hint="say one of\n    " + "\n    ".join(lines),
    )
