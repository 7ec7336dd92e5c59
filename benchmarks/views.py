"""Measures what a view of a tensor costs: ``LazyTensor.numpy()`` and ``.torch()``, beside safetensors and reading.

    python -m benchmarks.views [--rounds 50] [--scratch DIRECTORY] [--note TEXT]

The files are holes, so nothing but the scratch directory's file system must be able to say that they are so large. Each
round maps anew: the view of the round before is gone. The result goes to ``benchmarks/results/views.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.harness import order
from benchmarks.machine import ROOT, machine_card, provenance
from benchmarks.synthetic import write_safetensors
from shardmerge import open_checkpoint
from shardmerge.bench.figures import spread

RESULT = ROOT / "benchmarks" / "results" / "views.json"
SIZES = {"1 MiB": 1 << 20, "1 GiB": 1 << 30, "100 GiB": 100 << 30}
_LARGEST_READ = 1 << 30
_REFUSED = "refused"


def ways(path: Path, nbytes: int) -> dict[str, Callable[[], object]]:
    """Returns what is measured of one file; reading no more than the memory of a small machine."""
    tensor = open_checkpoint(path)["w"]
    reading = {"copy=True": lambda: tensor.numpy(copy=True)} if nbytes <= _LARGEST_READ else {}
    return {"numpy()": tensor.numpy, "torch()": tensor.torch, "safe_open": lambda: _reference(path), **reading}


def _reference(path: Path) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        found: torch.Tensor = file.get_tensor("w")
        return found


def measured(folder: Path, rounds: int, sizes: Mapping[str, int] = SIZES) -> dict[str, dict[str, list[float] | str]]:
    """Returns milliseconds by size and way, round by round, or why a way was refused; the first call counts."""
    found: dict[str, dict[str, list[float] | str]] = {}
    for name, nbytes in sizes.items():
        path = folder / "x.safetensors"
        write_safetensors(path, {"w": (nbytes // 8192, 4096)})
        taken = ways(path, nbytes)
        seen: dict[str, list[float] | str] = {key: [] for key in taken}
        for number in range(rounds):
            for key, call in order(list(taken.items()), number):
                _measure(seen, key, call)
        found[name] = seen
        path.unlink()
    return found


def _measure(seen: dict[str, list[float] | str], key: str, call: Callable[[], object]) -> None:
    figures = seen[key]
    if isinstance(figures, str):
        return
    started = time.perf_counter()
    try:
        call()
    except RuntimeError as error:  # how torch says that the system refused a map
        seen[key] = f"{_REFUSED}: {error}"
        return
    figures.append(round(1000 * (time.perf_counter() - started), 4))


def result(found: Mapping[str, Mapping[str, list[float] | str]], card: dict[str, object]) -> dict[str, object]:
    """Returns the result file."""
    keys = list(dict.fromkeys(key for seen in found.values() for key in seen))
    rows = [[name, *(_shown(seen.get(key, [])) for key in keys)] for name, seen in found.items()]
    return {
        **provenance(),
        "machine": card,
        "title": "Views of a tensor",
        "about": "Milliseconds to have a tensor of that size, and to let go of it; `safe_open` is the reference's "
        "reader, opened each time. Of holes: nothing is read but by `copy=True`.",
        "milliseconds": found,
        "tables": [{"columns": ["", *keys], "rows": rows}],
    }


def _shown(figures: list[float] | str) -> str:
    if isinstance(figures, str):
        return figures.partition(":")[0]
    seen = spread(figures)
    return f"{seen['median']:.3g} ({seen['min']:.3g} to {seen['max']:.3g})" if seen else ""


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--scratch", type=Path, default=ROOT / "out")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        found = measured(Path(folder), given.rounds)
    card = machine_card(given.scratch, note=given.note)
    given.result.write_text(json.dumps(result(found, card), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
