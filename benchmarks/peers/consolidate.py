"""Puts the shards of a distributed checkpoint together with torch's own function, with a thread a CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files


def main(source: str, out: str) -> None:
    """Writes all tensors of ``source`` to one file in ``out``."""
    index = json.loads((Path(source) / "model.safetensors.index.json").read_text("utf-8"))
    Path(out).mkdir()
    threads = len(os.sched_getaffinity(0))
    consolidate_safetensors_files(source, out, dict.fromkeys(index["weight_map"], 1), num_threads=threads)


if __name__ == "__main__":
    main(*sys.argv[1:])
