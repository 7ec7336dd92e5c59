"""Which parts one of several makes: a share that is fixed, or whatever nobody has made yet.

What others are at work on is looked at to save time, and nothing depends on it: a directory of another node may be
listed as it was a while ago, clocks may differ, and a part made twice is the same.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from shardmerge.errors import UsageError
from shardmerge.execute.engine import Counters
from shardmerge.execute.executors.contract import Make, Stopped
from shardmerge.plan.schedule import largest_first, late_part, share
from shardmerge.plan.value import Part
from shardmerge.prepare.options import Options
from shardmerge.publish.making import is_made, read_receipt
from shardmerge.publish.part_receipts import machine
from shardmerge.publish.staging import Staging
from shardmerge.storage.writing import explained

# Whoever has not written to his part for so many seconds is taken to be gone. Writers write all the time; a node that
# shows what another wrote a minute late is one where attributes are cached for as long as NFS may (acdirmax is 60).
_GONE = 60.0

# How often somebody who waits for others looks again, in seconds, at the earliest and at the latest: not all at once.
_LOOK = (1.0, 3.0)

# The claim of publishing, which comes after all parts.
_LAST = "finish"

_SHARE = re.compile(r"(\d{1,6})/(\d{1,6})")

# Told how many parts are missing that others are at work on, when somebody begins to wait for them.
Waiting = Callable[[int], None]


class Which(Protocol):
    """Chooses parts."""

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields parts to be made, some at a time; what was made by then is seen before the next are chosen."""

    def maker(self, make: Make, staging: Staging) -> Make:
        """Returns what makes them, of what makes any part."""


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
        return Everything().rounds(own, staging, options)

    def maker(self, make: Make, staging: Staging) -> Make:
        """Returns ``make``: nobody else has these parts."""
        return make


