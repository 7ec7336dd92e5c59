"""Where a recognised checkpoint can go, and which of the ways is wanted. Never chosen in silence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.preset_files import Preset, list_presets, load_preset
from shardmerge.recognition.recognised import Recognised
from shardmerge.recognition.table import Layout


@dataclass(frozen=True, slots=True)
class Route:
    """A way from a layout: a preset, the merge of an adapter into its base, or rules that keep every name.

    Attributes
    ----------
    to, title
        What it makes, and how it is called for people.
    role
        What the checkpoint is called in the mapping.
    others
        What its other sources are called.
    layout
        From where; None for the one that keeps names.
    preset
        None for the two that need none.
    """

    to: str
    title: str
    role: str
    others: tuple[str, ...] = ()
    layout: Layout | None = None
    preset: Preset | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What ``--to`` may say for it, the most exact first."""
        return (self.preset.name, self.to) if self.preset else (self.to,)

    @property
    def merges(self) -> bool:
        """Whether it merges an adapter without a preset."""
        return self.layout is not None and self.preset is None


_SAME_NAMES = Route("same-names", "Every tensor keeps its name, rules to edit", "source")
_MERGED = "The adapter merged into the model it was trained on (`adapters:`)"


def routes(recognised: Recognised) -> tuple[Route, ...]:
    """Returns every way from here, that of the same names last."""
    found = recognised.layouts
    merges = (_merge(one) for one in found if one.adapter is not None)
    return (*merges, *(route for one in found for route in _presets(one, recognised.files)), _SAME_NAMES)


def _merge(layout: Layout) -> Route:
    role, others = ("run", ()) if layout.own_base else ("adapter", ("base",))
    return Route("hf/model", _MERGED, role, others, layout)


def _presets(layout: Layout, files: Collection[str]) -> Iterator[Route]:
    known = list_presets()
    for road in layout.open_roads(files):
        if road.preset in known:
            preset = load_preset(road.preset)
            to = road.to or (preset.target.name if preset.target else preset.name)
            role = road.role or next(name for name, about in preset.roles.items() if about.required)
            others = tuple(name for name in preset.roles if name != role)
            yield Route(to, preset.title, role, others, layout, preset)


def choose(recognised: Recognised, to: str, where: str) -> Route:
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
        ``no-conversion``: nothing goes to that target. ``ambiguous-conversion``: more than one is possible; the hint
        lists them.
    """
    every = routes(recognised)
    left = [one for one in every if to in one.names] if to else _unasked(every, recognised)
    if not left:
        known = list(dict.fromkeys(name for one in every for name in reversed(one.names)))
        raise MappingError(
            "no-conversion",
            f"there is no conversion from this checkpoint to {to!r}",
            where=where,
            found=recognised.title,
            expected=", ".join(known),
            hint=did_you_mean(to, known),
        )
    if len(left) > 1:
        targets = [one.to for one in left]
        lines = [f"--to {one.to if targets.count(one.to) == 1 else one.names[0]}: {one.title}" for one in left]
        raise MappingError(
            "ambiguous-conversion",
            "several conversions are possible for this checkpoint",
            where=where,
            found=recognised.title,
            hint="choose one:\n    " + "\n    ".join(lines),
        )
    return left[0]


def _unasked(every: Sequence[Route], recognised: Recognised) -> Sequence[Route]:
    """Returns what is left where nobody says which: an adapter goes into its base, and of two ways one keeps names."""
    adapter = [one for one in every if one.merges and len(recognised.layouts) == 1]
    return adapter or (every[:1] if len(every) <= 2 else every)
