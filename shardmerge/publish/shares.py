"""Which parts one of several makes: a share that is fixed, or whatever nobody has made yet.

What others are at work on is looked at to save time, and nothing depends on it: a directory of another node may be
listed as it was a while ago, and a part made twice is the same.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from shardmerge.errors import UsageError
from shardmerge.plan.schedule import largest_first, share
from shardmerge.plan.value import Part
from shardmerge.prepare.options import Options
from shardmerge.publish.making import is_made
from shardmerge.publish.staging import Staging
from shardmerge.storage.limits import default_workers

# Whoever has not written to his part for so many seconds is taken to be gone. Writers write all the time; a node that
# shows what another wrote a minute late is one where attributes are cached for as long as NFS may (acdirmax is 60).
_GONE = 60

_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")


class Which(Protocol):
    """Chooses parts."""

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields parts to be made, some at a time; what was made by then is seen before the next are chosen."""


@dataclass(frozen=True, slots=True)
class Share:
    """Part of the parts that task ``index`` of ``count`` makes, from 0; who asks for a part gets the same answer."""

    index: int
    count: int

    def of(self, sizes: Sequence[int]) -> list[int]:
        """Returns the numbers of its parts, of the sizes of all."""
        return share(sizes, self.index, self.count)

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Returns once what of its share is not made yet."""
        own = [parts[number] for number in self.of([part.shard.nbytes for part in parts])]
        return All().rounds(own, staging, options)


@dataclass(frozen=True, slots=True)
class All:
    """All parts that there are: of somebody who holds his share only."""

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields once what is not made yet."""
        todo = [part for part in parts if not is_made(staging, part, recheck=options.recheck)]
        if todo:
            yield todo


@dataclass(frozen=True, slots=True)
class Anything:
    """Whatever nobody has made or is visibly at work on, the largest first."""

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields as many parts as there are CPUs at a time, until all are made or somebody is at work on each."""
        several = options.workers or default_workers()
        left = [parts[number] for number in largest_first([part.shard.nbytes for part in parts])]
        while left:
            left = [part for part in left if not is_made(staging, part)]
            busy = at_work(staging)
            todo = [part for part in left if part.number not in busy][:several]
            if not todo:
                return
            yield todo


def which(text: str, environment: Mapping[str, str] = os.environ) -> Share | Anything:
    """Returns what ``--part`` says: ``3/8`` (from 0), or ``any``.

    In a Slurm array that does not begin at 0 its first task is the first.

    Raises
    ------
    UsageError
        ``bad-part``.
    """
    if text == "any":
        return Anything()
    found = _SHARE.fullmatch(text)
    index, count = (int(number) for number in found.groups()) if found else (0, 0)
    least = environment.get("SLURM_ARRAY_TASK_MIN", "")
    if found and environment.get("SLURM_ARRAY_TASK_ID") == found[1] and least.isdigit():
        index -= int(least)
    if not found or not 0 <= index < count:
        raise UsageError(
            "bad-part",
            "--part takes which of how many, counted from 0, or the word any",
            found=text,
            expected="0/8 to 7/8, or any",
            hint="in a Slurm array: --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, with --array=0-7",
        )
    return Share(index, count)


def at_work(staging: Staging) -> set[int]:
    """Returns the numbers of the parts that somebody wrote to a moment ago."""
    found = set()
    now = time.time()
    for path in staging.parts.glob("[0-9]*.tmp"):
        with suppress(OSError, ValueError):
            if now - path.stat().st_mtime < _GONE:
                found.add(int(path.name.split(".")[0]))
    return found
