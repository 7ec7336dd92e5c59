"""Links in a checkpoint that lead out of it: followed, they would publish files that are nobody's weights.

One form leads outside by its nature: the hub cache keeps the files of ``snapshots/<commit>/`` as links into ``blobs/``
of the same repository, and ``local_dir`` of huggingface_hub before 0.23 linked into the blobs of the user's own cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.hub import cache_folder
from shardmerge.storage.listing import matching
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

# Small files that hold no weights and go nowhere, and say which weights are read or what becomes of them.
_STEERING = ("latest", "latest_universal", "latest_checkpointed_iteration.txt", "last_checkpoint", ADAPTER_CONFIG)


def steering_links(folder: Path) -> list[Path]:
    """Returns the links of a checkpoint's directory whose text decides what is read: indexes, markers."""
    names = (*matching(folder, "*.index.json"), *(folder / name for name in _STEERING))
    return [path for path in names if path.is_symlink()]


def outside(path: Path, folder: Path) -> str:
    """Returns where a file of a checkpoint really is, if that is outside of the checkpoint's directory, else ``""``.

    Parameters
    ----------
    path
        A file under ``folder``.
    folder
        The directory that the user named, resolved.
    """
    real = os.path.realpath(path)
    if real.startswith(str(folder).rstrip("/") + "/") or _is_blob(Path(real), folder):
        return ""
    return real


def odd_links(paths: Iterable[Path], folder: Path) -> Iterator[CheckpointError]:
    """Yields an error for every file that is a link out of its checkpoint."""
    for path in paths:
        real = outside(path, folder)
        if real:
            from shlex import quote  # for an error alone

            yield CheckpointError(
                "link-outside",
                "a file of the checkpoint is a link to a place outside its directory, which is not read",
                where=str(path),
                found=f"-> {real}"[:400],
                expected=f"a file in {folder}, or a link of the hub cache into its own blobs",
                hint=f"if you made the link, put the file there itself: {_instead(real, path)} {quote(real)} "
                f"{quote(str(path))}; otherwise remove the link",
            )


def _instead(real: str, link: Path) -> str:
    """Returns what puts a file in the place of a link to it: a hard link takes no space, but for one file system."""
    try:
        near = Path(real).is_file() and Path(real).stat().st_dev == link.lstat().st_dev
    except OSError:
        near = False
    return "ln -f" if near else "cp -r --remove-destination"


def _is_blob(real: Path, folder: Path) -> bool:
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots":
            return real.parent == place.parent.parent / "blobs" or _of_own_cache(real)
    return _of_own_cache(real)


def _of_own_cache(real: Path) -> bool:
    cache = os.path.realpath(cache_folder())
    return real.parent.name == "blobs" and str(real.parent.parent.parent) == cache
