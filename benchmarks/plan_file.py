"""Measures a plan of a trillion parameters as a file: made, written, read whole, and one part of it read.

    python -m benchmarks.plan_file [--runs 3] [--scratch DIRECTORY] [--note TEXT]

The checkpoint has the names and sizes of a mixture of 384 experts in 61 layers (1.0 T parameters in fp8 with scales) in
1,000 files; headers are true, the data are holes. Each step is a process of its own. The result goes to
``benchmarks/results/plan-file.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import measure, succeed
from benchmarks.machine import ROOT, as_installed, machine_card, provenance
from benchmarks.scale import DeepSeekShape, write_sharded

RESULT = ROOT / "benchmarks" / "results" / "plan-file.json"

SHAPE = DeepSeekShape(dense=1, experts=384, heads=64, vocab=163_840)
# A thousand files of about a gigabyte, in and out.
SHARD = 1_035_000_000
MAPPING = f"""\
shardmerge: 1
sources: {{src: model}}
output: {{path: out, shard_size: {SHARD}}}
tensors:
  language_model.{{rest...}}: src:{{rest...}}
"""
_ONE_PART = """\
import sys
from shardmerge.plan.reading import PlanText
with open("plan.json", encoding="utf-8") as lines:
    read = PlanText(lines, "plan.json")
    (part,) = read.parts([len(read.sizes) // 2])
print(len(part.shard.tensors))
"""


def steps() -> dict[str, Sequence[str]]:
    """Returns what is measured, by name: a command in the directory of the mapping."""
    program = (sys.executable, "-m", "shardmerge")
    memory = ("--max-memory", "512MiB")
    return {
        "planned": (*program, "plan", "mapping.yaml", "--json", *memory),
        "planned and written": (*program, "plan", "mapping.yaml", "--json", "--out", "plan.json", *memory),
        "read": (*program, "plan", "plan.json", "--json", *memory),
        "one part read": (sys.executable, "-c", _ONE_PART),
    }


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description="A plan of a trillion parameters as a file.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where some hundred MB of headers may lie meanwhile")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    as_installed()
    with tempfile.TemporaryDirectory(prefix="plan-file-", dir=given.scratch) as name:
        folder = Path(name)
        files = write_sharded(folder / "model", SHAPE.tensors(), SHARD)
        (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
        found: dict[str, object] = {**provenance(), "machine": machine_card(folder, None, given.note), "files": files}
        for step, command in steps().items():
            done = [succeed(measure(command, cwd=folder)) for _ in range(given.runs)]
            found[step] = {
                "wall": round(statistics.median(one.wall for one in done), 2),
                "walls": [round(one.wall, 2) for one in done],
                "cpu": round(statistics.median(one.cpu for one in done), 2),
                "peak": max(one.peak for one in done),
            }
            print(step, json.dumps(found[step]), flush=True)
        plan = folder / "plan.json"
        head = json.loads(plan.open(encoding="utf-8").readline().rstrip(",\n") + "}")
        found |= {"plan_bytes": plan.stat().st_size, "parts": len(head["parts"])}
    found["tensors"] = sum(1 for _ in SHAPE.tensors())
    found["parameters"] = sum(_numel(shape) for name, shape, _ in SHAPE.tensors() if not name.endswith("scale_inv"))
    RESULT.write_text(json.dumps({"schema": 1, **found}, indent=1) + "\n", "utf-8")


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


if __name__ == "__main__":
    main()