@dataclass(frozen=True, slots=True)
class Everything:
    """All parts that there are: of somebody who holds his share only."""

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields once what is not made yet."""
        todo = [part for part in parts if not is_made(staging, part, recheck=options.recheck)]
        if todo:
            yield todo

    def maker(self, make: Make, staging: Staging) -> Make:
        """Returns ``make``: nobody else has these parts."""
        return make


@dataclass(frozen=True, slots=True)
class Anything:
    """Whatever nobody has made or is visibly at work on, the largest first, until all parts are made.

    Attributes
    ----------
    gone
        Seconds after which somebody who does not write is taken to be gone.
    waiting
        Told when there is nothing to do but to wait for others.
    look
        Between which two numbers of seconds it then looks again.
    again
        Parts that are made again, since whoever has them is slow.
    """

    gone: float = _GONE
    waiting: Waiting | None = None
    look: tuple[float, float] = _LOOK
    again: set[int] = field(default_factory=set)

    def rounds(self, parts: Sequence[Part], staging: Staging, options: Options) -> Iterator[list[Part]]:
        """Yields what nobody is at work on, and ends when all is made, and it is for this process to publish it.

        It waits for what others are at work on, and yields that too if they are gone, or slow. Where another one
        publishes, it ends once he has.
        """
        claims = PartClaims(staging, self.gone)
        left = [parts[number] for number in largest_first([part.shard.nbytes for part in parts])]
        left = [part for part in left if not is_made(staging, part, recheck=options.recheck)]
        while left:
            busy = claims.at_work()
            todo = [part for part in left if part.number not in busy]
            if todo and not claims.is_held(_LAST):  # whoever publishes has taken the files elsewhere
                yield todo
            elif (late := self._late(parts, left, claims)) is not None:
                self.again.add(late.number)
                yield [late]
            else:
                self._wait(len(left))
            if not staging.is_begun():
                return  # another one has published it
            left = [part for part in left if not is_made(staging, part)]
        while staging.is_begun() and not claims.take(_LAST):
            self._wait(0)

    def maker(self, make: Make, staging: Staging) -> Make:
        """Returns what makes a part if nobody else has begun to."""
        return _Claimed(make, PartClaims(staging, self.gone), self.again)

    def _late(self, parts: Sequence[Part], left: Sequence[Part], claims: PartClaims) -> Part | None:
        """Returns a part that somebody is slow at, once half of all parts say what is usual."""
        receipts = [(part, found) for part in parts if (found := read_receipt(claims.staging, part)) is not None]
        if 2 * len(receipts) < len(parts):
            return None
        paces = [(found.seconds / part.shard.nbytes, found.machine) for part, found in receipts if part.shard.nbytes]
        own = [pace for pace, where in paces if where == machine()]
        usual = median([pace for pace, _ in paces]) if paces else 0.0
        ages = ((part.number, claims.age(part.number)) for part in left)
        # Whoever was looked at once before: parts of a moment are not worth it.
        begun = {number: seconds for number, seconds in ages if seconds is not None and seconds > self.look[1]}
        sizes = [part.shard.nbytes for part in parts]
        late = late_part(begun, sizes, usual, median(own) if own else usual)
        return parts[late] if late is not None and late not in self.again else None

    def _wait(self, missing: int) -> None:
        if self.waiting is not None:
            self.waiting(missing)
        time.sleep(random.uniform(*self.look))


@dataclass(frozen=True, slots=True)
class PartClaims:
    """Says who is at work on what, by files that only one process can make.

    A claim is as good as new while it is, or while somebody writes to the part. An older one is followed by a claim
    with the next number, which again only one process can make. So nobody is ever asked, or waited for for ever.

    Attributes
    ----------
    staging
        Where they are.
    gone
        Seconds after which a claim, or a file that is written, is old.
    """

    staging: Staging
    gone: float = _GONE

    def take(self, name: str) -> bool:
        """Claims a part, by its number with five digits, or another thing; False where somebody is at work on it.

        Raises
        ------
        OutputError, ResourceError
            The system refuses to make a file.
        """
        folder, number = self.staging.parts, 0
        with explained(folder):
            while not self._made(folder / f"{name}.{number}.claim"):
                if self._fresh(f"{name}.{number}.claim", f"{name}.*.tmp") or not folder.exists():
                    return False
                number += 1
        return True

    def _made(self, path: Path) -> bool:
        try:
            with path.open("x", encoding="ascii") as file:
                file.write(self.staging.who)
        except (FileExistsError, FileNotFoundError):  # the latter where all is published and removed
            return False
        return True

    def is_held(self, name: str) -> bool:
        """Tells whether somebody claimed a part, or another thing, a moment ago."""
        return bool(self._fresh(f"{name}.*.claim"))

    def age(self, number: int) -> float | None:
        """Returns for how many seconds a part has been under way, since the last claim of it."""
        times = []
        for path in self.staging.named(f"{number:05d}.*.claim"):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return time.time() - max(times) if times else None

    def at_work(self) -> set[int]:
        """Returns the numbers of the parts that somebody claimed, or wrote to, a moment ago."""
        found = set()
        for path in self._fresh("[0-9]*.tmp", "[0-9]*.claim"):
            with suppress(ValueError):
                found.add(int(path.name.split(".")[0]))
        return found

    def _fresh(self, *patterns: str) -> list[Path]:
        """Returns the files of these names to which somebody wrote a moment ago."""
        found = []
        for path in self.staging.named(*patterns):
            with suppress(OSError):
                found += [path] if time.time() - path.stat().st_mtime < self.gone else []
        return found


@dataclass(frozen=True, slots=True)
class _Claimed:
    """Makes a part unless it is made, or somebody else is at work on it."""

    make: Make
    claims: PartClaims
    again: set[int]

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        staging, name = self.claims.staging, f"{part.number:05d}"
        if part.number in self.again:
            name = f"again-{name}"  # one more, and not two
        if not is_made(staging, part) and self.claims.take(name) and not is_made(staging, part):
            self.make(part, counters, stopped)


def which(text: str, waiting: Waiting | None = None, environment: Mapping[str, str] = os.environ) -> Share | Anything:
    """Returns what ``--part`` says: ``3/8`` (from 0), or ``any``.

    In a Slurm array that does not begin at 0 its first task is the first.

    Raises
    ------
    UsageError
        ``bad-part``.
    """
    if text == "any":
        return Anything(waiting=waiting)
    found = _SHARE.fullmatch(text)
    index, count = (int(number) for number in found.groups()) if found else (0, 0)
    least = environment.get("SLURM_ARRAY_TASK_MIN", "")
    if found and environment.get("SLURM_ARRAY_TASK_ID") == found[1] and least.isdigit():
        index -= int(least)
    if not found or not 0 <= index < count:
        raise UsageError(
            "bad-part",
            "--part takes I/N, with I counted from 0, or any",
            found=text,
            expected="0/8 to 7/8, or any",
            hint="in a Slurm array: --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, with --array=0-7",
        )
    return Share(index, count)
