"""Measures the memory of merges of a full 8B model, from holes: the values are zeros, all else is real.

    python -m benchmarks.memory_8b [--kinds lora,linear,ties] [--layers 32] [--limit MIB] [--scratch DIRECTORY]

Each runs in a memory control group of ``--limit`` MiB, page cache included, where the system lets us make one: it is
killed if it needs more. Writes 16 GB of output a kind, which are deleted at once. Results go to
``benchmarks/results/memory-8b.json``, beside those of kinds measured before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import answer, measure
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.memory_group import memory_group
from benchmarks.merges import WRITERS
from benchmarks.synthetic import LLAMA_3_8B, LlamaShape

RESULT = ROOT / "benchmarks" / "results" / "memory-8b.json"
ABOUT = {
    "lora": "LoRA with r = 512 on all linear layers, fp32, into a bf16 base",
    "linear": "linear, three bf16 models",
    "ties": "TIES of three bf16 models and their base, density 0.2",
    "dare": "DARE of three bf16 models and their base, density 0.5",
    "della": "DELLA of three bf16 models and their base, density 0.5",
}


def measure_merge(kind: str, shape: LlamaShape, folder: Path, limit: int) -> dict[str, object]:
    """Writes the inputs of a merge, runs it, and returns its figures: seconds and bytes. Leaves the output there."""
    mapping = WRITERS[kind](folder / kind, shape)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "shardmerge",
        "run",
        mapping,
        "--out",
        folder / "out",
        "--json",
    ]
    with memory_group(limit) as group:
        done = measure(command, cwd=ROOT, group=group.procs if group else "")
    found = answer(done)
    return {
        "layers": shape.layers,
        "limit": limit if group else None,
        "wall": round(done.wall, 1),
        "cpu": round(done.cpu, 1),
        "peak": done.peak,
        "anonymous": done.anonymous,
        **{key: found[key] for key in ("planned_peak", "tensors", "total_size", "bytes_read")},
    }


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description="Memory of merges of an 8B model.")
    parser.add_argument("--kinds", default=",".join(ABOUT))
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B.layers)
    parser.add_argument("--limit", type=int, default=256, help="of the control group, in MiB")
    parser.add_argument("--scratch", type=Path, help="where 16 GB may lie meanwhile")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    as_installed()
    for kind in given.kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="memory-8b-", dir=given.scratch) as name:
            folder = Path(name)
            seen = {**provenance(), "machine": machine_card(folder, None, given.note)}
            figures = measure_merge(kind, replace(LLAMA_3_8B, layers=given.layers), folder, given.limit << 20)
            shutil.rmtree(folder / "out")
        runs = json.loads(RESULT.read_text("utf-8"))["runs"] if RESULT.is_file() else {}
        runs[kind] = {"about": ABOUT[kind], **figures, **seen}
        RESULT.write_text(json.dumps({"schema": 1, "runs": runs}, indent=1) + "\n", "utf-8")
        print(kind, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
