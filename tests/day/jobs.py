"""The conversions of the day: what each is given, as the command line and as Python take it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROGRAM = (sys.executable, "-m", "shardmerge")


@dataclass(frozen=True)
class Job:
    """A conversion.

    Attributes
    ----------
    name, size
        ``small`` (a golden checkpoint), ``medium`` (hundreds of MB, real values) or ``8B`` (its widths, mostly holes).
    given
        A mapping, or a checkpoint.
    use, bases
        A preset and its other sources, of a checkpoint.
    dtype, shard_size, form
        Options.
    other
        Another shard size: the result that replaces the first, or is replaced by it.
    heavy
        Whether there is room for one such result alone.
    """

    name: str
    size: str
    given: str
    use: str = ""
    bases: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    shard_size: str = ""
    form: str = "safetensors"
    other: str = ""
    heavy: bool = False

    @property
    def is_mapping(self) -> bool:
        return self.given.endswith(".yaml")

    def options(self, *, other: bool = False) -> dict[str, str]:
        size = self.other if other else self.shard_size
        found = {"dtype": self.dtype, "shard_size": size, "format": self.form}
        return {name: value for name, value in found.items() if value}

    def command(self, out: Path, *more: object, other: bool = False) -> list[str]:
        """Returns the command line that makes it."""
        options = [
            text for name, value in self.options(other=other).items() for text in ("--" + name.replace("_", "-"), value)
        ]
        last = [*options, "--json", *map(str, more)]
        if self.is_mapping:
            return [*PROGRAM, "run", self.given, "--out", str(out), *last]
        bases = [text for name, path in self.bases.items() for text in ("--base", f"{name}={path}")]
        preset = ["--use", self.use] if self.use else []
        return [*PROGRAM, "convert", self.given, str(out), *preset, *bases, *last]

    def call(self, out: Path) -> dict[str, object]:
        """Returns the same for the process that uses the Python API."""
        verb = "run" if self.is_mapping else "convert"
        return {**asdict(self), "do": verb, "out": str(out), "options": self.options()}


def write_jobs(jobs: list[Job], path: Path) -> None:
    path.write_text(json.dumps([asdict(job) for job in jobs], indent=1))


def read_jobs(path: Path) -> list[Job]:
    return [Job(**one) for one in json.loads(path.read_text())]
