"""Files of a finished directory that its receipt does not list: some of them would change what is loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from shardmerge.errors import ShardmergeError, VerificationError
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, FOREIGN_WEIGHTS, READ_SUFFIXES, RECEIPT

# What loaders pick up by its name: transformers takes safetensors before .bin, follows an index, loads the adapter of a
# directory with its model, and imports modules beside a config; torch reads .metadata.
_LOADED = {
    "weights": tuple(f"*{suffix}" for suffix in (*READ_SUFFIXES, *FOREIGN_WEIGHTS, ".pkl", ".metadata")),
    "code": ("*.py",),
    "an index of shards": ("*.index.json", "*.index.*.json"),
    "the config of an adapter": (ADAPTER_CONFIG,),
}


def unlisted_files(folder: Path, listed: Collection[str]) -> list[str]:
    """Returns what lies in a directory and is neither listed nor the receipt, sorted.

    Hidden directories and links to directories are not entered: they are named with a ``/`` at their end.
    """
    return sorted(name for name in _files(folder) if name not in listed and name != RECEIPT)


def _files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        place = Path(root).relative_to(folder)
        closed = {name for name in folders if name.startswith(".") or Path(root, name).is_symlink()}
        folders[:] = [name for name in folders if name not in closed]
        yield from ((place / name).as_posix() for name in files)
        yield from (f"{(place / name).as_posix()}/" for name in closed)


def unlisted_problems(folder: Path, unlisted: Collection[str]) -> Iterator[ShardmergeError]:
    """Yields an error for each unlisted file that a loader may pick up."""
    for name in unlisted:
        kind = _loaded_as(name)
        if kind:
            what = f"the receipt does not list this file, and its name is that of {kind}: a loader may use it"
            yield VerificationError("unlisted-file", what, where=str(folder / name))


def _loaded_as(path: str) -> str:
    name = path.rpartition("/")[2]
    return next((kind for kind, patterns in _LOADED.items() if any(fnmatchcase(name, one) for one in patterns)), "")
