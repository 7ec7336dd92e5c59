"""What carrying out a plan, or a share of it, came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.execute.records import RecordCounts
from shardmerge.plan.value import Plan
from shardmerge.publish.left_over import LeftOver
from shardmerge.shown import Displayed

if TYPE_CHECKING:
    from shardmerge.execute.engine import Outcome


@dataclass(frozen=True, slots=True, repr=False)
class Result(Displayed):
    """A published directory.

    Attributes
    ----------
    path
        The directory.
    plan
        What was carried out.
    outcome
        Overflows, checksums, bytes.
    records
        What became of the checksums that source files carry.
    made
        How many parts were made; the others had been made before.
    left_over
        What runs of other plans left beside it.
    """

    path: Path
    plan: Plan
    outcome: Outcome
    records: RecordCounts = field(default_factory=RecordCounts)
    made: int = 0
    left_over: tuple[LeftOver, ...] = ()


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What one of several that make a plan's parts has done, while others are missing.

    Attributes
    ----------
    made
        How many parts it made.
    missing
        How many have no receipt yet.
    count
        How many there are.
    elsewhere
        Whether another one has finished meanwhile, and what it has published is not to be seen here yet.
    """

    made: int
    missing: int
    count: int
    elsewhere: bool = False
