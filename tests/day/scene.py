"""Where the day happens, and what must hold after each step of it."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.day.content import Content, allocated, content, stamps
from tests.day.jobs import Job
from tests.day.processes import Command, Processes, Service
from tests.day.tally import Tally
from tests.staged import stagings

# What docs/reference/commands.md lists, but for 70: a bug.
DOCUMENTED = (0, 1, 2, 3, 4, 5, 6)
KILLED = -9
# Of the time.
SHARES = {"small": 0.5, "medium": 0.25, "8B": 0.25}
RECEIPT = "shardmerge.json"


class WrongError(AssertionError):
    """Something that must hold does not."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise WrongError(what)


@dataclass
class Day:
    """The day.

    Attributes
    ----------
    root
        A file system of its own, with the sources in ``in``.
    small_disk
        Another, which is easily full.
    goldens, seconds
        By name of job, and whether it is the other result: what the first, undisturbed run made, and how long it took.
    cloned
        Jobs whose bytes the file system clones.
    known
        The descriptors of the process that uses the API, after its first answer.
    """

    root: Path
    small_disk: Path
    jobs: list[Job]
    processes: Processes
    tally: Tally
    rng: random.Random
    temporary: Path
    goldens: dict[tuple[str, bool], Content] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    cloned: set[str] = field(default_factory=set)
    service: Service | None = None
    known: dict[str, str] = field(default_factory=dict)
    _stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _ticked: float = 0.0

    @property
    def inputs(self) -> Path:
        return self.root / "in"

    @property
    def out(self) -> Path:
        return self.root / "place" / "out"

    # --- steps ---

    def of(self, size: str) -> list[Job]:
        return [job for job in self.jobs if job.size == size]

    def due(self, shares: Mapping[str, float] = SHARES) -> str:
        """Returns the size of conversions that has had the least of its share of the time."""
        spent = self.tally.counts["seconds"]
        return min((size for size in shares if self.of(size)), key=lambda size: spent[size] / shares[size])

    def step(self, what: str, name: str, job: Job, do: Callable[[Day, Job], None]) -> None:
        """Does something with a conversion, and looks whether all that must hold does."""
        self.tally.count(what, name)
        began = time.monotonic()
        try:
            do(self, job)
            self.quiet()
        except Exception as error:  # noqa: BLE001  # what went wrong is what is looked for
            self.tally.wrong(f"{name}, {job.name}: {error!r}")
        seconds = time.monotonic() - began
        self.tally.count("seconds", job.size, 1 + round(seconds))
        print(f"{self.tally.seconds():.0f} s: {name}, {job.name}, {seconds:.1f} s", flush=True)
        self.clear()

    # --- commands ---

    def run(self, argv: Sequence[str], codes: Collection[int] = (0,)) -> Command:
        return self.checked(self.processes.run(argv), codes)

    def checked(self, command: Command, codes: Collection[int] = (0,)) -> Command:
        """Checks how a command ended, and counts it."""
        self.tally.count("commands", command.argv[3])
        self.tally.count("exit codes", str(command.code))
        said = command.complained()
        story = f"{' '.join(command.argv[3:])}: exit {command.code}\n{said[-3000:]}"
        must(command.code in codes, story)
        must("Traceback" not in said, story)
        if command.code == 0 and "--json" in command.argv:
            self._within_plan(command, json.loads(command.said()))
        elif command.code and command.code > 0 and "--json" in command.argv and command.said():
            for one in json.loads(command.said())["errors"]:
                self.tally.count("errors", one["code"])
        return command

    def _within_plan(self, command: Command, told: dict[str, Any]) -> None:
        if "planned_peak" not in told:
            return
        share = command.peak / told["planned_peak"]
        self.tally.largest_share = max(self.tally.largest_share, share)
        must(share <= 1, f"{command.argv[3:]} took {command.peak} bytes of {told['planned_peak']} planned")
        if "bytes_written" in told:
            for name in ("total_size", "bytes_read", "bytes_written", "bytes_cloned"):
                self.tally.count("bytes", name, told[name])

    # --- what must hold ---

    def whole(self, job: Job, out: Path, *, other: bool = False, receipt: bool = True) -> bool:
        """Tells whether a directory is what the first run made; the receipt differs where the sources are copies."""
        found, golden = content(out), dict(self.goldens[job.name, other])
        if not receipt:
            found.pop(RECEIPT)
            golden.pop(RECEIPT)
        return found == golden

    def published(self, job: Job, out: Path | None = None, *, other: bool = False, receipt: bool = True) -> None:
        """Checks that the result is there, and nothing beside it."""
        out = out or self.out
        must(self.whole(job, out, other=other, receipt=receipt), f"{job.name}: the result is another one")
        must(not stagings(out), f"{job.name}: {stagings(out)} is left")
        self.tally.count("results", job.name)

    def unharmed(self, job: Job, out: Path | None = None, *, old: bool = False) -> bool:
        """Checks that a result is there whole, or none, or the one before; tells whether it is the new one."""
        out = out or self.out
        if not out.exists():
            must(not old, f"{job.name}: the old result is gone")
            return False
        if self.whole(job, out, receipt=True):
            return True
        must(old and self.whole(job, out, other=True), f"{job.name}: a result that is not whole")
        return False

    def quiet(self) -> None:
        """Checks what must hold whenever nothing runs."""
        left = self.processes.left_over()
        must(not left, f"processes that nobody waits for: {left}")
        for folder in (self.temporary, Path("/dev/shm")):
            must(not list(folder.iterdir()), f"left in {folder}: {list(folder.iterdir())}")
        killed = self.processes.killed_for_memory()
        must(killed == self.tally.counts["killed for memory"]["processes"], f"{killed} were killed for memory")
        must(stamps(self.inputs) == self._stamps, "a source was touched")

    def begin(self) -> None:
        """Remembers the sources, as they are before anything was done."""
        self._stamps = stamps(self.inputs)

    def clear(self) -> None:
        """Removes all results and what is beside them, and what is left of a step that went wrong."""
        self.processes.left_over()
        self.tally.counts["killed for memory"]["processes"] = self.processes.killed_for_memory()
        for folder in (self.out.parent, self.small_disk, self.temporary):
            for path in folder.iterdir():
                if path.is_dir() and path.name != "lost+found":
                    shutil.rmtree(path)
                elif path.is_file():
                    path.unlink()

    def tick(self) -> None:
        """Looks at the process that uses the API, and at staging directories; at most once a second."""
        now = self.tally.seconds()
        if self.service is None or now - self._ticked < 1:
            return
        self._ticked = now
        partial = [*self.out.parent.glob("*.partial-*"), *self.small_disk.glob("*.partial-*")]
        self.tally.sample(*self.service.figures(), allocated(partial))
