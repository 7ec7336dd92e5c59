"""The numbers that a preset leaves to its user."""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.mapping.preset_files import Preset
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Term, references


def unsaid_numbers(preset: Preset) -> tuple[str, ...]:
    """Returns the numbers that an op of a preset names, and that are neither in ``let:`` nor captured."""
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
