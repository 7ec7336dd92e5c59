"""Says before anything is written why a path cannot be the output."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardmerge.errors import OutputError, ResourceError, ShardmergeError, raise_all
from shardmerge.packed_names import container
from shardmerge.storage.listing import without_links
from shardmerge.storage.writing import free_bytes
from shardmerge.system_errors import advice
from shardmerge.tensors import FileStamp
from shardmerge.tensors.file_roles import RECEIPT

# Beyond the sum of the files: directories, receipts, and block rounding (4 KiB a file at most).
_SPARE_BYTES = 16 << 20


def check_output(files: Sequence[FileStamp], out: Path, needed: int, *, overwrite: bool) -> None:
    """Says why ``out`` cannot be the output; all reasons at once.

    Parameters
    ----------
    files
        What is read.
    out
        Where the result is to be.
    needed
        Bytes that will be written and need space.
    overwrite
        Whether a directory that shardmerge made may be replaced.

    Raises
    ------
    OutputError
        ``output-exists``: a file, or a directory that is not empty. ``output-is-source``: a source lies in it, or is
        it. ``output-is-mount``: a mount point, which no directory can be renamed to. ``not-ours``: with ``overwrite``,
        a directory that shardmerge did not make. ``unwritable-output``: the parent does not let us create it.
    ResourceError
        ``disk-too-small``: fewer bytes free than the plan writes and does not clone.
    """
    raise_all(_objections(files, out, needed, overwrite=overwrite))


def _lets_write(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _not_let(folder: Path) -> OutputError:
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    what = "the file system is mounted read-only" if read_only else "no permission to write here"
    hint = advice(OSError(errno.EROFS if read_only else errno.EACCES, what))
    return OutputError("unwritable-output", what, where=str(folder), hint=hint)


def check_place(files: Sequence[FileStamp], out: Path, *, overwrite: bool) -> None:
    """Says why ``out`` cannot be the output right now; a result is renamed to it next.

    Raises
    ------
    OutputError
        ``output-exists``, ``output-is-source``, ``output-is-mount``, ``not-ours``: as ``check_output``.
    """
    taken = _taken(files, out, overwrite=overwrite)
    if taken is not None:
        raise taken


def _objections(files: Sequence[FileStamp], out: Path, needed: int, *, overwrite: bool) -> Iterator[ShardmergeError]:
    taken = _taken(files, out, overwrite=overwrite)
    if taken is not None:
        yield taken
    parent = _nearest_parent(out)
    if not (_lets_write(parent) or _lets_write(parent)):  # an error that passes looks like a refusal
        yield _not_let(parent)
    free = free_bytes(out)
    if needed + _SPARE_BYTES > free:
        yield ResourceError(
            "disk-too-small",
            "the disk does not have room for the result; nothing was written",
            where=str(parent),
            found=f"{free:,} bytes free",
            expected=f"{needed + _SPARE_BYTES:,} bytes",
            hint="free some space, choose another output path, or a smaller --dtype",
        )


def _taken(files: Sequence[FileStamp], out: Path, *, overwrite: bool) -> OutputError | None:
    """Returns why what is there cannot make room."""
    place = without_links(out)
    sources = (without_links(Path(container(stamp.path))) for stamp in files)
    clash = next((path for path in sources if place in path.parents or path == place), None)
    if clash is not None:
        return OutputError(
            "output-is-source",
            "the output path contains a source of this conversion",
            where=str(out),
            found=str(clash),
            hint="write to a new directory; sources are never touched",
        )
    if out.is_mount():
        return OutputError(
            "output-is-mount",
            "the output path is a mount point, and the result is renamed to its place",
            where=str(out),
            hint=f"write to a directory inside: {out}/model",
        )
    if is_free(out):
        return None
    if overwrite:
        return None if (out / RECEIPT).is_file() and not out.is_symlink() else _not_ours(out)
    return OutputError(
        "output-exists",
        "the output path exists and is not an empty directory",
        where=str(out),
        hint="choose another path, or remove it first"
        + ("; --overwrite replaces it" if (out / RECEIPT).is_file() else ""),
    )


def is_free(out: Path) -> bool:
    """Tells whether nothing is at a path, or a directory with nothing in it."""
    return not out.is_symlink() and (not out.exists() or (out.is_dir() and not any(out.iterdir())))


def _not_ours(out: Path) -> OutputError:
    return OutputError(
        "not-ours",
        "shardmerge did not make what is at the output path, so it does not remove it",
        where=str(out),
        found=f"no {RECEIPT} in it",
        hint="choose another path, or remove it first",
    )


def _nearest_parent(path: Path) -> Path:
    parent = without_links(path).parent
    while not parent.exists():
        parent = parent.parent
    return parent
