"""One process of the fuzzer: libFuzzer mutates what has reached new code, and every input goes to one reader.

An error that the reader does not document is kept, one file for each place it comes from, and the fuzzing goes on.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType

import atheris

# A second of the processor for an input of a few KB: instrumented, what takes 0.25 s takes 1.3 s (a config of 2,106
# layers). What an input may add to the memory of the process, in KB.
MOST_SECONDS, MOST_MEMORY = 5.0, 128 << 10
# How often the counts are written down.
_EVERY = 5_000


def main() -> None:
    """Runs a target: its name, a directory to work in, and arguments of libFuzzer."""
    name, folder, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=["shardmerge"]):
        from tests.fuzz.targets import TARGETS
    one = _Run(TARGETS[name], Path(folder))
    warnings.simplefilter("always")
    warnings.showwarning = one.warned
    atheris.Setup([sys.argv[0], *arguments], one.run)
    atheris.Fuzz()


class _Run:
    def __init__(self, target: object, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.count = 0
        self.memory = _memory()
        self.findings: dict[str, str] = {}
        self.data = b""

    def run(self, data: bytes) -> None:
        """Gives one input to the reader."""
        self.count += 1
        self.data = data
        started = time.thread_time()
        try:
            if data:
                self.target.read(data)
        except self.target.allowed:
            pass
        except Exception as error:  # noqa: BLE001  # this is what is looked for
            self._keep(data, f"{type(error).__name__} at {_place(error.__traceback__)}")
        taken = time.thread_time() - started
        if taken > MOST_SECONDS:
            self._keep(data, f"{taken:.1f} s", "slow")
        memory = _memory()
        if memory - self.memory > MOST_MEMORY:
            self._keep(data, f"{memory - self.memory} KB", "large")
        self.memory = memory
        if self.count % _EVERY == 0:
            self.write()

    def warned(self, message: Warning, *_: object) -> None:
        """Notes what would be printed in the middle of a user's output."""
        self._keep(self.data, f"{type(message).__name__}: {message}", type(message).__name__)

    def write(self) -> None:
        counts = {"executions": self.count, "findings": self.findings, "mebibytes": self.memory >> 10}
        (self.folder / "counts.json").write_text(json.dumps(counts))

    def _keep(self, data: bytes, what: str, kind: str = "") -> None:
        key = kind or what
        if key in self.findings:
            return
        self.findings[key] = what
        name = hashlib.sha256(data).hexdigest()[:12]
        (self.folder / "found" / name).write_bytes(data)
        (self.folder / "found" / f"{name}.txt").write_text(f"{what}\n{traceback.format_exc()}")
        self.write()


def _memory() -> int:
    """Returns the most memory that the process ever had, in KB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _place(trace: TracebackType | None) -> str:
    """Returns the innermost line of shardmerge."""
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "/shardmerge/" in frame.filename and "/tests/" not in frame.filename
    ]
    return f"{frames[-1].filename.rpartition('/shardmerge/')[2]}:{frames[-1].name}" if frames else "?"


if __name__ == "__main__":
    main()
