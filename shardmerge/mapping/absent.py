"""Targets that rules would make of tensors which their source lists without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.mapping.spec import Reference, Rule, Term, references
from shardmerge.tensors import Catalog


@dataclass(frozen=True, slots=True)
class Unfilled:
    """A target name that was not made, or was made without one of its parts, for want of ``source:name``."""

    target: str
    source: str
    name: str


def unfilled(
    rules: Sequence[Rule], catalogs: Mapping[str, Catalog], made_by: Mapping[str, Term | None]
) -> Iterator[Unfilled]:
    """Yields what placeholders would have been part of, where no other candidate stands in for them.

    Parameters
    ----------
    rules, catalogs
        Of the mapping; without what it drops.
    made_by
        The term that made each target.
    """
    hollow = {source: sorted(catalog.absent) for source, catalog in catalogs.items() if catalog.absent}
    if not hollow:
        return
    for rule in rules:
        for candidate in rule.candidates:
            for reference in references(candidate):
                for name in hollow.get(reference.source, ()):
                    target = _target(rule, candidate, reference, name, made_by)
                    if target:
                        yield Unfilled(target, reference.source, name)


def _target(rule: Rule, term: Term, reference: Reference, name: str, made_by: Mapping[str, Term | None]) -> str:
    """Returns the target that lacks the tensor, ``""`` where there is none."""
    bindings = reference.template.match(name)
    if bindings is None:
        return ""
    if not rule.target.formulas and set(rule.target.captures) <= set(bindings):
        if not rule.target.fits(bindings):
            return ""
        target = rule.target.format(bindings)
        return target if made_by.get(target, term) is term else ""
    # Which target it is takes numbers that are not known here: one that this term made, or any that the rule did not.
    mine = [target for target, maker in made_by.items() if rule.target.match(target) is not None]
    own = next((target for target in mine if made_by[target] is term), "")
    return own or ("" if mine else str(rule.target))
