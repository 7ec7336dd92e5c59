"""The directory beside the output in which the parts of a plan gather, whoever makes them.

    OUT.partial-<plan id>/
        begun.json             which plan it is, of which files, by which version
        parts/00003.<who>.tmp  a part being written, under a name of its maker's
        parts/00003.0.claim    somebody of several is at work on it, or was (see ``publish.shares``)
        parts/00003.json       the receipt that commits it
        model/                 finished parts: what will be the output
        ready-<who>/           the same, while somebody publishes it; what the output path held, once they are exchanged
        old-<who>/             what the output path held before, where the system cannot exchange two directories
    OUT.partial-gone<who>/     one of these being removed: nobody finds anything in it any more

Nothing else is state: no lock, no owner. Whoever is killed leaves at most a file that nobody asks for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shardmerge.errors import OutputError, raise_all
from shardmerge.plan.identity import SCHEMA
from shardmerge.publish.left_over import LeftOver, check_unused
from shardmerge.storage.exchanging import OCCUPIED
from shardmerge.storage.listing import files_below, matching
from shardmerge.storage.writing import explained, sync_above, sync_directory, write_small
from shardmerge.system_errors import read_small
from shardmerge.tensors import FileStamp
from shardmerge.version import __version__

# Of the plan's id, in the directory's name: 16 hex digits, which no two plans of one output path share by accident.
_DIGITS = 16
_MARK = ".partial-"
# No hex digits, so no plan's; a name of it is as long as that of a plan.
_GONE = "gone"
_BEGUN = "begun.json"

# How often removing is tried, and how long apart in seconds: a call that another process was in when the directory got
# its last name may still put a file into it.
_TRIES, _APART = 5, 0.1


def new_name() -> str:
    """Returns a name that nobody else has, in this process or any other: 12 hex digits."""
    return os.urandom(6).hex()


def inode(path: Path) -> tuple[int, int] | None:
    """Returns what tells a file or directory from another under the same name; None where there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


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
        A name of its own. Forked processes share it, and tell themselves apart by their numbers; whoever gets a copy by
        pickle, maybe on another machine, has a name of his own.
    """

    root: Path
    plan: str
    sync: bool = True
    who: str = field(default_factory=new_name, init=False, compare=False)

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

    @property
    def ready(self) -> Path:
        """Finished parts, while this one is about to publish them."""
        return self.root / f"ready-{self.who}"

    @property
    def old(self) -> Path:
        """What the output path held, while this one puts something else there."""
        return self.root / f"old-{self.who}"

    def claimed(self) -> list[Path]:
        """Returns where finished parts are, or were, while somebody publishes them."""
        return matching(self.root, "ready-*")

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
            self.take_back()
            if not self.claimed():
                self.model.mkdir(exist_ok=True)
        if _begun(self.root) is None:
            self.place(self.root / _BEGUN, json.dumps(_about(self.plan, files)).encode())
        if self.sync:
            sync_directory(self.root)
            sync_above(self.root)

    def is_begun(self) -> bool:
        """Tells whether parts gather here: not before ``begin``, and not after somebody published the result."""
        return _begun(self.root) is not None

    def take_back(self) -> None:
        """Makes what somebody was about to publish the model again: he may be gone. If he is not, he begins anew.

        Raises
        ------
        OutputError
            ``unwritable-output``: the system refuses. Whoever waited for him would wait for ever.
        """
        for ready in self.claimed():
            with explained(ready), suppress(FileNotFoundError):  # he was faster
                try:
                    ready.rename(self.model)
                except OSError as error:
                    if error.errno not in OCCUPIED:
                        raise
                    self._join(ready)

    def _join(self, ready: Path) -> None:
        """Puts finished parts to the model that somebody made anew meanwhile, and filled.

        Under a name of its own, so that their owner does not publish what is left of them. A part that is lost on the
        way, since somebody takes the model just now, is made again.
        """
        taken = self.root / f"taken-{new_name()}"
        ready.rename(taken)
        with suppress(FileNotFoundError):
            for path in [*files_below(taken)]:
                place = self.model / path.relative_to(taken)
                for folder in reversed(place.relative_to(self.model).parents[:-1]):
                    (self.model / folder).mkdir(exist_ok=True)
                path.rename(place)

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
        folders = {folder for path in paths for folder in path.parents if self.root in folder.parents}
        for folder in sorted(folders, reverse=True) if self.sync else ():
            sync_directory(folder)

    def tidy(self) -> None:
        """Removes what this one, and processes forked from it, left half written, and its claims; when it stops."""
        for path in (*self.named(f"*.{self.who}.*.tmp"), *self.claims()):
            with suppress(OSError):
                path.unlink()

    def claims(self) -> list[Path]:
        """Returns the claims of this process, and of those forked from it."""
        found = []
        for path in self.named("*.claim"):
            with suppress(OSError):
                found += [path] if path.read_text("ascii", "replace") == self.who else []
        return found

    def named(self, *patterns: str) -> list[Path]:
        """Returns the files beside the parts whose names match any pattern; none where all of it is gone."""
        return [path for pattern in patterns for path in matching(self.parts, pattern)]

    def give_up(self) -> None:
        """Removes the directories if no part was made: there is nothing to go on with.

        What somebody else writes to, or has made, is in one of them, which then stays.
        """
        with suppress(OSError):
            if not matching(self.model, "*"):
                for folder in (self.parts, self.model):
                    with suppress(FileNotFoundError):
                        folder.rmdir()
                (self.root / _BEGUN).unlink(missing_ok=True)
                self.root.rmdir()


def stagings(out: Path) -> list[Path]:
    """Returns all directories in which parts gather for an output path, and those of which not all is removed yet."""
    return [path for path in matching(out.parent, f"{_escaped(out.name)}{_MARK}*") if path.is_dir()]


def left_over(out: Path, plan: str) -> tuple[LeftOver, ...]:
    """Returns what runs of other plans left beside an output path, and nobody removed.

    Nothing where the system does not let it look: it is asked after a result was published.
    """
    own = Staging.of(out, plan).root
    with suppress(OSError):
        return tuple(LeftOver.of(root) for root in stagings(out) if root != own and not is_gone(root))
    return ()


def clean(out: Path) -> tuple[Path, ...]:
    """Removes all directories in which parts gather for an output path; returns them.

    Raises
    ------
    OutputError
        ``staging-in-use``: nothing was removed. As ``remove``.
    """
    found = stagings(out)
    for root in found:
        check_unused(root)
    for root in found:
        remove(root, out)
    return tuple(found)


def is_gone(root: Path) -> bool:
    """Tells whether a directory is one that somebody was removing."""
    return root.name.rpartition(_MARK)[2].startswith(_GONE)


def remove(root: Path, out: Path) -> None:
    """Removes a staging directory. What the output path held before, if that is in it, goes back to its place.

    First it gets another name: whoever still works on it, or is about to publish it, then finds nothing, at once. (A
    directory that loses file after file while somebody renames it would be published in part.)

    Raises
    ------
    OutputError
        ``unwritable-output``.
    """
    gone = root if is_gone(root) else root.with_name(f"{out.name}{_MARK}{_GONE}{new_name()}")
    with explained(root):
        try:
            if gone != root:
                root.rename(gone)
            for old in matching(gone, "old-*"):
                _put_back(old, out)
        except FileNotFoundError:  # somebody else removes it
            return
    with explained(gone):
        _delete(gone)


def _put_back(old: Path, out: Path) -> None:
    """Unless something came there; an empty directory is nothing."""
    try:
        old.rename(out)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise


def _delete(folder: Path) -> None:
    for last in (*(False,) * _TRIES, True):
        for path in _inside_out(folder):
            with nullcontext() if last else suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink()
        if not folder.exists():
            return
        time.sleep(_APART)


def _inside_out(root: Path) -> Iterator[Path]:
    """Yields all that is in a directory, and last itself.

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
        if is_gone(root):
            continue
        begun = _begun(root)
        found = _difference(begun, files) if begun is not None else "an unknown plan: it was left unfinished"
        if begun is None and (root == staging.root or not matching(root / "parts", "*.json")):
            continue  # killed before it began, or the file is lost: each receipt says by itself of which plan it is
        if root != staging.root or begun is None or begun.get("shardmerge") != __version__:
            from shlex import quote  # for an error alone

            yield OutputError(
                "other-plan-staged",
                f"the output path has unfinished parts of another plan, {LeftOver.of(root)}",
                where=str(root),
                found=found,
                hint=f"start again with --fresh, or remove them: shardmerge clean {quote(str(out))}",
            )


def _begun(root: Path) -> Mapping[str, object] | None:
    try:
        value = json.loads(read_small(root / _BEGUN))
    except (FileNotFoundError, NotADirectoryError, ValueError):
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
