"""Makes one result again and again, each time in another way: ``python -m tests.same_bytes --runs 50``.

Ways differ in workers, processes, memory, how files are read, who makes which part in which order, kills in between,
the directory, and the environment. All files of all results are compared by SHA-256, the receipt included.
``tests/soak/same-bytes.json`` is written after every run; what it holds already is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic import write_safetensors
from tests.conftest import GOLDEN

RESULTS = Path(__file__).parent / "soak" / "same-bytes.json"
FORMATS = ("safetensors", "bin", "dcp")

# Large enough for several tiles; with a product, a sum, moves and casts.
_SHAPES = {
    "embed.weight": (3000, 256), "layers.0.q.weight": (1024, 768), "layers.1.q.weight": (1024, 768),
    "layers.0.k.weight": (512, 768), "layers.1.k.weight": (512, 768), "norm.bias": (768,),
}  # fmt: skip
_LORA = {"q.A": (8, 768), "q.B": (1024, 8)}
_MAPPING = """\
shardmerge: 1
sources: {m: model.safetensors, a: lora.safetensors, llm: base_llm}
output: {path: out, dtype: bfloat16, shard_size: 1MB}
tensors:
  lora.weight: {op: lora, a: "a:q.A", b: "a:q.B", of: "m:layers.0.q.weight", scale: 0.3}
  sum.weight: {op: linear, of: ["m:layers.0.k.weight", "m:layers.1.k.weight"], weights: [0.3, 0.7]}
  turned.weight: {op: transpose, of: "m:layers.1.q.weight"}
  joined.weight: {op: concat, of: ["m:layers.1.k.weight", "m:layers.0.k.weight"], dim: 0}
  embed.weight: m:embed.weight
  norm.bias: m:norm.bias
  llm.{rest...}: llm:{rest...}
