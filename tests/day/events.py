"""What happens to a conversion that the command line does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tests.day.jobs import PROGRAM, Job
from tests.day.processes import Command, family
from tests.day.scene import DOCUMENTED, KILLED, Day, must
from tests.staged import assert_nothing_done, assert_well_left

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
# Stopped by a signal; killed by one before the program has begun to listen.
_STOPPED = (0, 5, 6, -signal.SIGTERM, -signal.SIGHUP)


def plain(day: Day, job: Job) -> None:
    """Nothing happens; what is there is verified, and the same command finds it."""
    day.run(job.command(day.out))
    day.published(job)
    if job.size == "small" or day.rng.random() < 0.3:
        day.run([*PROGRAM, "verify", str(day.out), *(["--sample", "5%"] if job.size == "8B" else []), "--json"])
    if day.rng.random() < 0.3:
        day.run(job.command(day.out))
        day.published(job)


def killed(day: Day, job: Job) -> None:
    """The run, or one of its workers, is sent signals once or more often; the same command then makes the result."""
    clean = True
    for _ in range(day.rng.choice([1, 1, 2, 3])):
        stopped = _kill_once(day, job, day.processes.start(job.command(day.out)))
        clean = clean and stopped == 5
        if clean and not day.out.exists():  # what another one has left is for a run that comes so far
            assert_well_left(day.out)
        day.unharmed(job)
    last = day.rng.choice(["", "", "", "--fresh", "--recheck", "clean"])
    if day.out.exists():  # it was killed too late: there is nothing to remove, and --fresh would need --overwrite
        last = ""
    if last == "clean":
        day.run([*PROGRAM, "clean", str(day.out)])
        assert_nothing_done(day.out)
    day.run(job.command(day.out, *([last] if last.startswith("--") else [])))
    day.published(job)


def _kill_once(day: Day, job: Job, command: Command) -> int | None:
    """Sends a signal to a run or to one of its workers at a moment that is drawn; returns how the run ended."""
    number = day.rng.choice(_SIGNALS)
    day.processes.wait(command, seconds=day.rng.uniform(0, 1.1 * day.seconds[job.name]))
    workers = family(command.pid)[1:] if day.rng.random() < 0.3 else []
    if command.look():
        day.tally.count("kills", "too late")
    elif workers:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(day.rng.choice(workers), number)
            day.tally.count("kills", f"{number.name} of a worker")
    else:
        command.send(number)
        day.tally.count("kills", number.name)
    must(day.processes.wait(command), f"{job.name} hangs after {number.name}")
    day.checked(command, (0, 1, 4, 5, 6) if workers else (*_STOPPED, KILLED))
    return command.code


def raced(day: Day, job: Job) -> None:
    """Two of the same at once, or three; one may be killed."""
    commands = []
    for _ in range(day.rng.choice([2, 2, 3])):
        commands.append(day.processes.start(job.command(day.out)))
        day.processes.wait(commands[-1], seconds=day.rng.uniform(0, day.seconds[job.name]))
    if day.rng.random() < 0.3 and not commands[0].look():
        commands[0].send(signal.SIGKILL)
        day.tally.count("kills", "SIGKILL in a race")
    must(day.processes.wait(*commands), f"{job.name}: a race hangs")
    for command in commands:
        day.checked(command, (0, KILLED) if command is commands[0] else (0,))
    day.published(job)


def overwritten(day: Day, job: Job) -> None:
    """Another result is replaced; a kill leaves one of both."""
    day.run(job.command(day.out, other=True))
    day.published(job, other=True)
    day.run(job.command(day.out), codes=(1,))
    day.published(job, other=True)
    if day.rng.random() < 0.5:
        _kill_once(day, job, day.processes.start(job.command(day.out, "--overwrite")))
        day.unharmed(job, old=True)
    day.run(job.command(day.out, "--overwrite"))
    day.published(job)


def shared(day: Day, job: Job) -> None:
    """Several processes make the parts; one may be killed, and is started again; then it is finished."""
    count = day.rng.choice([2, 3])
    parts = [job.command(day.out, "--part", f"{index}/{count}") for index in range(count)]
    commands = [day.processes.start(part) for part in parts]
    if day.rng.random() < 0.4:
        day.processes.wait(commands[0], seconds=day.rng.uniform(0, day.seconds[job.name]))
        if not commands[0].look():
            commands[0].send(signal.SIGKILL)
            day.tally.count("kills", "SIGKILL of a part")
    must(day.processes.wait(*commands), f"{job.name}: parts hang")
    for command in commands:
        day.checked(command, (0, KILLED) if command is commands[0] else (0,))
    finish = [*PROGRAM, "finish", *job.command(day.out)[4:]]
    if commands[0].code == KILLED:
        day.unharmed(job)
        day.run(finish, codes=(0, 1))
        day.run(parts[0])
    day.run(finish)
    day.published(job)


def flipped(day: Day, job: Job) -> None:
    """A bit of the result is flipped: verify says where; then it is made again."""
    day.run(job.command(day.out))
    files = [path for path in sorted(day.out.rglob("*")) if path.is_file() and path.stat().st_size]
    if job.name in day.cloned:  # nobody has read these bytes, and the receipt says so
        files = [path for path in files if path.suffix == ".json"]
    path = day.rng.choice(files)
    at, bit = day.rng.randrange(path.stat().st_size), day.rng.randrange(8)
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))
    command = day.run([*PROGRAM, "verify", str(day.out), "--json"], codes=(1, 2, 3))
    must(path.name in command.complained(), f"{job.name}: {path.name} is not named, byte {at}, bit {bit}")
    day.tally.count("flipped bits", "seen")
    if day.run(job.command(day.out, "--overwrite", "--fresh"), codes=(0, 1)).code:  # its receipt says not whose it is
        shutil.rmtree(day.out)
        day.run(job.command(day.out))
    day.published(job)


def changed(day: Day, job: Job) -> None:
    """A source changes while it is read; once it is as it was, the result is made."""
    copy = day.out.parent / "source"
    given = Path(job.given)
    subprocess.run(["cp", "-r", "--reflink=auto", str(given.parent), str(copy)], check=True)
    mine = replace(job, given=str(copy / given.name))
    target = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    command = day.processes.start(mine.command(day.out))
    _staged(day, command, day.out)
    day.processes.wait(command, seconds=day.rng.uniform(0, day.seconds[job.name] / 2))
    how = day.rng.choice(list(CHANGES))
    ended = command.look()
    CHANGES[how](target)
    must(day.processes.wait(command), f"{job.name} hangs after {how}")
    day.checked(command, (0,) if ended else (0, 1))
    day.tally.count("source changed", f"{how}: exit {command.code}")
    if command.code == 0:
        day.published(job, receipt=False)
        shutil.rmtree(day.out)
    else:
        must(not day.out.exists(), f"{job.name}: a result, and exit {command.code}")
    shutil.rmtree(copy)
    subprocess.run(["cp", "-r", "--reflink=auto", str(given.parent), str(copy)], check=True)
    day.run(mine.command(day.out, "--fresh"))
    day.run([*PROGRAM, "clean", str(day.out)])
    day.published(job, receipt=False)


def _staged(day: Day, command: Command, out: Path) -> None:
    """Waits until a run has planned and begun to write, or ended."""
    while not command.look() and not list(out.parent.glob(f"{out.name}.partial-*")):
        day.processes.wait(command, seconds=0.002)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 8)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _rewrite(path: Path) -> None:
    """The same size, and the same time of modification."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(b"\x01" * 4096)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(path: Path) -> None:
    new = path.with_name("new")
    shutil.copy2(path, new)
    new.rename(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "appended to": _append,
    "shortened": _shorten,
    "rewritten in place": _rewrite,
    "replaced": _replace,
    "removed": Path.unlink,
}


