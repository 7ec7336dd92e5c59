"""Flips single bits of what a stopped run left: ``python -m tests.part_flips --flips 1500``.

After each the same command goes on, with and without ``--recheck``. It must give the right result or an error. Without
``--recheck`` a part is looked at in 16 blocks; a bit that was flipped elsewhere is published, and ``verify`` names
the file. ``tests/soak/part-flips.json`` has the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

import shardmerge as sm
from benchmarks.synthetic import write_safetensors
from shardmerge import api
from tests.bit_flips import flip

RESULTS = Path(__file__).parent / "soak" / "part-flips.json"
KINDS = {"part": "model/*", "part receipt": "parts/0*.json", "begun.json": "begun.json"}

# Several times what is looked at of it: 64 KiB.
_SHAPES = {f"w{number}": (128, 1024) for number in range(3)}
_OPTIONS = sm.Options(shard_size=300_000, workers=1, sync=False)


class Scene:
    """A plan of three parts, of which two are made, and the whole result."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.plan, self.out = folder, folder / "plan.json", folder / "place" / "out"
        source = folder / "model.safetensors"
        write_safetensors(source, _SHAPES, fill=True)
        prepared = api.prepare_conversion(source, options=replace(_OPTIONS, format=form))
        api.write_plan(prepared, self.plan, self.out)
        self.golden = _files(sm.run(self.plan, folder / "golden", _OPTIONS).path)
        self._kept = folder / "kept"
        api.run_part(self.plan, "0/2", options=_OPTIONS)
        shutil.move(self.out.parent, self._kept)

    def staging(self) -> Path:
        """Puts back what the stopped run left, and returns where it is."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        shutil.copytree(self._kept, self.out.parent)
        (root,) = self.out.parent.iterdir()
        return root

    def outcome(self, path: Path, *, recheck: bool) -> str:
        """Goes on, and says what became of it."""
        try:
            sm.run(self.plan, options=replace(_OPTIONS, recheck=recheck))
        except sm.ShardmergeError:
            return "refused"
        except Exception as error:  # noqa: BLE001  # what the command line calls a bug
            return f"exit 70: {error!r}"
        if _files(self.out) == self.golden:
            return "right result"
        try:
            sm.verify(self.out)
        except sm.ShardmergeError as error:
            return "published, verify names the file" if path.name in str(error) else f"unnamed: {error}"
        return "wrong result"


ALLOWED = {True: {"refused", "right result"}, False: {"refused", "right result", "published, verify names the file"}}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flipped(scene: Scene, flips: int, seed: int = 0) -> Iterator[tuple[str, bool, str]]:
    """Flips so many bits, one at a time; yields the kind of file, whether all was compared, and the outcome."""
    rng = np.random.default_rng(seed)
    for number in range(flips):
        kind = "begun.json" if number % 10 == 9 else [*KINDS][number % 2]
        recheck = bool(rng.integers(2))
        files = sorted(scene.staging().glob(KINDS[kind]))
        path = files[int(rng.integers(len(files)))]
        flip(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        yield kind, recheck, scene.outcome(path, recheck=recheck)


def main() -> None:
    """Counts, and writes the result file after each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    counts: Counter[tuple[str, str, bool, str]] = Counter()
    value = {"date": datetime.now(timezone.utc).date().isoformat(), "kernel": os.uname().release, "seed": given.seed}
    for form in ("safetensors", "bin"):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            for kind, recheck, outcome in flipped(Scene(Path(name), form), given.flips // 2, given.seed):
                counts[form, kind, recheck, outcome] += 1
                if outcome not in ALLOWED[recheck]:
                    print(form, kind, recheck, outcome, flush=True)
        keys = "format", "file", "recheck", "outcome"
        rows = [{**dict(zip(keys, key, strict=True)), "count": count} for key, count in sorted(counts.items())]
        given.out.write_text(json.dumps({**value, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
