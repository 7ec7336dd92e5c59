"""The numbers that a preset leaves to its user."""

from __future__ import annotations

from shardmerge.mapping.preset_files import Preset
from shardmerge.mapping.spec import formulas_of, references


def unsaid_numbers(preset: Preset) -> tuple[str, ...]:
    """Returns the numbers that an op of a preset names, and that are neither in ``let:`` nor captured."""
    found: dict[str, None] = {}
    for rule in preset.rules:
        captured = set(rule.target.captures) | set(rule.ranges)
        for term in rule.candidates:
            captured |= {name for one in references(term) for name in one.template.captures}
            names = (name for formula in formulas_of(term) for name in formula.names)
            found |= {name: None for name in names if "." not in name and name not in captured}
    return tuple(name for name in found if name not in preset.variables)