def filled(day: Day, job: Job) -> None:
    """The disk fills up while the result is written; once there is room, the same command makes it."""
    out, ballast = day.small_disk / "out", day.small_disk / "ballast"
    size = sum(path.stat().st_size for path in Path(job.given).parent.rglob("*.safetensors"))
    command = day.processes.start(job.command(out))
    if day.rng.random() < 0.8:
        _staged(day, command, out)
        day.processes.wait(command, seconds=day.rng.uniform(0, day.seconds[job.name] / 2))
    status = os.statvfs(day.small_disk)
    room = status.f_bavail * status.f_frsize - day.rng.randrange(0, max(size, 1))
    with ballast.open("wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(room, 1))
    must(day.processes.wait(command), f"{job.name} hangs on a full disk")
    day.checked(command, (0, 4))
    day.tally.count("full disk", f"exit {command.code}")
    day.unharmed(job, out)
    ballast.unlink()
    day.run(job.command(out))
    day.published(job, out)


def refused(day: Day, job: Job) -> None:
    """Calls that cannot succeed: each says so, and leaves nothing."""
    folder = day.out.parent / "bad"
    folder.mkdir()
    files = [path for path in Path(job.given).parent.rglob("*") if path.suffix in (".safetensors", ".pth", ".pt")]
    source = day.rng.choice(files)
    short = folder / source.name
    short.write_bytes(source.read_bytes()[: day.rng.randrange(source.stat().st_size)])
    noise = folder / ("noise" + source.suffix)
    noise.write_bytes(day.rng.randbytes(5000))
    mapping = folder / "mapping.yaml"
    mapping.write_text(f'shardmerge: 1\nsources: {{a: {source}}}\ntensors: {{"x": "a:{{nothing.of.that.name}}"}}\n')
    bad = [
        ["convert", str(short), str(day.out)],
        ["convert", str(noise), str(day.out)],
        ["convert", str(folder / "absent"), str(day.out)],
        ["convert", str(source), str(day.out), "--use", "no/such-preset"],
        ["convert", str(source), str(day.out), "--max-memory", "1MiB"],
        ["convert", str(source), str(noise / "out")],
        ["convert", str(source), str(folder)],
        ["run", str(mapping), "--out", str(day.out)],
        ["plan", str(mapping)],
        ["verify", str(folder)],
        ["inspect", str(noise)],
    ]
    for words in day.rng.sample(bad, 4):
        day.run([*PROGRAM, *words, "--json"], codes=DOCUMENTED[1:5])
        assert_nothing_done(day.out)
    shutil.rmtree(folder)


def looked_at(day: Day, job: Job) -> None:
    """What reads only: a plan, an inspection, a comparison."""
    for words in (["plan", job.given] if job.is_mapping else ["inspect", job.given],):
        day.run([*PROGRAM, *words, "--json"])
    if job.size != "8B" and job.form == "safetensors":
        day.run(job.command(day.out))
        day.run([*PROGRAM, "diff", str(day.out), str(day.out), "--json"])
        day.published(job)


Event = Callable[[Day, Job], None]
EVENTS: dict[str, tuple[int, Event, Callable[[Job], bool]]] = {
    "undisturbed": (4, plain, lambda job: True),
    "killed": (8, killed, lambda job: True),
    "two or three at once": (3, raced, lambda job: not job.heavy),
    "overwritten": (3, overwritten, lambda job: bool(job.other)),
    "in parts": (3, shared, lambda job: job.is_mapping),
    "a bit flipped": (3, flipped, lambda job: job.size != "8B"),
    "source changes": (2, changed, lambda job: job.name == "cast-mid"),
    "disk fills": (2, filled, lambda job: job.name == "cast-mid"),
    "refused": (2, refused, lambda job: job.size == "small"),
    "looked at": (1, looked_at, lambda job: True),
}


def happen(day: Day) -> None:
    """Draws an event and a conversion to which it can happen, and lets it."""
    size = day.due()
    names = [name for name, (_, _, fits) in EVENTS.items() if any(fits(job) for job in day.of(size))]
    name = day.rng.choices(names, [EVENTS[one][0] for one in names])[0]
    _, event, fits = EVENTS[name]
    job = day.rng.choice([job for job in day.of(size) if fits(job)])
    day.step("events", name, job, event)
