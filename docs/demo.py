"""`make demo`: the main job on the small real checkpoint that ships here, each command shown before it runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"
MAPPING = "docs/examples/demo.yaml"
TRAINED = "tests/golden/xtuner/frozen_z2/work_dirs/iter_2.pth"


def show(text: str, *arguments: str) -> None:
    """Says what comes, prints the command, runs it, and stops the demo if it fails."""
    print(f"\n# {text}\n$ shardmerge {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "shardmerge", *arguments], cwd=ROOT, check=True)


def main() -> None:
    """Plans, converts and verifies."""
    shutil.rmtree(OUT, ignore_errors=True)
    show("What the training left: 25 tensors, and no visual_encoder among them", "inspect", TRAINED)
    show("Where every part of the result will come from; nothing is read or written yet", "plan", MAPPING)
    show("The conversion", "run", MAPPING, "--quiet")
    show("Every byte checked, and every tensor made again from its sources", "verify", "out/demo", "--sources", MAPPING)
    print(f"\n{OUT.relative_to(ROOT)}/")
    for path in sorted(OUT.iterdir()):
        print(f"  {path.name:32} {path.stat().st_size:>9,} bytes")
    print("\nLoad it: transformers.LlavaForConditionalGeneration.from_pretrained('out/demo')")


if __name__ == "__main__":
    main()
