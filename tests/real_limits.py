"""Disks that are full, and limits of a process, real ones: ``python -m tests.real_limits`` writes
``tests/soak/limits.json``.

A conversion meets each limit at many values. It succeeds, or ends with exit code 1 or 4 and an error that has a hint,
and the output path holds nothing. Once there is room, the same command gives the right result, and leaves nothing
beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.faults import tool
from tests.killing import Machine, Ran, machine
from tests.staged import files, stagings

RESULTS = Path(__file__).parent / "soak" / "limits.json"

_KIB, _MIB = 1 << 10, 1 << 20
_TENSORS, _ROWS = 12, 256 * _KIB // 4


@dataclass
class Found:
    """What became of the runs under one limit.

    Attributes
    ----------
    outcomes
        How often they came to an exit code and an error.
    wrong
        What may never be.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Limited:
    """A conversion of 3 MiB into four files, whose output path may lie anywhere."""

    def __init__(self, root: Path, runs: Machine) -> None:
        self._runs, self.source = runs, root / "in"
        self.source.mkdir(parents=True)
        rng = np.random.default_rng(0)
        tensors = {f"w{number}": rng.standard_normal(_ROWS, np.float32) for number in range(_TENSORS)}
        save_file(tensors, self.source / "model.safetensors")
        assert self.run(root / "golden").code == 0
        self.golden = files(root / "golden")
        self.nbytes = sum(map(len, self.golden.values()))

    def run(self, out: Path, limits: Mapping[str, int] | None = None) -> Ran:
        words = "convert", self.source, out, "--shard-size", "800KB", "--workers", "2", "--json"
        return self._runs.run(*words, limits=limits or {}, blind=True)

    def meet(self, name: str, found: Found, out: Path, limits: Mapping[str, int], room: Callable[[], object]) -> None:
        """Runs under a limit; then again, once there is room."""
        try:
            found.outcomes[self._met(out, limits, room)] += 1
        except AssertionError as error:
            found.wrong.append(f"{name} {limits}: {error}")
        shutil.rmtree(out, ignore_errors=True)

    def _met(self, out: Path, limits: Mapping[str, int], room: Callable[[], object]) -> str:
        ran = self.run(out, limits)
        assert ran.code in (0, 1, 4), ran.err
        assert "Traceback" not in ran.err, ran.err
        code = ""
        if ran.code:
            assert not out.exists()
            error = ran.json()["errors"][0]
            assert error["hint"], error
            code = error["code"]
        room()
        again = self.run(out)
        assert again.code == 0, again.err
        assert files(out) == self.golden
        assert stagings(out) == []
        return f"exit {ran.code} {code}".rstrip()


@contextmanager
def mounted(*words: object) -> Iterator[Path]:
    """Mounts something in a new directory; raises ``CalledProcessError`` where that is not allowed."""
    place = Path(tempfile.mkdtemp(prefix="shardmerge-limits-"))
    try:
        subprocess.run(["mount", *map(str, words), str(place)], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    finally:
        place.rmdir()


def _room(scene: Limited, step: int, steps: int) -> int:
    """Of a disk, in bytes: up to a tenth more than the result takes, since directories take some too."""
    return scene.nbytes * 11 * step // (10 * steps)


def full_tmpfs(scene: Limited, steps: int) -> Found:
    """A file system in memory, with room for a part of the result, up to all of it."""
    found = Found()
    with mounted("-t", "tmpfs", "-o", f"size={4 * scene.nbytes}", "tmpfs") as place:

        def resize(nbytes: int) -> None:
            subprocess.run(["mount", "-o", f"remount,size={nbytes}", str(place)], check=True)

        for step in range(1, steps + 1):
            resize(max(_room(scene, step, steps), 64 * _KIB))
            scene.meet(f"{step}/{steps}", found, place / "out", {}, lambda: resize(4 * scene.nbytes))
    return found


def full_ext4(scene: Limited, steps: int) -> Found:
    """A disk that something else has filled: with room for a part of the result, up to all of it."""
    found, pool = Found(), Path(tempfile.mkdtemp(prefix="shardmerge-limits-", dir="/dev/shm"))
    try:
        image = pool / "image"
        with image.open("wb") as file:
            file.truncate(32 * _MIB)
        subprocess.run([tool("mkfs.ext4"), "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
        with mounted("-o", "loop", image) as place:
            ballast = place / "ballast"
            for step in range(1, steps + 1):
                status = os.statvfs(place)
                taken = status.f_bavail * status.f_frsize - _room(scene, step, steps)
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, taken)
                scene.meet(f"{step}/{steps}", found, place / "out", {}, ballast.unlink)
    finally:
        shutil.rmtree(pool)
    return found


def limit_of(name: str, values: Callable[[Limited, int], Iterator[int]]) -> Callable[[Limited, int], Found]:
    """Returns what meets a limit of the process at several values."""

    def meet(scene: Limited, steps: int) -> Found:
        found = Found()
        for value in values(scene, steps):
            scene.meet(name, found, scene.source.parent / "out", {name: value}, int)
        return found

    return meet


def _sizes(scene: Limited, steps: int) -> Iterator[int]:
    yield from (64 * _KIB + 800 * _KIB * step // steps for step in range(steps))


def _address_space(scene: Limited, steps: int) -> Iterator[int]:
    """From what the process has when it begins: it loaded all libraries before."""
    pages = int(Path(f"/proc/{scene._runs.server.pid}/statm").read_text().split()[0])
    yield from (pages * os.sysconf("SC_PAGE_SIZE") + 40 * _MIB * step // steps for step in range(steps))


def _descriptors(scene: Limited, steps: int) -> Iterator[int]:
    yield from range(4, 4 + steps)


def read_only(scene: Limited, steps: int) -> Found:
    """A mount that may only be read."""
    found = Found()
    with mounted("-t", "tmpfs", "tmpfs") as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        write = ["mount", "-o", "remount,rw", str(place)]
        scene.meet("read-only", found, place / "out", {}, lambda: subprocess.run(write, check=True))
    return found


LIMITS: Mapping[str, Callable[[Limited, int], Found]] = {
    "room on a tmpfs": full_tmpfs,
    "room on ext4": full_ext4,
    "read-only mount": read_only,
    "size of a file (RLIMIT_FSIZE)": limit_of("RLIMIT_FSIZE", _sizes),
    "address space (RLIMIT_AS)": limit_of("RLIMIT_AS", _address_space),
    "open files (RLIMIT_NOFILE)": limit_of("RLIMIT_NOFILE", _descriptors),
}


def main() -> None:
    """Meets all, and writes what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50, help="values of each limit; of open files: how many")
    steps = parser.parse_args().steps
    base = Path(tempfile.mkdtemp(prefix="shardmerge-limits-", dir="/dev/shm"))
    try:
        with machine(base, tool("gcc")) as runs:
            scene = Limited(base / "scene", runs)
            found: dict[str, Found] = {}
            for name, meet in LIMITS.items():
                found[name] = meet(scene, steps)
                _save(found, scene)
                print(name, dict(found[name].outcomes), *found[name].wrong, sep="\n    ", flush=True)
    finally:
        shutil.rmtree(base)
    raise SystemExit(any(one.wrong for one in found.values()))


def _save(found: Mapping[str, Found], scene: Limited) -> None:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    value: dict[str, Any] = {"date": date, "kernel": os.uname().release, "bytes": scene.nbytes}
    value["limits"] = {name: vars(one) for name, one in found.items()}
    RESULTS.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
