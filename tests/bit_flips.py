"""Flips single bits of all files of a result and of a plan, and counts what is seen and named.

``python -m tests.bit_flips --flips 5000 --out tests/soak/bit-flips.json`` writes the counts down.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

import shardmerge as sm
from shardmerge import api
from tests.conftest import GOLDEN

_MODEL = GOLDEN / "xtuner" / "base_llm"
_KINDS = {
    "weights": ("*.safetensors", "*.bin", "*.distcp"),
    "side files": ("*[gpr].json",),
    "index": ("*.index.json", ".metadata"),
    "receipt": ("shardmerge.json",),
    "plan": ("../plan.json",),
}
FORMATS = ("safetensors", "safetensors --sha256", "bin", "dcp")


@dataclass
class Count:
    """Flipped bits of one kind of file: how many, those that nothing was said of, and those that were no clear error.

    ``unnamed`` are errors that do not say which file it is.
    """

    flips: int = 0
    unseen: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)


def scene(folder: Path, form: str) -> Path:
    """Makes a result of several shards, an index and small files, and a plan beside it."""
    form, _, more = form.partition(" ")
    options = sm.Options(shard_size=8_000, format=form, sync=False, sha256=more == "--sha256")
    api.write_plan(api.prepare_conversion(_MODEL, options=options), folder / "plan.json", folder / "never")
    return sm.convert(_MODEL, folder / "out", options=options).path


def flipped(out: Path, flips: int, seed: int = 0) -> dict[str, Count]:
    """Flips so many bits, spread evenly over the kinds of files, one at a time, and puts each back."""
    rng = np.random.default_rng(seed)
    files = {kind: sorted(path for one in patterns for path in out.glob(one)) for kind, patterns in _KINDS.items()}
    counts = {kind: Count() for kind, paths in files.items() if paths}
    for number in range(flips):
        kind = list(counts)[number % len(counts)]
        path = files[kind][int(rng.integers(len(files[kind])))]
        at, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip(path, at, bit)
        _look(out, path, counts[kind], f"{path.name}, byte {at}, bit {bit}")
        flip(path, at, bit)
    return counts


def flip(path: Path, at: int, bit: int) -> None:
    """Flips a bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))


def _look(out: Path, path: Path, count: Count, place: str) -> None:
    count.flips += 1
    try:
        sm.run(path) if path.name == "plan.json" else sm.verify(out)
    except sm.ShardmergeError as error:
        if not all(path.name in one.where for one in error.each()):
            count.unnamed.append(f"{place}: {error}")
    except Exception as error:  # noqa: BLE001  # what the command line calls a bug
        count.bugs.append(f"{place}: {error!r}")
    else:
        count.unseen.append(place)


def numbers(count: Count) -> dict[str, int]:
    """Returns a count as numbers."""
    return {"flips": count.flips, **{name: len(getattr(count, name)) for name in ("unseen", "bugs", "unnamed")}}


def _counted(flips: int, seed: int) -> Iterator[tuple[str, dict[str, dict[str, int]]]]:
    for form in FORMATS:
        with tempfile.TemporaryDirectory() as name:
            counts = flipped(scene(Path(name), form), flips // len(FORMATS), seed)
        for one in counts.values():
            for line in (*one.unseen, *one.bugs, *one.unnamed):
                print(form, line)
        yield form, {kind: numbers(one) for kind, one in counts.items()}


def main() -> None:
    """Counts, and writes the result file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    value = {
        "what": "single flipped bits of a result and a plan, each looked for by verify or run",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "shardmerge": sm.__version__,
        "seed": given.seed,
        "formats": dict(_counted(given.flips, given.seed)),
    }
    given.out.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
