"""Who makes which target name: the claims of all rules, and which of several rules has it. Pure.

A rule of ``tensors:`` goes before one of ``rest:``, then the narrower rule before the wider one. Two rules of which
neither is narrower are an error. The order of rules never matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.mapping.narrower import effective, is_narrower
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.resolution import Assignment, Copies, Shadowed
from shardmerge.mapping.spec import Reference, Rule, Term, references
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.ops.contract import Mirror
from shardmerge.tensors import leaves

Clash: TypeAlias = "list[tuple[Assignment, Assignment]]"


@dataclass(frozen=True, slots=True)
class Claim:
    """A target, what a candidate of a rule makes it of, and the (source, name) of every tensor that it uses."""

    assignment: Assignment
    operands: tuple[tuple[str, str], ...]

    @property
    def term(self) -> Term | None:
        """The candidate."""
        return self.assignment.term

    @property
    def rule(self) -> Rule:
        """Whose claim it is."""
        return self.assignment.rule


@dataclass(slots=True)
class Claims:
    """All claims by target: the first one apart, since most targets have no other."""

    _first: dict[str, Claim] = field(default_factory=dict)
    _more: dict[str, list[Claim]] = field(default_factory=dict)
    _passed: list[tuple[str, Claim]] = field(default_factory=list)
    _clashes: dict[tuple[Mark, Mark], Clash] = field(default_factory=dict)
    _narrower: dict[tuple[int, int], bool] = field(default_factory=dict)

    def by(self, rule: Rule, target: str) -> Claim | None:
        """Returns the claim of a rule on a target."""
        first = self._first.get(target)
        if first is None or first.rule is rule:
            return first
        return next((claim for claim in self._more.get(target, ()) if claim.rule is rule), None)

    def add(self, claim: Claim) -> None:
        """Takes a claim; a later candidate of the same rule is passed over."""
        target = claim.assignment.target
        earlier = self.by(claim.rule, target)
        if earlier is not None and earlier.term is claim.term:
            self._clash(earlier, claim)  # two names that one candidate makes into one
        elif earlier is not None:
            self._passed.append(("shadowed", claim))
        elif target in self._first:
            self._more.setdefault(target, []).append(claim)
        else:
            self._first[target] = claim

    def settled(self) -> tuple[dict[str, Assignment], list[Clash]]:
        """Returns what every target is made of, and the clashes: pairs of assignments, for each pair of rules."""
        for target, more in self._more.items():
            every = [self._first[target], *more]
            best = [one for one in every if not any(self._beats(other.rule, one.rule) for other in every)]
            for other in best[1:]:
                self._clash(best[0], other)
            self._first[target] = best[0]
            losers = (one for one in every if one not in best)
            self._passed += [("shadowed" if best[0].rule.rest != one.rule.rest else "narrower", one) for one in losers]
        return {target: claim.assignment for target, claim in self._first.items()}, list(self._clashes.values())

    def shadowed(self, made: Mapping[str, Assignment]) -> tuple[Shadowed, ...]:
        """Returns the tensors that only claims without success are for."""
        if not self._passed:
            return ()
        used = {pair for target, claim in self._first.items() if target in made for pair in claim.operands}
        return tuple(
            Shadowed(source, name, claim.assignment.target, narrower=why == "narrower")
            for why, claim in self._passed
            for source, name in claim.operands
            if (source, name) not in used
        )

    def copies(self, made: Mapping[str, Assignment]) -> tuple[Copies, ...]:
        """Returns the source tensors that stand in the output under more than one name."""
        found: dict[tuple[str, str], list[Claim]] = {}
        for target, claim in self._first.items():
            if target in made and claim.term is not None and _is_whole(claim.term):
                found.setdefault((claim.assignment.source, _owner(claim)), []).append(claim)
        return tuple(_copies(source, name, group) for (source, name), group in found.items() if len(group) > 1)

    def beaten(self, rule: Rule, target: str) -> bool:
        """Tells whether another rule makes a target that goes before this one."""
        first = self._first.get(target)
        every = [*([first] if first is not None else []), *self._more.get(target, ())]
        return any(self._beats(claim.rule, rule) for claim in every if claim.rule is not rule)

    def _beats(self, one: Rule, other: Rule) -> bool:
        if one.rest != other.rest:
            return other.rest
        key = (id(one), id(other))
        if key not in self._narrower:
            self._narrower[key] = is_narrower(_target(one), _target(other))
        return self._narrower[key]

    def _clash(self, before: Claim, after: Claim) -> None:
        pair = (before.assignment, after.assignment)
        self._clashes.setdefault((before.rule.mark, after.rule.mark), []).append(pair)


def _is_whole(term: Term) -> bool:
    """Tells whether a term is one tensor with all of its elements: as it is, cast, or turned around."""
    if isinstance(term, Reference):
        return True
    return (term.kind.name == "cast" or isinstance(term.kind.inverse, Mirror)) and all(map(_is_whole, term.inputs))


def _owner(claim: Claim) -> str:
    """The name that owns the bytes: two tied names are one tensor."""
    entry = claim.assignment.entry
    return entry.name or next(leaves(entry)).name


def _target(rule: Rule) -> Template:
    names = [one.template for candidate in rule.candidates for one in references(candidate)]
    return effective(rule.target, names)


def _copies(source: str, name: str, group: list[Claim]) -> Copies:
    tied = len({claim.assignment.name for claim in group}) == len(group)
    meant = tied or any(claim.rule.optional for claim in group)
    return Copies(source, name, tuple(claim.assignment.target for claim in group), meant)
