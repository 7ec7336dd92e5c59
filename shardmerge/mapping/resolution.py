"""What a mapping comes to: which source tensor every target name takes."""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.mapping.spec import Rule
from shardmerge.tensors import TensorEntry


@dataclass(frozen=True, slots=True)
class Assignment:
    """A target name and what it is made of.

    Attributes
    ----------
    source, name
        The tensor it takes, or the first of an op's; ``name`` may be an alias. Empty for an op that needs none.
    entry
        The tensor, or the whole expression.
    pinned
        Whether the rule itself says the type.
    """

    target: str
    source: str
    name: str
    rule: Rule
    entry: TensorEntry
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Resolution:
    """All assignments by target name, and the source tensors that are not in the output.

    Attributes
    ----------
    shadowed
        (source, name, target): an earlier candidate has the tensor.
    dropped
        (source, name).
    """

    assignments: dict[str, Assignment]
    shadowed: tuple[tuple[str, str, str], ...]
    dropped: tuple[tuple[str, str], ...]
