"""The hour itself, in namespaces that ``tests.day`` has made: nothing here is undone, for all of it goes with them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.memory_group import MemoryGroup
from tests.day.content import content
from tests.day.events import happen
from tests.day.jobs import read_jobs
from tests.day.processes import Processes, Service
from tests.day.scene import Day
from tests.day.service import serve
from tests.day.tally import Tally

# Of the file system of the day: the largest results and the sources; and of one that is easily full.
_ROOM, _LITTLE = 20 << 30, 300 << 20
# How far the day gives way to other work of the machine, once the first results are there.
_GIVES_WAY = 10


def main() -> None:
    given = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # what is started has the same
    made = [MemoryGroup(procs, Path(peak)) for procs, peak in given["groups"]]
    day = begun(Path(given["base"]), made, given["seed"], small=given["small"])
    spend(day, given["minutes"] * 60, Path(given["out"]))
    sys.exit(bool(day.tally.violations))


def spend(day: Day, seconds: float, result: Path) -> None:
    """Lets things happen, in turns by command line and in Python, and writes the result down as they do."""
    steps = 0
    while day.tally.seconds() < seconds:
        happen(day)
        for _ in range(day.rng.randrange(1, 4)):
            serve(day)
        steps += 1
        day.tally.write(result)
        if steps % 10 == 0:
            print(f"{day.tally.seconds():.0f} s, {steps} steps, {len(day.tally.violations)} wrong", flush=True)


def begun(base: Path, made: list[MemoryGroup], seed: int, *, small: bool) -> Day:
    """Makes disks, sources and first results, and starts the process that uses the API."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    disk, little, temporary = base / "disk", base / "little", base / "tmp"
    _mount(disk, "xfs", _ROOM)
    _mount(little, "ext4", _LITTLE)
    temporary.mkdir()
    (disk / "place").mkdir()
    size = ["--small"] if small else []
    subprocess.run([sys.executable, "-m", "tests.day.make", str(disk / "in"), *size], check=True)
    environment = {**os.environ, "TMPDIR": str(temporary)}
    processes = Processes(made[:-1], environment)
    day = Day(disk, little, read_jobs(disk / "jobs.json"), processes, Tally(seed), random.Random(seed), temporary)
    _first(day)
    os.nice(_GIVES_WAY)
    day.service = Service.start([sys.executable, "-m", "tests.day.api_process"], made[-1], environment)
    processes.staying = {day.service.process.pid}
    processes.tick = day.tick
    day.tally = Tally(seed, violations=day.tally.violations)
    return day


def _first(day: Day) -> None:
    """Makes every result once, undisturbed, and has it checked against the real tools."""
    day.begin()
    kept = day.root / "first"
    kept.mkdir()
    for job in day.jobs:
        for other in (True, False) if job.other else (False,):
            command = day.run(job.command(day.out, other=other))
            day.goldens[job.name, other] = content(day.out)
            day.seconds[job.name] = command.seconds
            if '"bytes_cloned": 0' not in command.said():
                day.cloned.add(job.name)
            print(f"{job.name}: {command.seconds:.1f} s", flush=True)
            day.quiet()
            if not other:
                day.out.rename(kept / job.name)
            day.clear()
        if job.size == "8B":
            _check(day, kept)
    _check(day, kept)


def _check(day: Day, kept: Path) -> None:
    oracles = [sys.executable, "-m", "tests.day.oracles", str(day.root / "jobs.json"), str(kept)]
    if subprocess.run(oracles, check=False).returncode:
        day.tally.wrong("a first result is not what another tool makes of the sources")
    for path in kept.iterdir():
        shutil.rmtree(path)


def _mount(folder: Path, kind: str, size: int) -> None:
    """Mounts a file system in a sparse file that gives back what is deleted."""
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(size)
    folder.mkdir()
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop,discard", str(image), str(folder)], check=True)


if __name__ == "__main__":
    main()
