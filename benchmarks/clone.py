"""Measures a merge that only renames, beside ``cp``, on file systems that clone and on one that does not.

    sudo python -m benchmarks.clone [--size 8GiB] [--kinds xfs,btrfs,here] [--rounds 5] [--scratch DIRECTORY]

XFS and btrfs are made in a sparse file and mounted, which takes root, ``mkfs.xfs`` and ``mkfs.btrfs``; ``here`` is the
file system of the scratch directory. Three times ``--size`` must be free there. Everyone runs in turn, round after
round, each a whole process; a first round is thrown away. Results go to ``benchmarks/results/clone-KIND.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.harness import answer, measure, order, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.synthetic import llama_of, write_safetensors
from shardmerge.bench.figures import ratios, spread

RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("xfs", "btrfs", "here")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_TOOLS = ("losetup", "mount", "umount")

_MAPPING = """\
shardmerge: 1
sources: {src: model.safetensors}
tensors:
  transformer.{rest...}: "src:model.{rest...}"
  lm_head.weight: "src:lm_head.weight"
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the job; ``floor`` names the one it is compared with, for ours."""

    key: str
    command: Callable[[Path, Path], Sequence[str | Path]]
    floor: str = ""


def _ours(source: Path, out: Path) -> list[str | Path]:
    return [sys.executable, "-m", "shardmerge", "run", source / "mapping.yaml", "--out", out, "--json"]


def _copy(then: str = "") -> Callable[[Path, Path], Sequence[str | Path]]:
    script = f'mkdir "$1" && cp --reflink=never "$0" "$1/copy"{then}'
    return lambda source, out: ["sh", "-c", script, source / "model.safetensors", out]


CONTENDERS = (
    Contender("shardmerge", _ours, "cp-sync"),
    Contender("shardmerge-no-sync", lambda source, out: [*_ours(source, out), "--no-sync"], "cp"),
    Contender("cp-sync", _copy(' && sync "$1/copy" "$1"')),
    Contender("cp", _copy()),
)


def measure_kind(folder: Path, nbytes: int, rounds: int) -> dict[str, object]:
    """Measures everyone below a directory and returns the figures: seconds and bytes."""
    source = folder / "source"
    source.mkdir()
    write_safetensors(source / "model.safetensors", llama_of(2 * nbytes).tensors(), fill=True)
    (source / "mapping.yaml").write_text(_MAPPING, "utf-8")
    size = (source / "model.safetensors").stat().st_size
    runs: dict[str, list[dict[str, float]]] = {one.key: [] for one in CONTENDERS}
    for number in range(-1, rounds):
        for one in order(CONTENDERS, number):
            figures = _run(one, source, folder / "out")
            if number >= 0:
                runs[one.key].append(figures)
        if number >= 0:
            line = ", ".join(f"{key} {seen[-1]['wall']:.3f} s" for key, seen in runs.items())
            print(f"  round {number + 1} of {rounds}: {line}", flush=True)
    return {
        "size": size,
        "rounds": rounds,
        "contenders": {key: {"runs": seen, **_medians(seen)} for key, seen in runs.items()},
        "wall_ratios": {one.key: _ratios(runs[one.key], runs[one.floor]) for one in CONTENDERS if one.floor},
        "new_space_share": {
            key: round(median(run["new_space"] for run in seen) / size, 5) for key, seen in runs.items()
        },
    }


def _run(one: Contender, source: Path, out: Path) -> dict[str, float]:
    os.sync()  # whoever ran before has no share in our waiting for the disk
    before = _used(source)
    done = succeed(measure(one.command(source, out), cwd=ROOT))
    figures = {"wall": round(done.wall, 4), "cpu": round(done.cpu, 4), "peak": float(done.peak)}
    if one.floor:
        found = answer(done)
        figures |= {key: float(str(found[key])) for key in ("clone_seconds", "bytes_cloned", "bytes_copied")}
    os.sync()
    figures["new_space"] = float(_used(source) - before)
    shutil.rmtree(out)
    _wait_for_space(source, before)
    return figures


def _wait_for_space(folder: Path, wanted: int) -> None:
    """XFS frees the blocks of a removed file a little later; the next one must not be told that it gained them."""
    for _ in range(50):
        os.sync()
        if _used(folder) < wanted + (8 << 20):
            return
        time.sleep(0.1)


def _used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _medians(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


def _ratios(ours: Sequence[dict[str, float]], floor: Sequence[dict[str, float]]) -> dict[str, float]:
    return ratios([run["wall"] for run in ours], [run["wall"] for run in floor])


@contextmanager
def _file_system(kind: str, scratch: Path, nbytes: int) -> Iterator[Path]:
    """Gives a directory on a file system of a kind; what was made for it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="clone-", dir=scratch) as name:
        folder = Path(name)
        if kind == "here":
            yield folder
            return
        image, root = folder / "image", folder / "root"
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(5 * nbytes // 2 + (1 << 30))
        _do(f"mkfs.{kind}", "-q", str(image))
        # Direct, or every page would be cached twice: in this file system and in the one below it.
        device = _do("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        try:
            _do("mount", device, str(root))
            try:
                yield root
            finally:
                _do("umount", str(root))
        finally:
            _do("losetup", "--detach", device)


def _do(tool: str, *arguments: str) -> str:
    found = shutil.which(tool, path=_PATH)
    assert found is not None
    return subprocess.run([found, *arguments], check=True, capture_output=True, text=True).stdout


def _missing(kinds: Sequence[str]) -> str:
    made = [kind for kind in kinds if kind != "here"]
    if made and os.geteuid():
        return f"mounting {' and '.join(made)} takes root; without: --kinds here"
    tools = [tool for tool in (*_TOOLS, *(f"mkfs.{kind}" for kind in made)) if not shutil.which(tool, path=_PATH)]
    return f"not installed: {', '.join(tools)} (apt-get install xfsprogs btrfs-progs)" if made and tools else ""


def _gib(text: str) -> int:
    return round(float(text.removesuffix("GiB")) * (1 << 30))


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description="A rename beside cp.")
    parser.add_argument("--size", type=_gib, default=8 << 30, help="of the checkpoint, e.g. 8GiB")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where three times the size is free")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        sys.exit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if missing := _missing(kinds):
        sys.exit(missing)
    as_installed()
    given.scratch.mkdir(parents=True, exist_ok=True)
    given.results.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        print(kind, flush=True)
        with _file_system(kind, given.scratch, given.size) as folder:
            card = machine_card(folder, None, given.note)
            result = {**provenance(), "machine": card, "kind": kind, **measure_kind(folder, given.size, given.rounds)}
        (given.results / f"clone-{kind}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        print(json.dumps({key: result[key] for key in ("wall_ratios", "new_space_share")}), flush=True)


if __name__ == "__main__":
    main()
