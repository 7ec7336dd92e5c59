"""A way back held against what the mapping really made: which rules apply, what they must not touch, what comes out.

``mapping.undoing`` turns rules around by their templates. Which candidate made a tensor, and which names a template
matches besides, only the resolved mapping knows. Pure: names, shapes and types are enough.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.dropping import find_dropped
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.resolve import resolve
from shardmerge.mapping.spec import Rule, Term, references
from shardmerge.mapping.suggest import drop_lines
from shardmerge.mapping.variables import Variables
from shardmerge.tensors import Catalog, ReadSideFile, TensorEntry, composed, leaves


@dataclass(frozen=True, slots=True)
class Forward:
    """What a mapping came to.

    Attributes
    ----------
    opened, catalogs
        Its sources as they are, and with adapters merged and without what it drops.
    resolution
        What every target is made of.
    made
        The result as a checkpoint: names, types and shapes, no data.
    read
        Reads the configs that formulas ask.
    """

    opened: Mapping[str, Catalog]
    catalogs: Mapping[str, Catalog]
    resolution: Resolution
    made: Mapping[str, TensorEntry]
    read: ReadSideFile

    def has_tensors(self, source: str) -> bool:
        """Tells whether a source is more than a config."""
        return bool(self.opened[source].entries)

    def taken(self, source: str) -> Iterator[tuple[Rule, Term]]:
        """Yields each rule with each of its candidates that made something of a source."""
        seen = set()
        for one in self.resolution.assignments.values():
            if one.term is not None and (id(one.rule), id(one.term)) not in seen and _is_of(one, source):
                seen.add((id(one.rule), id(one.term)))
                yield one.rule, one.term

    def targets(self, source: str) -> dict[str, set[str]]:
        """Returns the targets that a source has a part in, by the template of the rule that made them."""
        found: dict[str, set[str]] = {}
        for target, one in self.resolution.assignments.items():
            if target in self.made and _is_of(one, source):
                found.setdefault(one.rule.target.text, set()).add(target)
        return found

    def resized(self, source: str) -> Iterator[tuple[str, Assignment, int, int]]:
        """Yields what a vocabulary gave other rows: target, assignment, the source's rows and the result's."""
        for target, one in self.resolution.assignments.items():
            shape, now = one.entry.shape, self.made[target].shape if target in self.made else one.entry.shape
            if _is_of(one, source) and now != shape:
                yield target, one, shape[0], now[0]

    def used(self, source: str) -> set[str]:
        """Returns the tensors of a source that are in the result, each by the name that owns its bytes."""
        every = (leaf for one in self.resolution.assignments.values() for leaf in leaves(one.entry))
        return {leaf.name for leaf in every if leaf.source == source}

    def merged(self, source: str) -> list[str]:
        """Returns the tensors of a source that an adapter was merged into and that are in the result."""
        changed = {name for name, entry in self.catalogs[source].entries.items() if composed(entry) is not None}
        used = {(one.source, one.name) for one in self.resolution.assignments.values()}
        return sorted(name for name in changed if (source, name) in used)


def _is_of(one: Assignment, source: str) -> bool:
    return one.term is not None and any(reference.source == source for reference in references(one.term))


@dataclass(frozen=True, slots=True)
class Fence:
    """What keeps the templates of a way back to the tensors that they are meant for.

    Attributes
    ----------
    rest
        Targets of the way back that match what others need, and have to stand under ``rest:``.
    drops
        Lines for what no rule needs, without the leading ``- ``.
    """

    rest: frozenset[str]
    drops: tuple[str, ...]


def fence(
    forward: Forward, source: str, ways: Mapping[str, Sequence[str]], origin: Mapping[str, str], made: str
) -> Fence:
    """Returns the fence of a way back.

    Parameters
    ----------
    forward, source
        What was made, and the source that is wanted back.
    ways
        By target of the way back, the templates of made names that it is made of.
    origin
        The template of the rule that made them, where it is written otherwise there.
    made
        What the way back calls the result.
    """
    allowed = forward.targets(source)
    mine = {text: allowed.get(origin.get(text, text), set()) for texts in ways.values() for text in texts}
    needed = set().union(*mine.values())
    matched = {text: _matched(text, forward.made) for text in mine}
    rest = frozenset(way for way, texts in ways.items() if any((matched[t] - mine[t]) & needed for t in texts))
    return Fence(rest, tuple(_drops(forward, needed, made)))


def _drops(forward: Forward, needed: set[str], made: str) -> Iterator[str]:
    """Yields a line for each rule whose targets are not needed, or for as few names as can be."""
    groups: dict[str, list[str]] = {}
    for name in forward.made:
        if name not in needed:
            groups.setdefault(forward.resolution.assignments[name].rule.target.text, []).append(name)
    for text, names in groups.items():
        every = (references(term) for name in names if (term := forward.resolution.assignments[name].term) is not None)
        sources = sorted({reference.source for one in every for reference in one})
        why = f"  # comes from {', '.join(sources)}" if sources else "  # made of nothing"
        if _matched(text, forward.made) & needed:
            lines = drop_lines(made, names, needed, most=len(names))
            yield from (line.removeprefix("- ") + why for line in lines)
        else:
            yield json.dumps(f"{made}:{text}", ensure_ascii=False) + why


def _matched(text: str, names: Mapping[str, TensorEntry]) -> set[str]:
    template = Template.parse(text)
    return {name for name in names if template.match(name) is not None}


def check_way_back(text: str, forward: Forward, source: str, made: str) -> None:
    """Resolves a way back against the result, and compares what comes out with what went in.

    Raises
    ------
    MappingError
        ``no-inverse``: it is not every tensor of the source that was used, under its name, of its shape.
    """
    spec = parse_spec(text, "the way back")
    catalogs = {name: forward.opened[name] for name in spec.sources if name != made}
    catalogs[made] = Catalog("", "", {n: replace(entry, source=made) for n, entry in forward.made.items()})
    variables = Variables(catalogs, forward.read, spec.variables)
    try:
        found = resolve(
            spec.rules, find_dropped(spec.drops, catalogs), catalogs, user_file=spec.file, variables=variables
        )
    except ShardmergeError as error:
        first = error.each()[0]
        raise _none(source, f"turned around it does not fit its own result: {first.what}") from error
    owners = forward.catalogs[source].aliases
    names = {owners.get(target, target): one for target, one in found.assignments.items()}
    wanted = forward.used(source)
    odd = sorted(wanted ^ set(names)) or sorted(n for n, one in names.items() if not _is_same(n, one, forward, source))
    if odd:
        raise _none(source, f"{count(len(odd), 'tensor')} would come back wrong, or not at all: {listed(odd)}")


def _is_same(name: str, back: Assignment, forward: Forward, source: str) -> bool:
    """Tells whether a tensor comes back from what it went into, and in its own shape."""
    ways = [leaf.name for leaf in leaves(back.entry)]
    fits = back.entry.shape == forward.catalogs[source][name].shape
    return fits and all(_went_into(name, source, forward.resolution.assignments[way]) for way in ways)


def _went_into(name: str, source: str, one: Assignment) -> bool:
    return any(leaf.source == source and leaf.name == name for leaf in leaves(one.entry))


def _none(source: str, why: str) -> MappingError:
    hint = "write the way back by hand; `shardmerge explain MAPPING --tensor NAME` tells what a tensor is made of"
    return MappingError("no-inverse", f"no way back to `{source}` is right: {why}", hint=hint)
