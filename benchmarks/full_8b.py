"""Converts a whole 8B once: ZeRO-2 of two ranks, 32 GB of fp32 weights in, 16 GB of bf16 out, every value real.

    python -m benchmarks.full_8b [--scratch DIRECTORY] [--layers 32]

The moments are holes. Needs about 51 GB of disk, asks for it first, and deletes all of it. shardmerge runs freely and
in a memory control group of 128 MiB, then comes the floor: reading the same bytes and writing as many. The input does
not fit the memory of a usual machine; the page cache is dropped before each. The result is ``results/full-8b.json``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from benchmarks import floor, report
from benchmarks.contender import program
from benchmarks.harness import Measured, answer, measure, succeed, thinned
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.memory_group import memory_group
from benchmarks.page_cache import forget
from benchmarks.run import RESULTS, scratch
from benchmarks.synthetic import LLAMA_3_8B, LlamaShape, master_weights, write_zero
from shardmerge.storage.writing import free_bytes

LIMIT = 128 << 20
WORLD = 2
_BLOCK = 1 << 30
_MIB = 1 << 20
Run = dict[str, object]


def needed_disk(shape: LlamaShape) -> int:
    """Returns bytes: the fp32 weights, one bf16 output, what is written repeatedly, and a little."""
    return 6 * _numel(shape) + 2 * _BLOCK


def measure_all(shape: LlamaShape, folder: Path) -> tuple[list[Run], list[str]]:
    """Writes the input, converts it, checks it, and measures the floor; returns the runs and what was checked."""
    source, out = folder / "source", folder / "out"
    tag = write_zero(source, shape.tensors(), stage=2, world=WORLD, fill=True)
    command = [*program(), "convert", source, out, "--dtype", "bfloat16", "--json"]
    cache = forget([source])
    runs, checks = [_measured("shardmerge", command, out)], [_check(tag, shape, out)]
    shutil.rmtree(out)
    forget([source])
    limited = _measured("shardmerge in 128 MiB", command, out, LIMIT)
    runs += [limited] if limited["cgroup"] is not None else []
    shutil.rmtree(out, ignore_errors=True)
    script = _floor_script(source, folder, 2 * _numel(shape))
    forget([source])
    runs.append(_measured("floor: read the input, write as much, sync", ["sh", script, out], out))
    return runs, [f"Cache {cache}", *checks]


def _numel(shape: LlamaShape) -> int:
    return sum(prod(dims) for dims in shape.tensors().values())


def _measured(title: str, command: Sequence[str | Path], out: Path, limit: int = 0) -> Run:
    with memory_group(limit) as group:
        if limit and group is None:
            return {"title": title, "cgroup": None}
        done = succeed(measure(command, cwd=ROOT, group=group.procs if group else ""))
        taken = group.peak() if group else None
    print(f"{title}: {done.wall:.1f} s, {done.peak / _MIB:.1f} MiB", flush=True)
    return {"title": title, **_figures(done), "cgroup": taken, **_told(done, command)}


def _figures(done: Measured) -> Run:
    figures = {name: round(getattr(done, name), 2) for name in ("wall", "cpu")}
    sizes = {name: getattr(done, name) for name in ("peak", "anonymous", "mapped")}
    return {**figures, **sizes, "io": dict(done.io), "curve": thinned(done.curve)}


def _told(done: Measured, command: Sequence[str | Path]) -> Run:
    if "--json" not in command:
        return {}
    found = answer(done)
    return {name: found[name] for name in ("planned_peak", "tensors", "total_size", "bytes_read", "bytes_written")}


def _floor_script(source: Path, folder: Path, nbytes: int) -> Path:
    """Writes the floor: what it writes is a block of memory's page cache, so that it costs no second reading."""
    block, rest = folder / "block", folder / "rest"
    values = np.random.default_rng(0).bytes(1 << 24)
    for path, size in ((block, min(_BLOCK, nbytes)), (rest, nbytes % _BLOCK)):
        with path.open("wb") as file:
            file.writelines(values[: min(len(values), size - start)] for start in range(0, size, len(values)))
    files = " ".join(shlex.quote(str(path)) for path in [block] * (nbytes // _BLOCK) + [rest])
    script = folder / "floor.sh"
    reading = "".join(map(floor.reading, floor.needed([source])))
    script.write_text(f'set -e\n{reading}mkdir "$1"\ncat {files} > "$1/copy"\nsync "$1/copy"\n', "utf-8")
    return script


def _check(tag: Path, shape: LlamaShape, out: Path) -> str:
    """Compares the first, a middle and the last tensor with torch's cast of the master weights."""
    import torch
    from safetensors import safe_open

    starts, cursor = {}, 0
    for name, dims in shape.tensors().items():
        starts[name] = (cursor, prod(dims))
        cursor += prod(dims)
    names = list(starts)
    index = out / "model.safetensors.index.json"
    files = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
    for name in (names[0], names[len(names) // 2], names[-1]):
        truth = torch.from_numpy(master_weights(tag, WORLD, cursor, *starts[name])).to(torch.bfloat16)
        with safe_open(out / files.get(name, "model.safetensors"), "pt") as file:
            if not torch.equal(file.get_tensor(name).flatten().view(torch.int16), truth.view(torch.int16)):
                raise RuntimeError(f"{name} is not what torch makes of the master weights")
    return "The first, a middle and the last tensor are what torch makes of the master weights, bit by bit"


def result(runs: Sequence[Run], checks: Sequence[str], shape: LlamaShape, card: dict[str, object]) -> dict[str, object]:
    """Returns the result file: the runs, a table and a plot."""
    last = float(str(runs[-1]["wall"]))
    columns = [
        "",
        "wall s",
        "x the floor",
        "CPU s",
        "peak MiB",
        "anonymous",
        "file pages",
        "with page cache",
        "planned",
    ]
    rows = []
    for run in runs:
        sizes = (run.get(name) for name in ("peak", "anonymous", "mapped", "cgroup", "planned_peak"))
        mebibytes = [None if size is None else round(float(str(size)) / _MIB, 1) for size in sizes]
        wall = float(str(run["wall"]))
        rows.append([run["title"], round(wall, 1), round(wall / last, 2), run["cpu"], *mebibytes])
    first = runs[0]
    model = "A whole Llama-3-8B" if shape == LLAMA_3_8B else f"A LLaMA of {_numel(shape):,} parameters"
    about = f"{first['bytes_read']:,} bytes read, {first['bytes_written']:,} written, {first['tensors']} tensors. "
    return {
        **provenance(),
        "machine": card,
        "title": f"{model}: ZeRO-2 of {WORLD} ranks, fp32 to bf16",
        "about": about + "One run each, synced. " + " ".join(f"{check}." for check in checks),
        "runs_of_8b": list(runs),
        "tables": [{"columns": columns, "rows": rows}],
        "plots": [
            {
                "key": "memory",
                "title": "Memory of the conversion of an 8B",
                "axes": ["seconds", "resident MiB"],
                "series": [_series(run) for run in runs if "planned_peak" in run],
            }
        ],
    }


def _series(run: Run) -> dict[str, object]:
    curve = run["curve"]
    assert isinstance(curve, list)
    points = [[seconds, (anonymous + mapped) / _MIB] for seconds, anonymous, mapped in curve]
    return {"label": run["title"], "points": points}


def main() -> None:
    """Measures, writes the result, and renders the page."""
    parser = argparse.ArgumentParser(description="A whole 8B, on the record.")
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where 51 GB may lie meanwhile")
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B.layers)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    as_installed()
    shape = replace(LLAMA_3_8B, layers=given.layers)
    with scratch(given.scratch) as folder:
        if free_bytes(folder) < needed_disk(shape):
            sys.exit(f"{needed_disk(shape):,} bytes are needed on the disk of {given.scratch}")
        card = machine_card(folder, None, given.note)
        found = result(*measure_all(shape, folder), shape, card)
    (given.results / "full-8b.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if given.results == RESULTS:
        report.write()


if __name__ == "__main__":
    main()
