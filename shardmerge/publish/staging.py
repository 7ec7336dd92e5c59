"""Makes a result appear whole or not at all: stage in a sibling directory, sync, one rename."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardmerge.errors import OutputError, ResourceError, ShardmergeError, raise_all
from shardmerge.plan.value import Plan
from shardmerge.storage.writing import explained, free_bytes, sync_directory

# Beyond the sum of the files: directories, the receipt, and block rounding (4 KiB a file at most).
_SPARE_BYTES = 16 << 20
_OWNER = ".owner.json"

# What rename(2) answers where the new name is taken by something that is not an empty directory.
_OCCUPIED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})


def check_output(plan: Plan, out: Path, cloned: int = 0) -> None:
    """Says before anything is written why ``out`` cannot be the output; all reasons at once.

    Parameters
    ----------
    plan, out
        What is to be written, and where.
    cloned
        Bytes of it that need no space.

    Raises
    ------
    OutputError
        ``output-exists``: a file, or a directory that is not empty. ``output-is-source``: a source lies in it, or is
        it. ``unwritable-output``: the parent does not let us create it.
    ResourceError
        ``disk-too-small``: fewer bytes free than the plan writes and does not clone.
    """
    raise_all(_objections(plan, out, cloned))


def _objections(plan: Plan, out: Path, cloned: int) -> Iterator[ShardmergeError]:
    resolved = out.resolve()
    clash = next((path for path in _source_paths(plan) if _inside(path, resolved) or path == resolved), None)
    if clash is not None:
        yield OutputError(
            "output-is-source",
            "the output path holds a source of this very conversion",
            where=str(out),
            found=str(clash),
            hint="write to a new directory; sources are never touched",
        )
    elif out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        yield OutputError(
            "output-exists",
            "the output path exists and is not an empty directory",
            where=str(out),
            hint="choose another path, or remove it first",
        )
    parent = _nearest_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        yield OutputError("unwritable-output", "no permission to write here", where=str(parent))
    needed = plan.file_bytes - cloned + _SPARE_BYTES
    free = free_bytes(out)
    if needed > free:
        yield ResourceError(
            "disk-too-small",
            "the disk does not have room for the result; nothing was written",
            where=str(parent),
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            hint="free some space, choose another output path, or a smaller --dtype",
        )


def _source_paths(plan: Plan) -> Iterator[Path]:
    for source in plan.sources:
        for stamp in source.files:
            yield Path(stamp.path).resolve()


def _inside(path: Path, folder: Path) -> bool:
    return folder in path.parents


def _nearest_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def staged(plan: Plan, out: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields an empty directory beside ``out``; renames it to ``out`` if the body succeeds, else removes it.

    Parameters
    ----------
    plan
        Its id names the directory, so that two different runs never share one.
    out
        The final path.
    sync
        Whether names are made durable; data is the business of whoever writes it.

    Raises
    ------
    OutputError
        ``output-busy``: another live process stages the same plan. ``output-exists``: ``out`` appeared meanwhile.
    """
    staging = out.parent / f"{out.name}.partial-{plan.id[:16]}"
    with explained(staging):
        out.parent.mkdir(parents=True, exist_ok=True)
        _claim(staging)
    try:
        yield staging
        with explained(staging):
            (staging / _OWNER).unlink()
        if sync:
            sync_directory(staging)
        _rename(staging, out)
        if sync:
            _sync_name(out, staging)
    except BaseException:
        _remove(staging, ignore_errors=True)
        raise


def _claim(staging: Path) -> None:
    """Creates the staging directory; one that a dead process left behind, for this very plan, is removed first."""
    try:
        staging.mkdir()
    except FileExistsError:
        if _owner_lives(staging):
            raise OutputError(
                "output-busy",
                "another process is writing the same result right now",
                where=str(staging),
                hint="wait for it; if it is gone for sure, remove the directory",
            ) from None
        _remove(staging)
        staging.mkdir()
    owner = {"host": os.uname().nodename, "pid": os.getpid()}
    (staging / _OWNER).write_text(json.dumps(owner), "utf-8")


def _remove(staging: Path, *, ignore_errors: bool = False) -> None:
    import shutil  # with all compressors; a run that succeeds needs none

    shutil.rmtree(staging, ignore_errors=ignore_errors)


def _owner_lives(staging: Path) -> bool:
    """Tells whether the process that made the directory may still be at work; on another host it may."""
    try:
        owner = json.loads((staging / _OWNER).read_text("utf-8"))
        host, pid = str(owner["host"]), int(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return host != os.uname().nodename or Path(f"/proc/{pid}").exists()


def _rename(staging: Path, out: Path) -> None:
    """The commit. Renaming onto an empty directory works, onto one with content fails (POSIX rename)."""
    with explained(out):
        try:
            staging.rename(out)
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            raise OutputError(
                "output-exists",
                f"cannot publish: {error.strerror}",
                where=str(out),
                hint="choose another path, or remove it first",
            ) from error


def _sync_name(out: Path, staging: Path) -> None:
    """Makes the published name durable, or takes it back: a run that fails leaves the output path as it was."""
    try:
        sync_directory(out.parent)
    except ShardmergeError:
        with suppress(OSError):
            out.rename(staging)
        raise
