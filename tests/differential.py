"""Random files, half of them broken, through two readers: shardmerge's and torch's, or shardmerge's and safetensors'.

Either both see the same tensors, bit for bit, or shardmerge refuses. A sound file of an ordinary state dict is never
refused. ``python -m tests.differential --files 50000`` writes the counts down; ``--resume`` goes on from them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from tests.differential_files import KINDS, File, Kind, Read, Refused

RESULTS = Path(__file__).parent / "soak" / "differential.json"
# Files of one process: what torch does with a broken file may end it.
_CHUNK = 2_500
_MOST_MEMORY = 4 << 30


OUTCOMES = ("equal", "refused by both", "refused by shardmerge", "refused by the other", "different")


@dataclass
class Counts:
    """What became of files, by outcome: those as they were written, and those broken afterwards.

    Attributes
    ----------
    sound, broken
        Files by outcome.
    as_saved
        Sound files that the other reader refuses, compared with what was given to the writer.
    special
        Why a sound file was refused: what it holds that is documented not to be read, with the code.
    codes, mutations
        Refusals by code; files by how they were broken.
    wrong
        What must not be: two readings, an ordinary file refused, an error that is no error of shardmerge.
    """

    sound: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    as_saved: int = 0
    special: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def compare(kind: str, number: int, folder: Path, counts: Counts) -> None:
    """Makes file ``number`` of a kind, reads it twice, and counts."""
    made = KINDS[kind].make(random.Random(f"{kind} {number}"))
    path = folder / made.name
    path.write_bytes(made.data)
    theirs = _read(lambda: KINDS[kind].theirs(path))
    if isinstance(theirs, Refused) and made.saved is not None:
        theirs = made.saved()
        counts.as_saved += 1
    ours = _read(lambda: KINDS[kind].ours(path))
    outcome, wrong = _compared(ours, theirs, KINDS[kind], made)
    (counts.broken if made.mutation else counts.sound)[outcome] += 1
    counts.mutations[made.mutation or "none"] += 1
    if isinstance(ours, Refused):
        counts.codes[ours.code] += 1
        if made.special and not made.mutation:
            counts.special[f"{made.special}: {ours.code}"] += 1
    if wrong:
        counts.wrong.append(f"{kind} {number}, {made.mutation or 'sound'}: {wrong}")


def _compared(ours: Read | Refused, theirs: Read | Refused, kind: Kind, made: File) -> tuple[str, str]:
    """Returns the outcome, and what is wrong with it."""
    if isinstance(ours, Refused):
        wrong = "" if ours.documented and (made.mutation or made.special) else ours.code
        return "refused by both" if isinstance(theirs, Refused) else "refused by shardmerge", wrong
    if isinstance(theirs, Refused):
        return "refused by the other", theirs.code if kind.subset else ""
    difference = _difference(ours, theirs)
    return "different" if difference else "equal", difference


def _read(read: Callable[[], Read]) -> Read | Refused:
    try:
        return read()
    except Refused as error:
        return error


def _difference(ours: Read, theirs: Read) -> str:
    """Returns how two readings differ, ``""`` where they do not."""
    here, there = ours.tensors, theirs.below(ours.root)
    if set(here) != set(there):
        return f"names {sorted(set(here) ^ set(there))[:3]}"
    return next((f"{name[:80]} differs" for name in here if here[name] != there[name]), "")


# --- processes


def child(kind: str, start: int, count: int, at: Path) -> None:
    """Compares some files, and notes at which one it is."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    counts = Counts()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, at.open("w") as place:
        for number in range(start, start + count):
            os.pwrite(place.fileno(), b"%12d" % number, 0)
            compare(kind, number, Path(folder), counts)
    print(json.dumps(vars(counts)))


def run(kind: str, files: int, out: Path, *, resume: bool) -> None:
    """Compares files until so many were compared in all; writes the counts after each process."""
    value = json.loads(out.read_text()) if out.exists() else {"kinds": {}}
    row = (value["kinds"].get(kind) if resume else None) or {"files": 0, "crashed": 0, "next": 0, **vars(Counts())}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder, "at")
        while row["files"] < files:
            count = min(_CHUNK, files - row["files"])
            command = [
                sys.executable,
                "-m",
                "tests.differential",
                "--child",
                kind,
                str(row["next"]),
                str(count),
                str(at),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                end = int(at.read_text())
                row["crashed"] += 1
                print(f"{kind} {end} ended the process: {done.returncode}", flush=True)
                row["wrong"].append(f"{kind} {end}: ended the process, {done.returncode}")
                row["next"] = end + 1
                continue
            _add(row, json.loads(done.stdout.splitlines()[-1]))
            row["files"] += count
            row["next"] += count
            value["kinds"][kind] = row
            value |= {"date": datetime.now(timezone.utc).date().isoformat(), "kernel": os.uname().release}
            out.write_text(json.dumps(value, indent=1) + "\n")


def _add(row: dict, counts: dict) -> None:
    for name, one in counts.items():
        if isinstance(one, dict):
            row[name] = dict(Counter(row[name]) + Counter(one))
        else:
            row[name] += one


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--kind", choices=[*KINDS], action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        kind, start, count, at = given.child
        child(kind, int(start), int(count), Path(at))
        return
    for kind in given.kind or KINDS:
        run(kind, given.files // len(KINDS), given.out, resume=given.resume)


if __name__ == "__main__":
    main()
