"""What a mapping comes to: which source tensor every target name takes."""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.mapping.spec import Rule, Term
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
    term
        The candidate of the rule; None where no rule was written.
    """

    target: str
    source: str
    name: str
    rule: Rule
    entry: TensorEntry
    pinned: bool = False
    term: Term | None = None


@dataclass(frozen=True, slots=True)
class Shadowed:
    """A source tensor that a rule would have taken for ``target``, if not another candidate or rule had made it.

    ``narrower`` tells that it was a narrower rule, not an earlier candidate.
    """

    source: str
    name: str
    target: str
    narrower: bool = False


@dataclass(frozen=True, slots=True)
class Copies:
    """A source tensor that stands in the output under several names.

    ``meant`` tells that the checkpoint itself ties these names, or that a preset makes them so.
    """

    source: str
    name: str
    targets: tuple[str, ...]
    meant: bool = False


@dataclass(frozen=True, slots=True)
class Resolution:
    """All assignments by target name, and the source tensors that are not in the output.

    Attributes
    ----------
    dropped
        (source, name).
    copies
        What is written more than once.
    """

    assignments: dict[str, Assignment]
    shadowed: tuple[Shadowed, ...]
    dropped: tuple[tuple[str, str], ...]
    copies: tuple[Copies, ...] = ()
