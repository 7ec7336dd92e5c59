"""The directory beside the output in which the parts of a plan gather, whoever makes them.

    OUT.partial-<plan id>/
        begun.json             which plan it is, of which files, by which version
        parts/00003.<who>.tmp  a part being written, under a name of its maker's
        parts/00003.0.claim    somebody of several is at work on it, or was (see ``publish.shares``)
        parts/00003.json       the receipt that commits it
        model/                 finished parts: what will be the output
        ready-<who>/           the same, once somebody is about to publish it
        old-<who>/             what the output path held before, where the system cannot exchange two directories

Nothing else is state: no lock, no owner. Whoever is killed leaves at most a file that nobody asks for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shardmerge.errors import OutputError, raise_all
from shardmerge.plan.identity import SCHEMA
from shardmerge.storage.writing import explained, sync_directory, write_small
from shardmerge.tensors import FileStamp
from shardmerge.version import __version__

# Of the plan's id, in the directory's name: 16 hex digits, which no two plans of one output path share by accident.
_DIGITS = 16
_MARK = ".partial-"
_BEGUN = "begun.json"


@dataclass(frozen=True)
class Staging:
    """Where a plan's parts gather.

    Attributes
    ----------
    root
        The directory.
    plan
        Id of the plan.
    sync
        Whether names are made durable.
    who
        A name that no other maker has. Forked processes share it, and tell themselves apart by their numbers; whoever
        gets a copy by pickle, maybe on another machine, has a name of his own.
    """

    root: Path
    plan: str
    sync: bool = True
    who: str = field(default_factory=lambda: os.urandom(6).hex(), init=False, compare=False)

    def __reduce__(self) -> tuple[type[Staging], tuple[Path, str, bool]]:
        """A copy is another maker."""
        return Staging, (self.root, self.plan, self.sync)

    @classmethod
    def of(cls, out: Path, plan: str, *, sync: bool = True) -> Staging:
        """Returns where the parts of a plan for an output path gather, whether there are any or not."""
        return cls(out.parent / f"{out.name}{_MARK}{plan[:_DIGITS]}", plan, sync)

    @property
    def parts(self) -> Path:
        """Receipts, and files being written."""
        return self.root / "parts"

    @property
    def model(self) -> Path:
        """Finished parts."""
        return self.root / "model"

    def temporary(self, name: str) -> Path:
        """Returns a path to write to before it gets its name."""
        return self.parts / f"{name}.{self.who}.{os.getpid()}.tmp"

    def begin(self, files: Sequence[FileStamp], out: Path) -> None:
        """Makes the directories, or takes up those that are there.

        Raises
        ------
        OutputError
            ``other-plan-staged``: parts of another plan gather for this output path. ``unwritable-output``.
        """
        raise_all(_others(self, files, out))
        with explained(self.root):
            for folder in (self.root, self.parts):
                folder.mkdir(parents=True, exist_ok=True)
            take_back(self)
            if not any(self.root.glob("ready-*")):
                self.model.mkdir(exist_ok=True)
        if not (self.root / _BEGUN).exists():
            self.place(self.root / _BEGUN, json.dumps(_about(self.plan, files)).encode())
            self.settle(self.root / _BEGUN)
            if self.sync:
                sync_directory(self.root.parent)

    def is_begun(self) -> bool:
        """Tells whether parts gather here: not before ``begin``, and not after somebody published the result."""
        return _begun(self.root) is not None

    def place(self, path: Path, data: bytes | list[bytes]) -> None:
        """Makes a small file appear whole under its name, in the place of one that is there; see ``settle``."""
        temporary = self.temporary(path.name)
        try:
            write_small(temporary, data, sync=self.sync)
            with explained(path):
                temporary.rename(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def settle(self, *paths: Path) -> None:
        """Makes the names of files durable, and those of the directories below the staging directory they are in."""
        inner = {folder for path in paths for folder in path.parents if self.root in folder.parents}
        folders = inner | {path.parent for path in paths}
        for folder in sorted(folders, reverse=True) if self.sync else ():
            sync_directory(folder)

    def tidy(self) -> None:
        """Removes what this process left half written, and its claims; called when it stops."""
        for path in (*self.parts.glob(f"*.{self.who}.*.tmp"), *self.claims()):
            with suppress(OSError):
                path.unlink()

    def claims(self) -> list[Path]:
        """Returns the claims of this process, and of those forked from it."""
        found = []
        for path in self.parts.glob("*.claim"):
            with suppress(OSError):
                found += [path] if path.read_text("ascii", "replace") == self.who else []
        return found

    def give_up(self) -> None:
        """Removes the directories if no part was made: there is nothing to go on with.

        What somebody else writes to, or has made, is in one of them, which then stays.
        """
        with suppress(OSError):
            if not any(self.root.glob("model/*")):
                for folder in (self.parts, self.model):
                    with suppress(FileNotFoundError):
                        folder.rmdir()
                (self.root / _BEGUN).unlink(missing_ok=True)
                self.root.rmdir()


def take_back(staging: Staging) -> None:
    """Makes what somebody was about to publish, and did not, the model again."""
    for ready in staging.root.glob("ready-*"):
        with suppress(OSError):  # he did, after all
            ready.rename(staging.model)


def stagings(out: Path) -> list[Path]:
    """Returns all directories in which parts gather for an output path."""
    if not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.glob(f"{_escaped(out.name)}{_MARK}*") if path.is_dir())


def remove(root: Path, out: Path, *, ignore_errors: bool = False) -> None:
    """Removes a staging directory. What the output path held before, if that is in it, goes back to its place first."""
    with explained(root):
        for old in root.glob("old-*"):
            if not out.exists():
                old.rename(out)
        for path in _inside_out(root):
            with suppress(OSError) if ignore_errors else nullcontext():
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()


def _inside_out(root: Path) -> Iterator[Path]:
    """Yields all that is in a directory, and last itself; ``begun.json``, which says what it is, after all directories.

    ``shutil`` does the same with three libraries of compression in 5 ms, of every run.
    """
    for folder, folders, files in os.walk(root, topdown=False):
        yield from (Path(folder, name) for name in (*folders, *files))
    yield root


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _about(plan: str, files: Sequence[FileStamp]) -> dict[str, object]:
    rows = [[stamp.path, *_seen(stamp)] for stamp in files]
    return {"schema": SCHEMA, "shardmerge": __version__, "plan": plan, "files": rows}


def _seen(stamp: FileStamp) -> list[object]:
    return [stamp.size, stamp.mtime_ns, stamp.header]


def _others(staging: Staging, files: Sequence[FileStamp], out: Path) -> Iterator[OutputError]:
    """Yields an error for every staging directory of the output path that is not of this plan and this version."""
    for root in stagings(out):
        begun = _begun(root)
        found = _difference(begun, files) if begun is not None else "nobody knows which: it was left unfinished"
        if begun is None and not any(root.glob("parts/*.json")):
            continue  # killed before it began: nothing in it counts
        if root != staging.root or begun is None or begun.get("shardmerge") != __version__:
            yield OutputError(
                "other-plan-staged",
                "parts of another plan have been made for this output path, and they do not mix",
                where=str(root),
                found=found,
                hint=f"begin anew with --fresh, or remove them: shardmerge clean {out}",
            )


def _begun(root: Path) -> Mapping[str, object] | None:
    try:
        value = json.loads((root / _BEGUN).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _difference(begun: Mapping[str, object], stamps: Sequence[FileStamp]) -> str:
    """Says what is not as it was when the parts were begun."""
    if begun.get("shardmerge") != __version__:
        return f"made by shardmerge {begun.get('shardmerge')}, this is {__version__}"
    files = begun.get("files")
    before = {row[0]: row[1:] for row in files} if isinstance(files, list) else {}
    now = {stamp.path: _seen(stamp) for stamp in stamps}
    changed = [path for path, seen in now.items() if path in before and before[path] != seen]
    if changed:
        return f"a source changed since: {changed[0]}"
    if set(before) != set(now):
        return f"other source files: {min(set(before) ^ set(now))}"
    return "the mapping, its options or a small file beside the weights are not the same"
