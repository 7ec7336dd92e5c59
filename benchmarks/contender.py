"""Who does a job: shardmerge, the floor, and what people use today."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Command = Callable[[Path], Sequence[str | Path]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing a job.

    Attributes
    ----------
    key, title
        For machines and for people.
    kind
        ``ours``, ``peer`` or ``floor``.
    command
        Given the output directory, which is not there yet, what to run.
    shown
        The command as people would type it.
    synced
        Whether its result is on the disk when it ends; it is compared with the floor of the same guarantee.
    same_as
        Whose tensors its output must equal, bit by bit: ``ours``, the ``input``, or nobody's.
    """

    key: str
    title: str
    kind: Literal["ours", "peer", "floor"]
    command: Command
    shown: str
    synced: bool = False
    same_as: Literal["", "ours", "input"] = ""


def ours(command: Command, shown: str) -> list[Contender]:
    """Returns shardmerge with and without waiting for the disk."""
    return [
        Contender("shardmerge", "shardmerge", "ours", lambda out: [*command(out), "--json"], shown, synced=True),
        Contender(
            "shardmerge-no-sync",
            "shardmerge --no-sync",
            "ours",
            lambda out: [*command(out), "--json", "--no-sync"],
            f"{shown} --no-sync",
            same_as="ours",
        ),
    ]


def program() -> list[str | Path]:
    """Returns how shardmerge is started."""
    return [sys.executable, "-m", "shardmerge"]
