"""`make demo`: the main job on the small real checkpoint that ships here, then a gigabyte. Every command is shown."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from shardmerge.bench.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
MAPPING = "docs/examples/demo.yaml"
TRAINED = "tests/golden/xtuner/frozen_z2/work_dirs/iter_2.pth"
# What DeepSpeed's own converter needed for a checkpoint of a size, as measured beside ours.
MEASURED = ROOT / "benchmarks" / "results" / "zero2-1g.json"
GIB, MIB = 1 << 30, 1 << 20


def main() -> None:
    """Converts the small run, then a gigabyte; says what came of both."""
    for name in ("demo", "demo-1g", "demo-1g-source"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    (OUT / "demo.report.html").unlink(missing_ok=True)
    OUT.mkdir(exist_ok=True)
    _say("1. A LLaVA trained in XTuner, visual encoder frozen: the checkpoint holds 25 tensors, none of the encoder")
    _run("inspect", TRAINED)
    _say("2. The plan: where every tensor comes from. Nothing is read or written yet")
    _run("plan", MAPPING)
    _say("3. The conversion, and a check of every byte against the sources")
    _run("run", MAPPING, "--report")
    _run("verify", "out/demo", "--sources", MAPPING)
    _load()
    _say("4. A gigabyte of fp32 weights to bf16")
    _gigabyte()
    print("\nout/demo holds the model, out/demo.report.html says where every byte is from: open it in a browser.")


def _gigabyte() -> None:
    source = OUT / "demo-1g-source"
    source.mkdir()
    size = write_checkpoint(source, GIB)
    begun = time.monotonic()
    peak = _run("convert", "out/demo-1g-source", "out/demo-1g", "--dtype", "bfloat16", "--quiet")
    seconds = time.monotonic() - begun
    result = json.loads(MEASURED.read_text("utf-8"))
    theirs = next(entry["peak"]["median"] for entry in result["contenders"] if entry["key"] == "zero_to_fp32")
    print(f"{size / 1e9:.2f} GB read, {seconds:.1f} s on the disk\n\npeak memory, 1 GiB of fp32 weights")
    for name, used in (("shardmerge, just now", peak), ("DeepSpeed zero_to_fp32, as measured", theirs)):
        print(f"  {name:36} {used / MIB:>6,.0f} MiB  {'█' * max(1, round(40 * used / max(peak, theirs)))}")
    for name in ("demo-1g", "demo-1g-source"):
        shutil.rmtree(OUT / name)


def _load() -> None:
    """Loads the result where transformers is installed; `verify --load` does so in a process of its own."""
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        _run("verify", "out/demo", "--load", "--quiet")
    else:
        print("\nTo load it: transformers.LlavaForConditionalGeneration.from_pretrained('out/demo')")


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _run(*arguments: str) -> int:
    """Shows the command, runs it, and returns its peak resident memory in bytes; ends the demo if it fails."""
    print(f"\n$ shardmerge {' '.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "shardmerge", *arguments], cwd=ROOT, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"shardmerge {arguments[0]} failed")
    return used.ru_maxrss * 1024


if __name__ == "__main__":
    main()
