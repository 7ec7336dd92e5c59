"""What a checkpoint is, by its names and shapes, and a mapping to begin with. Pure; nothing is guessed in silence.

The table of layouts is ``mapping.fingerprints``. What fits several layouts, or leads to several targets, is an error
with all candidates until the caller says which target is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shardmerge.errors import MappingError, UsageError
from shardmerge.mapping.fingerprints import LAYOUTS, KnownTensor, Layout, Road, Want
from shardmerge.mapping.near import count, did_you_mean, listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.preset_files import Preset, list_presets, load_preset
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Term, references
from shardmerge.shown import inspecting
from shardmerge.targets.training_config import read_training_config
from shardmerge.tensors import Catalog

_FILL_IN = "FILL_IN"
_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight")


@dataclass(frozen=True, slots=True)
class FittingRoad:
    """A layout that fits, a preset from there, and what that makes."""

    layout: Layout
    road: Road
    preset: Preset
    to: str


@dataclass(frozen=True, slots=True)
class Found:
    """A source as the mapping names it, and its catalog."""

    path: str
    catalog: Catalog


@dataclass(frozen=True, slots=True)
class Proposal:
    """A mapping to begin with.

    Attributes
    ----------
    text
        The mapping, as YAML with comments.
    notes
        What the user has to fill in or to decide.
    """

    text: str
    notes: tuple[str, ...]


def recognise(catalog: Catalog) -> tuple[Layout, ...]:
    """Returns every layout of the table that the names and shapes of a checkpoint fit."""
    names = list(catalog.names())
    return tuple(layout for layout in LAYOUTS if _fits(layout, names, catalog))


def _fits(layout: Layout, names: list[str], catalog: Catalog) -> bool:
    if any(next(_matching(text, names), "") for text in layout.without):
        return False
    return all(_has(tensor, names, catalog) for tensor in layout.tensors)


def _has(known: KnownTensor, names: list[str], catalog: Catalog) -> bool:
    for text in known.names:
        for name in _matching(text, names):
            entry = catalog[name]
            if known.rank is None or (len(entry.shape) == known.rank and entry.dtype.kind == "float"):
                return True
    return False


def _matching(text: str, names: Iterable[str]) -> Iterator[str]:
    template = Template.parse(text)
    return (name for name in names if template.match(name) is not None)


def candidates(catalog: Catalog) -> tuple[FittingRoad, ...]:
    """Returns every way from here; a preset that does not come with this version is none."""
    known = list_presets()
    found = []
    for layout in recognise(catalog):
        for road in layout.roads:
            if road.preset in known:
                preset = load_preset(road.preset)
                to = road.to or (preset.target.name if preset.target else preset.name)
                found.append(FittingRoad(layout, road, preset, to))
    return tuple(found)


def choose(catalog: Catalog, to: str) -> FittingRoad:
    """Returns the one way that leads to ``to``.

    Parameters
    ----------
    catalog
        The checkpoint.
    to
        A target (``hf/llava``), another tool's name (``torchtune``) or a preset; empty where there is one way only.

    Raises
    ------
    MappingError
        ``unknown-layout``: the names fit nothing in the table, or nothing leads away from it. ``no-road``: nothing goes
        to that target. ``several-roads``: more than one way is left, with all of them.
    """
    every = candidates(catalog)
    if not every:
        raise _unknown(catalog)
    left = [one for one in every if to in ("", one.to, one.preset.name)]
    if not left:
        known = [*dict.fromkeys(one.to for one in every), *(one.preset.name for one in every)]
        raise MappingError(
            "no-road",
            f"nothing leads from this checkpoint to {to!r}",
            where=catalog.path,
            found=_layouts(every),
            expected=", ".join(known),
            hint=did_you_mean(to, known),
        )
    if len(left) > 1:
        targets = [one.to for one in left]
        lines = [
            f"--to {one.to if targets.count(one.to) == 1 else one.preset.name}: {one.preset.title}" for one in left
        ]
        raise MappingError(
            "several-roads",
            "several conversions are possible, and nothing here decides which is wanted",
            where=catalog.path,
            found=_layouts(left),
            hint="say one of\n    " + "\n    ".join(lines),
        )
    return left[0]


def _layouts(found: Iterable[FittingRoad]) -> str:
    return "; ".join(dict.fromkeys(one.layout.name for one in found))


def _unknown(catalog: Catalog) -> MappingError:
    layouts = recognise(catalog)
    return MappingError(
        "unknown-layout",
        "no preset leads away from this layout" if layouts else "the names and shapes fit no layout that is known here",
        where=catalog.path,
        found="; ".join(layout.name for layout in layouts) or listed(list(catalog.names()), 3),
        expected="; ".join(layout.name for layout in LAYOUTS),
        hint=f"write `tensors:` yourself; {inspecting(catalog.path)} lists the names",
    )


def propose(checkpoint: Found, bases: Mapping[str, Found], to: str = "", out: str = "out/model") -> Proposal:
    """Returns a mapping for a checkpoint.

    Parameters
    ----------
    checkpoint
        What to convert.
    bases
        The preset's other sources, by name.
    to, out
        As for ``choose``; and the output path to write down.

    Raises
    ------
    MappingError
        As ``choose``.
    UsageError
        ``unknown-source``: a base that the preset has no use for.
    """
    chosen = choose(checkpoint.catalog, to)
    preset = chosen.preset
    own = chosen.road.role or next(name for name, role in preset.roles.items() if role.required)
    for name in bases:
        if name not in preset.roles or name == own:
            others = [role for role in preset.roles if role != own]
            what = f"the preset {preset.name} has no use for a base {name!r}"
            hint = did_you_mean(name, others)
            raise UsageError("unknown-source", what, expected=", ".join(others), hint=hint)
    writer = _MappingWriter(chosen, own, {own: checkpoint, **bases})
    return Proposal("\n".join(writer.lines(out)) + "\n", tuple(writer.notes()))


@dataclass(frozen=True, slots=True)
class _MappingWriter:
    chosen: FittingRoad
    own: str
    found: Mapping[str, Found]

    @property
    def checkpoint(self) -> Catalog:
        return self.found[self.own].catalog

    def lines(self, out: str) -> Iterator[str]:
        preset = self.chosen.preset
        yield "# Written by `shardmerge init`. `shardmerge plan` shows what it does."
        yield f"# Recognised: {self.chosen.layout.name}. To: {self.chosen.to}."
        yield from (f"# Look at this: {note}" for note in self.notes())
        others = [one for one in candidates(self.checkpoint) if one.preset.name != preset.name]
        yield from (f"# Another way from here: `use: {one.preset.name}`, {one.preset.title}." for one in others)
        yield "shardmerge: 1"
        yield "sources:"
        for name in preset.roles:
            yield from self._source(name)
        yield "output:"
        yield f"  path: {_quoted(out)}"
        yield "  # dtype: bfloat16  # of all float tensors; each keeps its own where nothing is said"
        yield f"use: {preset.name}"
        numbers = unsaid_numbers(preset)
        if numbers:
            yield "let:"
            yield from (f"  {name}: {_FILL_IN}_{name}" for name in numbers)

    def _source(self, name: str) -> Iterator[str]:
        yield f"  # {self.chosen.preset.roles[name].about}"
        if name in self.found:
            catalog = self.found[name].catalog
            kinds = "; ".join(layout.name for layout in recognise(catalog)) or "no layout that is known here"
            yield f"  # {catalog.kind}, {count(len(catalog.entries), 'tensor')}: {kinds}"
            yield f"  {name}: {_quoted(self.found[name].path)}"
        elif self.reason(name):
            yield f"  # Needed: {self.reason(name)}"
            yield f"  {name}: {_FILL_IN}_{name}"
        else:
            yield f"  # {name}: PATH  # not needed, as far as the names tell"

    def reason(self, name: str) -> str:
        """Returns why a source that is not given is needed, or ``""``."""
        wants = (want for want in self.chosen.layout.wants if want.role == name and self._holds(want))
        want = next(wants, None)
        if want is not None:
            return want.reason
        return "the preset cannot do without it" if self.chosen.preset.roles[name].required else ""

    def _holds(self, want: Want) -> bool:
        if want.unless_file and want.unless_file in self.checkpoint.side_files:
            return False
        return not (want.unless and next(_matching(want.unless, self.checkpoint.names()), ""))

    def notes(self) -> Iterator[str]:
        """Yields what is not decided yet."""
        for name in self.chosen.preset.roles:
            if name not in self.found and self.reason(name):
                yield f"the source `{name}` is missing: {self.reason(name)}{self._trained_on(name)}"
        yield from (
            f"`let: {{{name}: NUMBER}}` is missing: no file says it" for name in unsaid_numbers(self.chosen.preset)
        )
        rows = {name: number for name, found in self.found.items() if (number := vocabulary_rows(found.catalog))}
        if len(set(rows.values())) > 1:
            shown = ", ".join(f"{number:,} in {name}" for name, number in rows.items())
            yield f"the vocabularies differ in rows: {shown}; `vocabulary: {{rows: N}}` says how many are wanted"
        layouts = recognise(self.checkpoint)
        if len(layouts) > 1:
            yield f"several layouts fit: {'; '.join(layout.name for layout in layouts)}"

    def _trained_on(self, name: str) -> str:
        """Returns what the training config says of a base."""
        facts = read_training_config(self.checkpoint.training_config)
        path = {"llm": facts.llm_path, "vision": facts.vision_path}.get(name, "")
        return f"; the training config names {path!r}" if path else ""


def vocabulary_rows(catalog: Catalog) -> int:
    """Returns the rows of a checkpoint's embedding where it lies in one tensor; 0 for none, or several ranks of it."""
    rows = [catalog[name].shape[0] for name in catalog.names() if name.endswith(_EMBEDDINGS) and catalog[name].shape]
    return rows[0] if len(rows) == 1 else 0


def unsaid_numbers(preset: Preset) -> tuple[str, ...]:
    """Returns the numbers that a preset leaves to its user: named by an op, and neither in ``let:`` nor captured."""
    found: dict[str, None] = {}
    for rule in preset.rules:
        captured = set(rule.target.captures) | set(rule.ranges)
        for term in rule.candidates:
            captured |= {name for one in references(term) for name in one.template.captures}
            names = (name for argument in _arguments(term) for formula in argument.formulas for name in formula.names)
            found |= {name: None for name in names if "." not in name and name not in captured}
    return tuple(name for name in found if name not in preset.variables)


def _arguments(term: Term) -> Iterator[Argument]:
    if isinstance(term, OpTerm):
        yield from term.arguments.values()
        for one in term.inputs:
            if not isinstance(one, Reference):
                yield from _arguments(one)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
