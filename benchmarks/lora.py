"""Measures a LoRA merge beside what it cannot do without: the product in float64, and the passes over memory.

    python -m benchmarks.lora [--layers 5] [--rank 64] [--workers 1,2] [--rounds 5] [--scratch DIRECTORY] [--note TEXT]

A layer is one of a Llama-3-8B, 218 million parameters in bfloat16, all of its matrices with an adapter in float32; the
adapter's scale is 2. In turn, round after round, from a warm page cache and without sync:

* ``product``: ``B @ A`` of every matrix as a whole, ``numpy.matmul`` in float64 by one thread, into memory that is
  there already;
* ``passes``: each tile read, widened to float64, rounded to float32 and to bfloat16, its checksum taken, written, by
  one thread: a merge without the product and the sum;
* ``shardmerge run`` by so many workers, the whole process. The output is a file a layer, so that there is a part for
  each of several processes.

Needs twice the model on the disk: 4.4 GB by default; a round takes half a minute on two cores. The result goes to
``benchmarks/results/lora.json``. On 16 cores: ``--workers 1,2,4,8,16 --layers 16``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.harness import measure, order, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.merges import LINEAR, write_lora
from benchmarks.synthetic import LLAMA_3_8B, LlamaShape
from shardmerge.bench.figures import ratios, spread
from shardmerge.dtypes import DTYPES
from shardmerge.execute.checksum import crc32
from shardmerge.ops.arrays import as_array
from shardmerge.ops.blas import one_thread
from shardmerge.ops.fast_casts import convert
from shardmerge.ops.parts import PART, parts

RESULT = ROOT / "benchmarks" / "results" / "lora.json"
_F32, _BF16 = DTYPES["F32"], DTYPES["BF16"]
_TILE = 2 << 20

# One run of one contender: seconds of wall clock, and of CPU.
Seconds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Job:
    """The files of a merge, and the matrices that are merged."""

    mapping: Path
    shapes: tuple[tuple[int, int], ...]
    rank: int

    @classmethod
    def write(cls, folder: Path, shape: LlamaShape, rank: int) -> Job:
        """Writes base, adapter and mapping."""
        mapping = write_lora(folder, shape, rank, fill=True)
        layer = 2 * sum(rows * columns for rows, columns in _merged(replace(shape, layers=1)))
        lines = mapping.read_text("utf-8").replace(
            "tensors:", f"output: {{path: out, shard_size: {layer + (32 << 20)}}}\ntensors:"
        )
        mapping.write_text(lines, "utf-8")
        return cls(mapping, _merged(shape), rank)

    @property
    def parameters(self) -> int:
        """Of all matrices that are merged."""
        return sum(map(prod, self.shapes))

    @property
    def base(self) -> Path:
        """The file of the base."""
        return self.mapping.parent / "base" / "model.safetensors"


def _merged(shape: LlamaShape) -> tuple[tuple[int, int], ...]:
    found = (dims for name, dims in shape.tensors().items() if name.removesuffix(".weight").endswith(LINEAR))
    return tuple((rows, columns) for rows, columns in found)


def product(job: Job) -> Seconds:
    """Multiplies the factors of every matrix."""
    rng = np.random.default_rng(0)
    factors = {
        (rows, columns): (rng.standard_normal((rows, job.rank)), rng.standard_normal((job.rank, columns)))
        for rows, columns in set(job.shapes)
    }
    room = np.ones(max(map(prod, job.shapes)))
    with one_thread():
        return _timed(
            lambda: [np.matmul(*factors[shape], out=room[: prod(shape)].reshape(shape)) for shape in job.shapes]
        )


def passes(job: Job, out: Path) -> Seconds:
    """Moves the base through the types of a merge and writes it to a new file."""
    return _timed(lambda: _pass(job.base, out))


def _pass(source: Path, out: Path) -> None:
    given, made = memoryview(bytearray(_TILE)), memoryview(bytearray(_TILE))
    wide, narrow = np.empty(PART), np.empty(PART, np.float32)
    with source.open("rb", buffering=0) as file, out.open("xb", buffering=0) as target:
        while nbytes := file.readinto(given):
            values, cast = as_array(given[:nbytes], _BF16), as_array(made[:nbytes], _BF16)
            for part in parts(len(values)):
                count = part.stop - part.start
                np.copyto(wide[:count], values[part])
                np.copyto(narrow[:count], wide[:count], casting="unsafe")
                convert(narrow[:count], cast[part], _F32, _BF16)
            crc32(made[:nbytes])
            target.write(made[:nbytes])


def merge(job: Job, out: Path, workers: int) -> Seconds:
    """Merges with shardmerge, in a process of its own."""
    command = [sys.executable, "-m", "shardmerge", "run", job.mapping, "--out", out, "--no-sync", "--json"]
    done = succeed(measure([*command, "--workers", str(workers)]))
    return done.wall, done.cpu


def _timed(work: Callable[[], object]) -> Seconds:
    started, before = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - before


def measured(job: Job, workers: Sequence[int], rounds: int) -> dict[str, list[Seconds]]:
    """Returns wall and CPU seconds of every contender, round by round; a first round is thrown away."""
    out = job.mapping.parent / "out"
    works: dict[str, Callable[[], Seconds]] = {"product": lambda: product(job), "passes": lambda: passes(job, out)}
    for number in workers:
        works[str(number)] = lambda number=number: merge(job, out, number)  # type: ignore[misc]
    seconds: dict[str, list[Seconds]] = {key: [] for key in works}
    for number in range(-1, rounds):
        for key in order(list(works), number):
            os.sync()
            took = works[key]()
            _remove(out)
            if number >= 0:
                seconds[key].append(took)
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


def result(job: Job, seconds: Mapping[str, Sequence[Seconds]], card: Mapping[str, object]) -> dict[str, object]:
    """Returns the result file."""
    wall = {key: [round(one[0], 4) for one in took] for key, took in seconds.items()}
    cpu = {key: [round(one[1], 4) for one in took] for key, took in seconds.items()}
    workers = [key for key in seconds if key.isdigit()]
    both = [sum(parts) for parts in zip(wall["product"], wall["passes"], strict=True)]
    rows = [
        [
            _title(key),
            *(_shown(spread(figures[key])) for figures in (wall, cpu)),
            *(_shown(ratios(wall[key], floor)) for floor in (wall["product"], both)),
        ]
        for key in seconds
    ]
    return {
        **provenance(),
        "machine": card,
        "title": f"LoRA, r = {job.rank}, into {job.parameters / 1e9:.2f} billion parameters",
        "about": "bfloat16, the matrices of a Llama-3-8B's layers, an output file a layer. The product is `B @ A` of "
        "all matrices by `numpy.matmul` in float64; the passes read, widen, round twice, take checksums and write as "
        "many bytes, without product and sum. Both by one thread. "
        f"{len(wall['product'])} rounds, warm, unsynced; ratios in the same round.",
        "wall": wall,
        "cpu": cpu,
        "over_product": {key: ratios(wall[key], wall["product"]) for key in workers},
        "speedups": {key: ratios(wall[workers[0]], wall[key]) for key in workers[1:]},
        "tables": [{"columns": ["", "wall s", "CPU s", "x the product", "x product and passes"], "rows": rows}],
    }


def _title(key: str) -> str:
    if key.isdigit():
        return f"shardmerge, {key} worker{'s' if key != '1' else ''}"
    return {"product": "the product alone", "passes": "the passes alone"}[key]


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--workers", default="1,2", help="the first is what others are compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out", help="where twice the size is free")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    as_installed()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        job = Job.write(Path(folder), replace(LLAMA_3_8B, layers=given.layers, vocab=1024), given.rank)
        seconds = measured(job, [int(number) for number in given.workers.split(",")], given.rounds)
    found = result(job, seconds, machine_card(given.scratch, note=given.note))
    given.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
