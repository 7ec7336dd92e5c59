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
                hint="if you made the link, put the file there itself: cp --remove-destination "
                f"{quote(real)} {quote(str(path))}; otherwise remove the link",
            )


def _is_blob(real: Path, folder: Path) -> bool:
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots":
            return real.parent == place.parent.parent / "blobs" or _of_own_cache(real)
    return _of_own_cache(real)


def _of_own_cache(real: Path) -> bool:
    cache = os.path.realpath(cache_folder())
    return real.parent.name == "blobs" and str(real.parent.parent.parent) == cache
