"""A mapping to begin with, for a checkpoint that was recognised. It plans, once its FILL_INs are filled in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import MappingError, UsageError
from shardmerge.mapping.near import count, did_you_mean, printable
from shardmerge.mapping.pattern import Template, escape
from shardmerge.mapping.preset_files import Preset
from shardmerge.recognition.grouped_names import by_part, group
from shardmerge.recognition.recognised import Recognised
from shardmerge.recognition.roads import Route, choose, routes
from shardmerge.recognition.table import Layout
from shardmerge.recognition.unsaid import unsaid_numbers
from shardmerge.targets.training_config import read_training_config
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.tensors.wrapped_names import stripped

_FILL_IN = "FILL_IN"
_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embeddings.weight")
_BASE = "base"
# Names beside a wrapped model that are dropped one by one; of more, all that begin alike.
_MOST_DROPS = 12


@dataclass(frozen=True, slots=True)
class Found:
    """A source as the mapping names it, and what it is.

    Attributes
    ----------
    base_name, base
        What its adapter_config.json calls the model that it was trained on; and that one, where it is a directory here.
    """

    path: str
    catalog: Catalog
    recognised: Recognised
    base_name: str = ""
    base: Found | None = None


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


def propose(checkpoint: Found, bases: Mapping[str, Found], to: str = "", out: str = "out/model") -> Proposal:
    """Returns a mapping for a checkpoint.

    Parameters
    ----------
    checkpoint
        What to convert.
    bases
        The other sources, by the preset's names for them; ``base`` for what an adapter was trained on.
    to, out
        As for ``choose``; and the output path to write down.

    Raises
    ------
    MappingError
        As ``choose``. ``unknown-layout``: there are no tensors.
    UsageError
        ``unknown-source``: a base that there is no use for.
    """
    if not checkpoint.catalog.entries:
        what = "the checkpoint holds no tensors, and so no layout"
        raise MappingError("unknown-layout", what, where=checkpoint.catalog.path)
    route = choose(checkpoint.recognised, to, checkpoint.catalog.path)
    for name in bases:
        if name not in route.others:
            reader = f"the preset {route.preset.name}" if route.preset else "this mapping"
            what = f"{reader} has no use for a base {name!r}"
            raise UsageError(
                "unknown-source", what, expected=", ".join(route.others), hint=did_you_mean(name, route.others)
            )
    named = {_BASE: checkpoint.base} if route.merges and checkpoint.base else {}
    writer = _MappingWriter(route, {**named, route.role: checkpoint, **bases})
    return Proposal("\n".join(writer.lines(out)) + "\n", tuple(writer.notes()))


@dataclass(frozen=True, slots=True)
class _MappingWriter:
    route: Route
    found: Mapping[str, Found]

    @property
    def checkpoint(self) -> Found:
        return self.found[self.route.role]

    def lines(self, out: str) -> Iterator[str]:
        title = self.checkpoint.recognised.title or "nothing that is known here"
        yield "# Written by `shardmerge init`. `shardmerge plan` shows what it does."
        yield f"# Recognised: {title}. To: {self.route.to}."
        yield from (f"# Look at this: {note}" for note in self.notes())
        chosen = self.route.preset.name if self.route.preset else ""
        others = (
            one.preset
            for one in routes(self.checkpoint.recognised)
            if one.preset is not None and one.preset.name != chosen
        )
        yield from (f"# Another way from here: `use: {one.name}`, {one.title}." for one in others)
        yield "shardmerge: 1"
        yield "sources:"
        for name in self.route.preset.roles if self.route.preset else (*self.route.others, self.route.role):
            yield from self._source(name)
        yield "output:"
        yield f"  path: {_quoted(out)}"
        yield "  # dtype: bfloat16  # of all float tensors; each keeps its own where nothing is said"
        if self.route.preset:
            yield from self._preset(self.route.preset)
        else:
            yield from self._adapter(self.route.layout) if self.route.layout else self._same_names()
        yield from self._drops()

    def _source(self, name: str) -> Iterator[str]:
        if self.route.preset:
            yield f"  # {self.route.preset.roles[name].about}"
        elif name == _BASE:
            yield "  # the model that the adapter was trained on, with its config.json and tokenizer"
        if name in self.found:
            found = self.found[name]
            title = found.recognised.title or "no layout that is known here"
            yield f"  # {found.catalog.kind}, {count(len(found.catalog.entries), 'tensor')}: {title}"
            strip, path = self._strip(name, found), _quoted(found.path)
            yield f"  {name}: {{path: {path}, strip: {strip}}}" if strip else f"  {name}: {path}"
        elif self._reason(name):
            yield f"  # Needed: {self._reason(name)}"
            yield f"  {name}: {_FILL_IN}_{name}"
        else:
            yield f"  # {name}: PATH  # not needed, as far as the names tell"

    def _strip(self, name: str, found: Found) -> str:
        """Returns the prefixes that a source needs taken off, as YAML; nothing where its preset takes them off."""
        known = self.route.preset.roles[name].strip if self.route.preset else ()
        words = found.recognised.wrappers
        return "" if set(words) <= set(known) else json.dumps(list(words))

    def _preset(self, preset: Preset) -> Iterator[str]:
        yield f"use: {preset.name}"
        numbers = unsaid_numbers(preset)
        if numbers:
            yield "let:"
            yield from (f"  {name}: {_FILL_IN}_{name}" for name in numbers)

    def _adapter(self, layout: Layout) -> Iterator[str]:
        role = self.route.role
        base = next(iter(self.route.others), role)
        names = f'"{role}:{layout.adapter}{{rest...}}"' if layout.adapter else role
        alpha = "" if self._says_alpha() else f", alpha: {_FILL_IN}_alpha"
        if base not in self.found or "config.json" in self.found[base].catalog.side_files:
            yield f"target: {{name: hf/model, text: {base}}}  # its config.json and tokenizer go along"
        yield "adapters:"
        yield f"  - {{from: {names}, onto: {base}{alpha}}}"
        yield "tensors:"
        yield f'  "{{rest...}}": "{base}:{{rest...}}"'

    def _says_alpha(self) -> bool:
        catalog = self.checkpoint.catalog
        inside = self.route.layout is not None and self.route.layout.alpha_inside
        return inside or "adapter_config.json" in catalog.side_files or bool(catalog.training_config)

    def _same_names(self) -> Iterator[str]:
        recognised, own = self.checkpoint.recognised, self.route.role
        foreign = recognised.layouts and not any(one.model_types for one in recognised.layouts)
        if "config.json" in self.checkpoint.catalog.side_files and not foreign and not recognised.remarks:
            yield f"target: {{name: hf/model, text: {own}}}  # config.json and tokenizer go along"
        yield "tensors:"
        tensors = dict(_without_wrappers(self.checkpoint))
        for one in group(tensors):
            yield from (f"  {line}" for line in one.lines(own, tensors))

    def _drops(self) -> Iterator[str]:
        recognised, layout = self.checkpoint.recognised, self.route.layout
        outside = [stripped(name, recognised.wrappers) for name in recognised.outside]
        names = [name for name, _ in _without_wrappers(self.checkpoint)]
        if layout is not None and self.route.merges:
            outside += [name for name in names if not name.startswith(layout.adapter or "")]
        few = len(outside) <= _MOST_DROPS
        drops = [*(map(escape, outside) if few else dict.fromkeys(map(by_part, outside)))]
        drops += _of_other_models(layout.drops if layout else (), names)
        if drops:
            yield "drop:  # what stands beside it"
            yield from (f"  - {_quoted(f'{self.route.role}:{one}')}" for one in drops)

    def _reason(self, name: str) -> str:
        """Returns why a source that is not given is needed, or ``""``."""
        if self.route.preset is None or self.route.layout is None:
            return "the adapter is no model without it"
        want = self.route.layout.needs.get(name)
        if want is not None and want.unless_file not in self.checkpoint.catalog.side_files:
            return want.why
        return "the preset cannot do without it" if self.route.preset.roles[name].required else ""

    def notes(self) -> Iterator[str]:
        """Yields what is not decided yet."""
        recognised = self.checkpoint.recognised
        yield from recognised.remarks
        if recognised.wrappers:
            words = ", ".join(f"`{word}`" for word in recognised.wrappers)
            yield f"the names are those of a wrapped model: {words} is taken off"
        if recognised.outside:
            names = ", ".join(printable(one) for one in recognised.outside[:3])
            yield f"{count(len(recognised.outside), 'tensor')} beside the model dropped: {names}"
        yield from self._missing()
        rows = {name: number for name, found in self.found.items() if (number := vocabulary_rows(found.catalog))}
        if len(set(rows.values())) > 1:
            shown = ", ".join(f"{number:,} in {name}" for name, number in rows.items())
            yield f"the vocabularies differ in rows: {shown}; `vocabulary: {{rows: N}}` says how many are wanted"
        if len(recognised.layouts) > 1:
            yield f"several layouts fit: {recognised.title}"

    def _missing(self) -> Iterator[str]:
        for name in self.route.others:
            if name not in self.found and self._reason(name):
                yield f"the source `{name}` is missing: {self._reason(name)}{self._trained_on(name)}"
        if self.route.merges and not self._says_alpha():
            yield "the adapter's `alpha` is missing: no file says it"
        for name in unsaid_numbers(self.route.preset) if self.route.preset else ():
            yield f"`let: {{{name}: NUMBER}}` is missing: no file says it"

    def _trained_on(self, name: str) -> str:
        """Returns what the adapter's or the training config says of a base."""
        if name == _BASE and self.checkpoint.base_name:
            return f"; adapter_config.json names {self.checkpoint.base_name!r}"
        facts = read_training_config(self.checkpoint.catalog.training_config)
        path = {"llm": facts.llm_path, "vision": facts.vision_path, _BASE: facts.llm_path}.get(name, "")
        return f"; the training config names {path!r}" if path else ""


def _without_wrappers(found: Found) -> Iterator[tuple[str, TensorEntry]]:
    outside = frozenset(found.recognised.outside)
    for name in found.catalog.names():
        if name not in outside:
            yield stripped(name, found.recognised.wrappers), found.catalog[name]


def _of_other_models(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns the templates that match some names, where there are names besides."""
    found = {text: sum(Template.parse(text).match(name) is not None for name in names) for text in templates}
    return [text for text, number in found.items() if number] if sum(found.values()) < len(names) else []


def vocabulary_rows(catalog: Catalog) -> int:
    """Returns the rows of a checkpoint's embedding where it lies in one tensor; 0 for none, or several ranks of it."""
    rows = [catalog[name].shape[0] for name in catalog.names() if name.endswith(_EMBEDDINGS) and catalog[name].shape]
    return rows[0] if len(rows) == 1 else 0


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
