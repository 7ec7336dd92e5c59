"""What each sync is for: ``python -m tests.syncs`` leaves out one after the other and writes ``tests/soak/syncs.json``.

Two things then have to notice. The crash model (``crash_model``), a disk that keeps no more than it must, is given the
calls of every way without each of its syncs. And on disks that lose their power one sync of each kind is not made, and
said to have succeeded; then the power is cut at the calls up to the second sync after it, and after the end.

A sync that neither of them misses would be one that is not needed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import shardmerge as sm
from tests.campaigns import machine_in_memory, write_rows
from tests.crash_model import Disk, Node
from tests.cuts import JOURNALS, cut
from tests.killing import Call, Machine, Trap
from tests.power import DISKS, PoweredDisk, powered_disk
from tests.scene import ALL_WAYS, Scene, Way

RESULTS = Path(__file__).parent / "soak" / "syncs.json"
_PACKAGE = Path(sm.__file__).parent

_UNSYNCED = "weights made with --no-sync"
# What is synced, by its path below the staging directory, and the function of shardmerge that does so.
_KINDS = {
    r"parts/begun\.json\..*": ("the file that says what is begun", "storage.writing.write_small"),
    r"parts/\d{5}\.\w+\.\d+\.tmp": ("weights", "storage.writing.OutputFile.seal"),
    r"parts/\d{5}\.json\..*": ("receipt of a part", "storage.writing.write_small"),
    r"parts/shardmerge\.json\..*": ("receipt", "storage.writing.write_small"),
    r"parts/.*(\.index\.json|\.metadata)\..*": ("index", "storage.writing.write_small"),
    r"parts/.*\.tmp": ("small file", "storage.writing.write_small"),
    r"ready-\w+/.*\.(safetensors|bin|distcp)": (_UNSYNCED, "publish.finishing._Publishing._unfit"),
    r"model(/.*)?": ("directory of a part's weights", "publish.staging.Staging.settle"),
    r"parts": ("directory of the receipts of parts", "publish.staging.Staging.settle"),
    r"ready-\w+(/.*)?": ("directories of the result", "publish.staging.Staging.settle"),
    r"": ("staging directory", "publish.staging.Staging.begin"),
}
_FIRST, _SECOND = "weights, before their first bytes", "weights, after their first bytes"
_BEFORE, _AFTER = "directory of the output path, at the start", "directory of the output path, at the end"
_ABOVE, _PLAN = "new directories above it", "plan"
_AT_THE_START = (_KINDS[""][0], _BEFORE, _ABOVE)
SITES = {
    _FIRST: "storage.writing.OutputFile.seal",
    _SECOND: "storage.writing.OutputFile.seal",
    _BEFORE: "storage.writing.sync_above",
    _ABOVE: "storage.writing.sync_above",
    _AFTER: "publish.finishing.Goal.settle",
    _PLAN: "storage.writing.write_lines",
    **{what: site for what, site in _KINDS.values() if what != "weights"},
}
# What the functions above call, and what nobody else does.
_SYNCS = {"fsync", "fdatasync", "_fsync", "sync_file", "sync_directory"}
_OWN = {f"storage.writing.{name}" for name in ("OutputFile._fsync", "sync_file", "sync_directory")}


def sites() -> set[str]:
    """Returns the functions of shardmerge that sync something, as its source says."""
    found = set()
    for path in _PACKAGE.rglob("*.py"):
        module, text = ".".join(path.relative_to(_PACKAGE).with_suffix("").parts), path.read_text("utf-8")
        found |= {f"{module}.{name}" for name in _that_sync(ast.parse(text), "")} if "sync" in text else set()
    return found - _OWN


def _that_sync(node: ast.AST, inside: str) -> Iterator[str]:
    for one in ast.iter_child_nodes(node):
        if isinstance(one, ast.FunctionDef | ast.ClassDef):
            yield from _that_sync(one, f"{inside}.{one.name}".strip("."))
            continue
        if isinstance(one, ast.Call) and getattr(one.func, "attr", getattr(one.func, "id", "")) in _SYNCS:
            yield inside
        yield from _that_sync(one, inside)


@dataclass(frozen=True)
class Sync:
    """A sync of a run.

    Attributes
    ----------
    way
        Of the run, a key of ``ALL_WAYS``.
    at
        The number of the call, from 1.
    what
        What is synced, a key of ``SITES``.
    """

    way: str
    at: int
    what: str


def syncs(scene: Scene, way: str, calls: Sequence[Call]) -> list[Sync]:
    """Returns the syncs of a run, in their order; not those of directories that were there for long."""
    found, before = [], set[str]()
    there = (scene.place if ALL_WAYS[way].before else scene.root).parents
    published = False
    for at, call in enumerate(calls, 1):
        published |= call.name in ("rename", "exchange") and call.b == str(scene.out)
        if call.name == "fsync" and Path(call.a) not in there:
            sync = Sync(way, at, _what(scene, call.a, again=call.a in before, published=published))
            if sync.what not in _AT_THE_START or call.a not in before:  # the second command of a way does it again
                found.append(sync)
            before.add(call.a)
    return found


def _what(scene: Scene, path: str, *, again: bool, published: bool) -> str:
    inside = re.fullmatch(rf"{re.escape(str(scene.place))}/out\.partial-\w+/?(.*)", path)
    if inside is None:
        return (_AFTER if published else _BEFORE) if path == str(scene.place) else _ABOVE
    what = next(what for pattern, (what, _) in _KINDS.items() if re.fullmatch(pattern, inside[1]))
    return what if what != "weights" else _SECOND if again else _FIRST


def names(calls: Sequence[Call]) -> list[str]:
    """Returns the file of each part by its number, as a run moved them there."""
    found = {}
    for call in calls:
        part = re.fullmatch(r".*/parts/(\d{5})\.\w+\.\d+\.tmp", call.a)
        if call.name == "rename" and part:
            found[int(part[1])] = call.b.split("/model/")[1]
    return [found[number] for number in sorted(found)]


def broken(scene: Scene, way: Way, calls: Sequence[Call], made: Path | None = None) -> list[str]:
    """Returns the promises that a run with these calls breaks, on a disk that keeps no more than it must.

    Parts that are made with --no-sync are promised by nobody.
    """
    scene.begin(way, made)
    found = list(Disk(scene.root, Node.of(scene.root), scene.out, names(calls)).broken(calls))
    if len(way.steps) > 1:  # what the first of the commands promises, too
        first = list(takewhile(lambda call: call.pid == calls[0].pid, calls))
        found += Disk(scene.root, Node.of(scene.root), scene.out, names(calls)).broken(first, published=False)
    return [one for one in found if not (way.unsynced and one.startswith("part "))]


def traces(scene: Scene, runs: Machine) -> dict[str, list[Call]]:
    """Returns the calls of an undisturbed run of every way that makes its parts itself, in one process.

    Of several, one begins a part while another has not committed the one before.
    """
    found = {}
    for name, way in ALL_WAYS.items():
        if not (way.made or way.processes):
            scene.begin(way)
            assert scene.run(runs, way).code == 0
            found[name] = runs.calls
    return found


# --- on disks that lose their power ---


def caught(scene: Scene, disk: PoweredDisk, runs: Machine, sync: Sync, points: Sequence[int], length: int) -> str:
    """Returns the first power cut that does harm without a sync, before some calls and after the end, or ``""``."""
    for at in (*points, length + 1):
        for journal in JOURNALS:
            try:
                cut(scene, disk, runs, ALL_WAYS[sync.way], at, None, JOURNALS[journal], sync.at)
            except (AssertionError, OSError) as error:
                when = "after the end" if at > length else f"{at - sync.at} calls later"
                harm = str(error).partition("\n")[0][:100] or "a partial result"
                return f"{when}, journal {journal}: {harm}"
    return ""


def plan_caught(scene: Scene, disk: PoweredDisk, runs: Machine) -> str:
    """Like ``caught``, for the file that ``plan`` writes: it is whole, or the one before."""
    file, before = scene.root / "written.json", scene.plan("bin").read_bytes()
    command = ["plan", scene.inputs / "mapping.yaml", "--out", file]
    assert runs.run(*command).code == 0
    whole = file.read_bytes()
    skipped = next(at for at, call in enumerate(runs.calls, 1) if call.name == "fsync")
    for name, journal in JOURNALS.items():
        file.write_bytes(before)
        disk.settle()
        assert runs.run(*command, trap=Trap(skip=skipped)).code == 0
        disk.cut(journal)
        if file.read_bytes() not in (before, whole):
            return f"after the end, journal {name}: a file of {file.stat().st_size} bytes"
    return ""


def _some(found: Sequence[Sync]) -> dict[str, list[Sync]]:
    """Returns of each kind the first and the last of one run."""
    kinds: dict[str, list[Sync]] = {}
    for sync in found:
        kinds.setdefault(sync.what, []).append(sync)
    return {what: [one for one in (same[0], same[-1]) if one.way == same[0].way] for what, same in kinds.items()}


_Row = dict[str, Any]


def _modelled(scene: Scene, runs: Machine) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for name, calls in traces(scene, runs).items():
        assert broken(scene, ALL_WAYS[name], calls) == []
        unsynced = ALL_WAYS[name].unsynced
        for sync in (one for one in syncs(scene, name, calls) if not unsynced or one.what == _UNSYNCED):
            row = rows.setdefault(sync.what, {"sync": sync.what, "site": SITES[sync.what], "calls": 0, "model": 0})
            row["calls"] += 1
            found = broken(scene, ALL_WAYS[name], [*calls[: sync.at - 1], *calls[sync.at :]])
            row["model"] += bool(found)
            row.setdefault("broken", Counter()).update(found[:1])
    return rows


def _on_disk(runs: Machine, name: str, known: Container[str]) -> Iterator[tuple[str, str]]:
    """Yields each kind of sync that is not known yet, and the cut that misses it, or ``""``."""
    with powered_disk(name) as disk:
        scene = Scene.set(disk.root / "scene", runs, ALL_WAYS.values())
        found = traces(scene, runs)
        some = _some([sync for way, calls in found.items() for sync in syncs(scene, way, calls)])
        for what in some.keys() - known:
            looked = (
                caught(scene, disk, runs, sync, points(found[sync.way], sync.at), len(found[sync.way]))
                for sync in some[what]
            )
            yield what, next(filter(None, looked), "")
        if _PLAN not in known:
            yield _PLAN, plan_caught(scene, disk, runs)


def points(calls: Sequence[Call], after: int = 0) -> list[int]:
    """Returns the calls before which something changed for a disk, up to the second sync after a call."""
    found = []
    syncs_left = 2
    for at, call in enumerate(calls[after:], after + 1):
        quiet = call.name in _QUIET and calls[at - 2].name in _QUIET
        found += [] if quiet else [at]
        syncs_left -= call.name == "fsync"
        if after and not syncs_left:
            break
    return found


_QUIET = ("pwrite", "sync_file_range", "ftruncate", "utimens")


def main() -> None:
    """Leaves out every sync, and writes down what missed it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disks", nargs="*", default=list(DISKS), help="on which")
    parser.add_argument("--go-on", action="store_true", help="with what the result file does not have yet")
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if given.go_on else []
    before = {row["sync"]: row["disks"] for row in kept}
    with machine_in_memory("syncs") as (base, runs):
        rows = _modelled(Scene.set(base / "scene", runs, ALL_WAYS.values()), runs)
        rows[_PLAN] = {"sync": _PLAN, "site": SITES[_PLAN], "calls": 1, "model": 0}
        for what, row in rows.items():
            row["disks"] = before.get(what, {})
        for name in given.disks:
            for what, how in _on_disk(runs, name, [one for one, row in rows.items() if name in row["disks"]]):
                rows[what]["disks"][name] = how
                print(name, what, how, flush=True)
                write_rows(RESULTS, list(rows.values()))
    raise SystemExit(not all(row["model"] == row["calls"] or any(row["disks"].values()) for row in rows.values()))


if __name__ == "__main__":
    main()
