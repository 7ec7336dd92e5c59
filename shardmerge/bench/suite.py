"""Runs conversions in turn with the least that any program would have to do, and says how they compare.

Whole processes, measured from outside: start-up counts. The floor of a cast reads the input and writes as many bytes as
the output has; the floor of renaming is one copy. Both are what `dd` needs for it, with and without waiting for the
disk.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardmerge.bench.checkpoint import LAYER_BYTES, write_checkpoint
from shardmerge.bench.figures import ratios, spread
from shardmerge.bench.machine import machine_card
from shardmerge.bench.processes import Measured, measure, order
from shardmerge.errors import RefusedError, ResourceError, UsageError
from shardmerge.storage.writing import free_bytes
from shardmerge.version import __version__

SMALLEST = 1 << 24
_SPARE_BYTES = 64 << 20
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing a job.

    Attributes
    ----------
    key, title
        For machines and for people.
    ours, synced
        Whether it is shardmerge, and whether its result is on the disk when it ends.
    command
        Given the output directory, which is not there yet, what to run.
    """

    key: str
    title: str
    ours: bool
    synced: bool
    command: Callable[[Path], Sequence[str | Path]]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, by whom, and how many bytes of tensors it reads and writes."""

    key: str
    title: str
    bytes_read: int
    bytes_written: int
    contenders: tuple[Contender, ...]


def bench(size: int, scratch: Path, rounds: int, tell: Tell) -> dict[str, object]:
    """Measures a cast and a renaming of a checkpoint of ``size`` bytes.

    Parameters
    ----------
    size
        Of the input, in bytes. The disk must hold it twice.
    scratch
        An existing directory on the disk to be measured; as it was, afterwards.
    rounds
        How often each contender runs, after one run that does not count.
    tell
        Called with a line when something was done.

    Returns
    -------
    dict
        ``machine``, ``size`` (bytes of tensors), ``rounds``, and ``jobs``: seconds, GB/s, ratios, bytes of memory.

    Raises
    ------
    UsageError
        ``bad-size``: less than 16 MiB. ``missing-path``: no such directory.
    ResourceError
        ``disk-too-small``: said before anything is written.
    RefusedError
        ``bench-failed``: a contender ended with an error.
    """
    _check(size, scratch)
    with _inside(scratch) as folder:
        source = folder / "source"
        source.mkdir()
        written = write_checkpoint(source, size)
        tell(f"wrote a checkpoint of {written / 1e9:.2f} GB")
        jobs = [_measured(job, folder / "out", rounds, tell) for job in _jobs(source, written)]
        card = machine_card(folder)
    return {
        "shardmerge": __version__,
        "machine": card,
        "cache": "warm",
        "size": written,
        "rounds": rounds,
        "jobs": jobs,
    }


def _check(size: int, scratch: Path) -> None:
    if size < max(SMALLEST, LAYER_BYTES):
        raise UsageError(
            "bad-size",
            "too small to measure anything but start-up",
            found=f"{size:,} bytes",
            hint=f"--size {-(-max(SMALLEST, LAYER_BYTES) >> 20)}MiB, the least, or more",
        )
    if not scratch.is_dir():
        raise UsageError("missing-path", "there is no such directory", where=str(scratch))
    needed, free = 2 * size + _SPARE_BYTES, free_bytes(scratch)
    if needed > free:
        raise ResourceError(
            "disk-too-small",
            "the disk does not have room for the benchmark; nothing was written",
            where=str(scratch),
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            hint="a smaller --size, or --scratch on another disk",
        )


@contextmanager
def _inside(scratch: Path) -> Iterator[Path]:
    """A directory for gigabytes, removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="shardmerge-bench-", dir=scratch) as name:
        yield Path(name).resolve()


# ---- the jobs


def _jobs(source: Path, nbytes: int) -> tuple[Job, Job]:
    file = source / "model.safetensors"
    program = (sys.executable, "-m", "shardmerge")
    return (
        Job(
            "cast",
            "fp32 to bf16",
            nbytes,
            nbytes // 2,
            (
                *_ours(lambda out: (*program, "convert", file, out, "--dtype", "bfloat16")),
                *_floor(file, f'dd if="$0" of=/dev/null bs=1M && {_copying(nbytes // 2)}', "read and write"),
            ),
        ),
        Job(
            "rename",
            "rename only",
            nbytes,
            nbytes,
            (
                *_ours(lambda out: (*program, "run", source / "mapping.yaml", "--out", out)),
                *_floor(file, _copying(nbytes), "copy"),
            ),
        ),
    )


def _copying(nbytes: int) -> str:
    return f'mkdir "$1" && dd if="$0" of="$1/copy" bs=1M iflag=count_bytes count={nbytes}'


def _ours(command: Callable[[Path], Sequence[str | Path]]) -> tuple[Contender, Contender]:
    return (
        Contender("shardmerge", "shardmerge", True, True, lambda out: (*command(out), "--quiet")),
        Contender(
            "shardmerge-no-sync",
            "shardmerge --no-sync",
            True,
            False,
            lambda out: (*command(out), "--quiet", "--no-sync"),
        ),
    )


def _floor(file: Path, script: str, what: str) -> tuple[Contender, Contender]:
    return (
        Contender(
            "floor-sync",
            f"floor: {what}, synced",
            False,
            True,
            lambda out: ("sh", "-c", f"{script} conv=fsync", file, out),
        ),
        Contender("floor", f"floor: {what}", False, False, lambda out: ("sh", "-c", script, file, out)),
    )


# ---- measuring


def _measured(job: Job, out: Path, rounds: int, tell: Tell) -> dict[str, object]:
    """Runs all contenders once unmeasured, then in turn, every round in an order of its own."""
    runs: dict[str, list[Measured]] = {contender.key: [] for contender in job.contenders}
    for contender in job.contenders:
        _run(contender, out)
    for number in range(rounds):
        for contender in order(job.contenders, number):
            runs[contender.key].append(_run(contender, out))
        seconds = ", ".join(f"{key} {done[-1].wall:.2f} s" for key, done in runs.items())
        tell(f"{job.title}, round {number + 1} of {rounds}: {seconds}")
    return {
        "key": job.key,
        "title": job.title,
        "bytes_read": job.bytes_read,
        "bytes_written": job.bytes_written,
        "contenders": [_figures(contender, runs, job.bytes_written) for contender in job.contenders],
    }


def _run(contender: Contender, out: Path) -> Measured:
    os.sync()  # whoever ran before has no share in our waiting for the disk
    try:
        done = measure(contender.command(out))
        if done.code:
            said = done.stderr.strip().splitlines()
            raise RefusedError(
                "bench-failed",
                f"{contender.title} ended with an error",
                found="; ".join(said[-3:]) or f"exit code {done.code}",
                hint="run `shardmerge convert` on a checkpoint on this disk, which shows the cause",
            )
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return done


def _figures(contender: Contender, runs: dict[str, list[Measured]], nbytes: int) -> dict[str, object]:
    mine = runs[contender.key]
    floor = runs["floor-sync" if contender.synced else "floor"]
    wall = spread([done.wall for done in mine])
    return {
        "key": contender.key,
        "title": contender.title,
        "wall": wall,
        "gb_per_s": round(nbytes / wall["median"] / 1e9, 3),
        "to_floor": ratios([done.wall for done in mine], [done.wall for done in floor]),
        "cpu": spread([done.cpu for done in mine]),
        "peak": max(done.peak for done in mine),
        "anonymous": max(done.anonymous for done in mine),
    }