"""

# Forks for a result of any size: a small one is not worth it otherwise.
_FORKING = (
    "from shardmerge.plan import schedule; schedule._WORTH_PROCESSES = 1; from shardmerge.cli.main import main; main()"
)


@dataclass(frozen=True)
class Way:
    """How a result is made.

    Attributes
    ----------
    form
        Of the weights.
    options
        Of the command.
    forking
        Whether processes are forked, if several workers are asked for.
    parts
        Shares, in the order in which their processes are started; none for one process that does it all.
    together
        Whether these processes run at a time.
    kills
        How often a process is killed before one comes to its end.
    elsewhere
        Whether the sources are a copy in another directory.
    environment, umask
        Of the processes.
    """

    form: str
    options: tuple[str, ...]
    forking: bool
    parts: tuple[str, ...]
    together: bool
    kills: int
    elsewhere: bool
    environment: Mapping[str, str]
    umask: int

    @classmethod
    def drawn(cls, form: str, seed: int) -> Way:
        rng = random.Random(f"{form} {seed}")
        count = rng.choice([0, 0, 2, 3, 5])
        parts = [f"{n}/{count}" for n in range(count)]
        rng.shuffle(parts)
        options = (
            "--workers", str(rng.randint(1, 8)), "--io", rng.choice(["pread", "mmap"]),
            "--max-memory", rng.choice(["96MiB", "128MiB", "256MiB", "1GiB"]), *rng.choice([(), ("--no-sync",)]),
        )  # fmt: skip
        environment = {
            "LC_ALL": rng.choice(["C", "C.UTF-8", "de_DE.UTF-8", "tr_TR.UTF-8"]),
            "PYTHONHASHSEED": str(rng.randrange(1000)),
            "TZ": rng.choice(["UTC", "Asia/Kathmandu", "America/St_Johns"]),
            "OPENBLAS_NUM_THREADS": rng.choice(["1", "2", "4"]),
            "TERM": rng.choice(["dumb", "xterm-256color"]),
        }
        return cls(
            form, options, rng.random() < 0.5, tuple(parts), rng.random() < 0.5, rng.choice([0, 0, 1, 2]),
            rng.random() < 0.5, environment, rng.choice([0o022, 0o077, 0o002]),
        )  # fmt: skip

    def seen(self) -> list[str]:
        """Returns what is counted of it."""
        named = {
            "several workers": self.options[1] != "1",
            "mmap": "mmap" in self.options,
            "processes": self.forking and self.options[1] != "1",
            "--part": bool(self.parts),
            "parts at a time": bool(self.parts) and self.together,
            "killed and resumed": self.kills > 0,
            "another directory": self.elsewhere,
        }
        return [name for name, holds in named.items() if holds]


class Scene:
    """Sources in two directories, and where results go."""

    def __init__(self, root: Path) -> None:
        self.root = root
        here = root / "here"
        here.mkdir()
        write_safetensors(here / "model.safetensors", _SHAPES, "F32", fill=True)
        write_safetensors(here / "lora.safetensors", _LORA, "F32", fill=True, seed=1)
        shutil.copytree(GOLDEN / "xtuner" / "base_llm", here / "base_llm")
        (here / "mapping.yaml").write_text(_MAPPING)
        shutil.copytree(here, root / "another place" / "sources")  # with their times
        self._seconds = 1.0

    def made(self, way: Way, seed: int) -> dict[str, str]:
        """Makes a result in a way, and returns the SHA-256 of its files by their names."""
        rng = random.Random(seed)
        sources = self.root / ("another place/sources" if way.elsewhere else "here")
        out = self.root / f"results {way.elsewhere}" / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        command = ["run", str(sources / "mapping.yaml"), "--out", str(out), "--format", way.form, *way.options, "-q"]
        for _ in range(way.kills):
            self._killed(command, way, rng.random())
        if not out.exists():
            self._ended(command, way)
        elif way.kills:  # maybe between publishing and tidying up
            assert self._start(command, way).wait() == 0
        found = {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        assert [path.name for path in out.parent.iterdir()] == ["out"], "something is left over"
        return found

    def _killed(self, command: Sequence[str], way: Way, when: float) -> None:
        process = self._start(command, way)
        with suppress(subprocess.TimeoutExpired):
            process.wait(when * self._seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _ended(self, command: Sequence[str], way: Way) -> None:
        started = time.monotonic()
        runs: list[list[str]] = [[*command, "--part", part] for part in way.parts] or [[*command]]
        if way.together:
            processes = [self._start(run, way) for run in runs]
            codes = [process.wait() for process in processes]
        else:
            codes = [self._start(run, way).wait() for run in runs]
        assert not any(codes), codes
        self._seconds = (time.monotonic() - started) / (1 if way.together else len(runs))

    def _start(self, command: Sequence[str], way: Way) -> subprocess.Popen[bytes]:
        python = [sys.executable, "-c", _FORKING] if way.forking else [sys.executable, "-m", "shardmerge"]
        environment = {**os.environ, **way.environment}
        return subprocess.Popen([*python, *command], env=environment, umask=way.umask, start_new_session=True)


def compared(scene: Scene, form: str, seeds: Sequence[int], tell: Callable[[int, Way, list[str]], None]) -> None:
    """Makes a result in the ways of some seeds; tells of each which files differ from those of the plainest."""
    first = scene.made(Way(form, ("--workers", "1"), False, (), False, 0, False, {}, 0o022), 0)
    for seed in seeds:
        way = Way.drawn(form, seed)
        found = scene.made(way, seed)
        tell(seed, way, [name for name in sorted({*first, *found}) if first.get(name) != found.get(name)])


def main() -> None:
    """Makes all, and writes which files differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--again", action="store_true", help="begin anew, and do not go on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    value = _begun(given.out, again=given.again)
    base = Path(tempfile.mkdtemp(prefix="shardmerge-same-", dir="/dev/shm"))
    try:
        scene = Scene(base)
        for form in FORMATS:
            row = value["formats"].setdefault(form, {"runs": 0, "ways": {}, "different": []})

            def tell(seed: int, way: Way, different: list[str], row: dict[str, Any] = row) -> None:
                row["runs"] += 1
                row["ways"] = dict(Counter(row["ways"]) + Counter(way.seen()))
                row["different"] += [f"{way}: {', '.join(different)}"] if different else []
                given.out.write_text(json.dumps(value, indent=1) + "\n")

            compared(scene, form, range(row["runs"], given.runs), tell)
    finally:
        shutil.rmtree(base)
    raise SystemExit(any(row["different"] for row in value["formats"].values()))


def _begun(path: Path, *, again: bool) -> dict[str, Any]:
    if path.exists() and not again:
        return dict(json.loads(path.read_text()))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "kernel": os.uname().release, "formats": {}}


if __name__ == "__main__":
    main()
