"""Commands that meet errors of the system: what is there before, what each is to make, what its calls can fail with."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN
from tests.killing import FAIL, KILL, SHORT, Call, Hung, Machine, Ran, Trap
from tests.scene import claim

_ANYWHERE = ("EIO", "ESTALE", "EACCES", "EINTR")
_OF_NAMES = ("ENAMETOOLONG",)
_OF_DESCRIPTORS = ("EMFILE",)
_OF_WRITING = ("ENOSPC", "EDQUOT", "EROFS")
# Also from some call on, for good.
_LASTING = ("EIO", "ENOSPC")
# Of network file systems, of filters of system calls, of a system without memory.
_MORE = ("EPERM", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "ENODEV", "ENXIO", "ENOMEM", "ENOLCK")
_MORE_OF_NAMES = ("ELOOP",)
_MORE_OF_DESCRIPTORS = ("ENFILE",)
_MORE_OF_WRITING = ("EFBIG",)
# No error: half of what was asked for.
CUT = "short count"
_COUNTING = ("read", "pread", "write", "pwrite")
# What a system, or a file system, says that has no such call.
_MISSING = {
    **dict.fromkeys(("sync_file_range", "exchange", "fadvise", "ioctl", "tmpfile"), ("ENOSYS", "EINVAL", "EOPNOTSUPP")),
    "populate": ("EINVAL", "EFAULT"),
}

_LOOKS = ("stat", "access", "readlink", "statvfs")
_OPENS = ("open", "open-read", "opendir", "tmpfile")
_NAMES = (*_LOOKS, *_OPENS, "mkdir", "rename", "exchange", "unlink", "rmdir", "link", "chmod", "utimens")
_WRITES = (
    "open", "tmpfile", "write", "pwrite", "ftruncate", "fsync", "sync_file_range", "rename", "exchange", "mkdir",
    "unlink", "rmdir", "link", "chmod", "utimens", "close",
)  # fmt: skip


def errors_of(call: str) -> tuple[str, ...]:
    """Returns the errors that a call can fail with, by their names."""
    found = _ANYWHERE
    for errors, calls in ((_OF_NAMES, _NAMES), (_OF_DESCRIPTORS, _OPENS), (_OF_WRITING, _WRITES)):
        found += errors if call in calls else ()
    return found


def rare_errors_of(call: str) -> tuple[str, ...]:
    """Returns the other ones."""
    found = (*_MORE, *_MISSING.get(call, ()))
    for errors, calls in (
        (_MORE_OF_NAMES, _NAMES), (_MORE_OF_DESCRIPTORS, _OPENS), (_MORE_OF_WRITING, _WRITES), ((CUT,), _COUNTING)
    ):  # fmt: skip
        found += errors if call in calls else ()
    return found


@dataclass(frozen=True)
class Fault:
    """An error at a call.

    Attributes
    ----------
    at
        Which call, from 1.
    call
        Its name.
    error
        The name of the error.
    lasting
        Whether every later call fails too.
    """

    at: int
    call: str
    error: str
    lasting: bool = False

    def trap(self, under: Path) -> Trap:
        if self.error == CUT:
            return Trap(SHORT, at=self.at, under=str(under))
        until = 1_000_000 if self.lasting else 0
        return Trap(FAIL, at=self.at, until=until, number=getattr(errno, self.error), under=str(under))


@dataclass(frozen=True)
class Way:
    """A command, and what comes before it.

    Attributes
    ----------
    sources
        Paths below the golden checkpoints; one alone is ``IN``, of several each is in it.
    command
        Its words. ``IN`` and ``OUT`` stand for paths, also within a word.
    before
        Commands that run undisturbed first.
    killed
        Whether they are killed when they have taken the model to publish it.
    rare
        Whether it meets the errors that are rare, instead of the usual ones.
    knobs
        See ``Machine.run``.
    settled
        Whether a run makes the same calls each time.
    """

    sources: Sequence[str]
    command: str
    before: Sequence[str] = ()
    killed: bool = False
    rare: bool = False
    knobs: Mapping[str, Any] = field(default_factory=dict)
    settled: bool = True


_ONE = "convert IN OUT --workers 1 --json"
_LLAVA = ("xtuner/single_frozen/iter_2.pth", "xtuner/base_llm", "xtuner/base_clip")
_MAPPING = """\
shardmerge: 1
sources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}
use: xtuner/llava-to-xtuner
output: {path: out, shard_size: 12KB}
"""
_RUN = "run IN/mapping.yaml --out OUT --workers 1"

FIXTURES = {
    "safetensors": ("xtuner/base_llm",),
    "ZeRO-3": ("zero/llama_z3_w2_bf16/ckpt",),
    "DCP": ("dcp/placements_2x2_fp32/ckpt",),
}
WAYS = {
    **{name: Way(sources, _ONE) for name, sources in FIXTURES.items()},
    **{f"{name}, rare errors": Way(sources, _ONE, rare=True) for name, sources in FIXTURES.items()},
    "--io mmap": Way(FIXTURES["safetensors"], f"{_ONE} --io mmap", knobs={"windows": True}),
    "--io mmap, rare errors": Way(FIXTURES["DCP"], f"{_ONE} --io mmap", rare=True, knobs={"windows": True}),
    "several processes": Way(
        _LLAVA, "run IN/mapping.yaml --out OUT --workers 2 --json", knobs={"processes": True}, settled=False
    ),
    "--part, the last": Way(_LLAVA, f"{_RUN} --part 1/2 --json", before=(f"{_RUN} --part 0/2",)),
    "finish": Way(_LLAVA, "finish IN/mapping.yaml --out OUT --json", before=(_RUN,), killed=True),
    "--overwrite": Way(_LLAVA, f"{_RUN} --overwrite --json", before=(f"{_RUN} --format bin",)),
    "resumed": Way(_LLAVA, f"{_RUN} --json", before=(f"{_RUN} --part 1/3",)),
    "verify": Way(FIXTURES["ZeRO-3"], "verify OUT --json", before=("convert IN OUT",)),
    "verify --sources": Way(_LLAVA, "verify OUT --sources IN/mapping.yaml --json", before=(_RUN,)),
    "inspect": Way(FIXTURES["ZeRO-3"], "inspect IN --json"),
}


class Wrong(AssertionError):
    """Something that may never be."""


class NotMet(Exception):
    """A run came to its end before the call."""


class Conversion:
    """A way, in a place of its own."""

    def __init__(self, root: Path, way: Way, runs: Machine) -> None:
        self.root, self.way, self._runs = root, way, runs
        self.place, self.source, self._made = root / "place", root / "in", root / "made"
        self._copy_sources()
        self._before = _looked_at(self.source)
        self._prepare()
        self._initial = self._found()
        ran = self._run(Trap(under=str(root)))
        assert ran.code == 0, ran.err
        self.calls: list[Call] = list(runs.calls)
        self.golden, self._answer = self._found(), self._steady(ran)
        self._begin()
        assert self._run().code == 0
        assert self._found() == self.golden

    @property
    def out(self) -> Path:
        return self.place / "out"

    def faults(self) -> Iterator[Fault]:
        """Yields every error at every call."""
        for at, call in enumerate(self.calls, 1):
            if call.name == "populated":  # the call before is the one that can fail
                continue
            for error in (rare_errors_of if self.way.rare else errors_of)(call.name):
                yield Fault(at, call.name, error)
                if error in _LASTING:
                    yield Fault(at, call.name, error, lasting=True)

    def outcome(self, fault: Fault) -> str:
        """Runs under a fault, then again; returns what became of it, or raises ``Wrong``."""
        self._begin()
        ran = self._run(fault.trap(self.root))
        if not self._runs.hit:
            if self.way.settled:
                raise Wrong("the fault was not met")
            raise NotMet
        code = self._judged(ran)
        if ran.code:
            again = self._run()
            if again.code or self._found() != self.golden:
                raise Wrong(f"the same command does not go on: exit {again.code}: {again.err}")
        beside = [path.name for path in self.place.iterdir() if path != self.out]
        if beside:
            raise Wrong(f"left behind: {beside}")
        return f"exit {ran.code} {code}".rstrip()

    def _judged(self, ran: Ran) -> str:
        if ran.stacks:
            raise Wrong(f"took {ran.seconds:.0f} s: {ran.stacks}")
        if _looked_at(self.source) != self._before:
            raise Wrong("a source was touched")
        if "Traceback" in ran.err or ran.code not in (0, 1, 4, 6):
            raise Wrong(f"exit {ran.code}: {ran.err}")
        there = self._found()
        if there != (self.golden if ran.code in (0, 6) else self._initial):
            raise Wrong(f"exit {ran.code}, and at the output path: {sorted(there or ())}: {ran.err}")
        if not ran.code:
            if self._steady(ran) != self._answer:
                raise Wrong(f"another answer: {ran.out}")
            return ""
        error = ran.json()["errors"][0]
        for part in ("where", "hint", "what"):
            if not error[part]:
                raise Wrong(f"the error has no {part}: {ran.err}")
        return str(error["code"])

    def _steady(self, ran: Ran) -> str:
        """Returns the answer of a command that only reads; that of another one tells times, and who made what."""
        return ran.out if self.way.command.split()[0] in ("inspect", "verify") else ""

    def _found(self) -> dict[str, bytes] | None:
        return _files(self.out) if self.out.exists() else None

    def _copy_sources(self) -> None:
        for name in self.way.sources:
            into = self.source if len(self.way.sources) == 1 else self.source / Path(name).name
            into.parent.mkdir(exist_ok=True)
            (shutil.copytree if (GOLDEN / name).is_dir() else shutil.copy)(GOLDEN / name, into)
        if len(self.way.sources) > 1:
            (self.source / "mapping.yaml").write_text(_MAPPING)

    def _prepare(self) -> None:
        """Makes what is there before the command, and keeps it."""
        self.place.mkdir()
        for command in self.way.before:
            trap = None
            if self.way.killed:
                assert self._command(command).code == 0
                trap = Trap(KILL, at=claim(self._runs.calls) + 1)
                shutil.rmtree(self.place)
                self.place.mkdir()
            ran = self._command(command, trap)
            assert ran.code == (-9 if trap else 0), ran.err
        self.place.rename(self._made)
        self._begin()

    def _begin(self) -> None:
        if self.place.exists():
            shutil.rmtree(self.place)
        shutil.copytree(self._made, self.place, symlinks=True)

    def _run(self, trap: Trap | None = None) -> Ran:
        return self._command(self.way.command, trap, **self.way.knobs)

    def _command(self, command: str, trap: Trap | None = None, **knobs: Any) -> Ran:
        words = [word.replace("IN", str(self.source)).replace("OUT", str(self.out)) for word in command.split()]
        try:
            return self._runs.run(*words, trap=trap, **knobs)
        except Hung as error:
            raise Wrong(f"does not end: {error}") from error


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _looked_at(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode
    return found
