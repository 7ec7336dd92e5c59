"""Tensors as a tree of components, with number, parameters and bytes of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from shardmerge.display.card import Kind
from shardmerge.plan.catalog_tree import labels
from shardmerge.plan.name_patterns import NamePattern, name_patterns


@dataclass(slots=True)
class Branch:
    """A component: what is below it, and the tensors that bear its name.

    Attributes
    ----------
    label
        A part of the names, as a pattern: ``layers.0-31``.
    count, parameters, nbytes
        Of all that is below.
    """

    label: str
    branches: dict[str, Branch] = field(default_factory=dict)
    patterns: list[NamePattern[Kind]] = field(default_factory=list)
    count: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, pattern: NamePattern[Kind]) -> None:
        """Counts the tensors of a pattern."""
        shape, dtype, _ = pattern.kind
        elements = pattern.count * prod(shape)
        self.count += pattern.count
        self.parameters += elements
        self.nbytes += elements * dtype.itemsize


def grown(tensors: Iterable[tuple[str, Kind]]) -> list[Branch]:
    """Returns the components of tensors, in the order of their first names."""
    root = Branch("")
    for pattern in name_patterns(tensors):
        node = root
        for label in labels(pattern):
            node = node.branches.setdefault(label, Branch(label))
            node.add(pattern)
        node.patterns.append(pattern)
    return [_joined(one) for one in root.branches.values()]


def _joined(branch: Branch) -> Branch:
    """Returns a branch that carries on the name of its parent where the parent had no other."""
    while len(branch.branches) == 1 and not branch.patterns:
        (below,) = branch.branches.values()
        below.label = f"{branch.label}.{below.label}"
        branch = below
    branch.branches = {label: _joined(one) for label, one in branch.branches.items()}
    return branch


def unfolded(branches: list[Branch], most: int) -> list[Branch]:
    """Returns up to ``most`` branches: the largest one gives way to what is below it as long as there is room."""
    while True:
        below = [one for one in branches if one.branches and not one.patterns]
        largest = max(below, key=lambda one: one.nbytes, default=None)
        if largest is None or len(branches) - 1 + len(largest.branches) > most:
            return branches
        at = branches.index(largest)
        for one in largest.branches.values():
            one.label = f"{largest.label}.{one.label}"
        branches = [*branches[:at], *largest.branches.values(), *branches[at + 1 :]]
