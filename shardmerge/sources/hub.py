"""Hugging Face hub ids: found in the local cache, downloaded only when asked.

Layout of the cache (huggingface_hub ``file_download.py``): ``models--org--name/refs/<revision>`` holds a commit,
``snapshots/<commit>/`` its files as links into ``blobs/``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from shardmerge.errors import UnreadableError, UsageError
from shardmerge.sources.markers import read_marker
from shardmerge.storage.listing import files_below, without_links
from shardmerge.system_errors import advice
from shardmerge.tensors.file_roles import READ_SUFFIXES, shard_place, training_state

# Weights of kinds that are read, and what ``targets.beside`` takes along.
_WANTED = (
    "*.safetensors", "*.bin", "*.pth", "*.pt", "*.json", "*.jsonl", "*.yaml", "*.model", "*.spm", "*.tiktoken", "*.txt",
    "*.bpe", "*.jinja", "*.py", "*.npz", "LICENSE*", "NOTICE*", "USE_POLICY*", "README*",
)  # fmt: skip
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(text: str) -> bool:
    """Tells whether a text reads like ``org/name`` or ``org/name@revision``."""
    return bool(_HUB_ID.fullmatch(text)) and not text.startswith((".", "/", "~"))


def cache_folder() -> Path:
    """Returns the hub cache: ``HF_HUB_CACHE``, else ``HF_HOME/hub``, else ``~/.cache/huggingface/hub``."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", default)).expanduser() / "hub"


def find_in_cache(hub_id: str) -> Path | None:
    """Returns the snapshot directory of a hub id, or None if the cache does not have it."""
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        return None
    repo = cache_folder() / f"models--{match['repo'].replace('/', '--')}"
    revision = match["revision"] or "main"
    ref = repo / "refs" / revision
    commit = read_marker(ref) if ref.is_file() else revision
    snapshot = repo / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def resolve_hub_id(hub_id: str, *, download: bool) -> Path:
    """Returns the local directory of a hub id.

    Raises
    ------
    UsageError
        ``not-in-cache``: neither a path nor in the cache, and downloading was not asked for.
        ``no-huggingface-hub``: downloading was asked for without the package that does it.
        ``download-failed``: the hub refused or is out of reach.
    """
    found = find_in_cache(hub_id)
    if found is not None and (not download or _is_whole(found)):
        return found
    if not download:
        raise UsageError(
            "not-in-cache",
            f"{hub_id!r} is neither a path nor a model in the local Hugging Face cache",
            where=str(cache_folder()),
            hint="pass a path, or add --download to fetch it (needs `pip install shardmerge[transformers]`)",
        )
    return _download(hub_id)


def _is_whole(snapshot: Path) -> bool:
    """Tells whether the weights are here. ``AutoConfig`` and ``AutoTokenizer`` leave a snapshot of small files only."""
    names = {path.relative_to(snapshot).as_posix() for path in files_below(snapshot) if path.is_file()}
    counted = [place for name in names if (place := shard_place(name))]
    shards = all(
        f"{stem}-{number:05d}-of-{total:05d}{suffix}" in names
        for stem, _, total, suffix in counted
        for number in range(1, total + 1)
    )
    return shards and any(name.endswith(READ_SUFFIXES) and not training_state(name) for name in names)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # only when a download is asked for
    except ImportError as error:
        raise UsageError(
            "no-huggingface-hub",
            "downloading needs the huggingface_hub package",
            hint="pip install shardmerge[transformers]",
        ) from error
    repo, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=list(_WANTED), cache_dir=str(cache_folder())
            )
        )
    except Exception as error:  # the hub's errors are many and change between versions
        raise UsageError("download-failed", f"cannot download {hub_id!r}: {error}") from error


def locate(text: str | Path, *, download: bool = False) -> Path:
    """Returns the existing path that a text means: a file, a directory, or a hub id's snapshot."""
    path = Path(text).expanduser()
    if _is_there(path):
        return without_links(path) if path.is_dir() else without_links(path.parent) / path.name
    if is_hub_id(str(text)) and not path.parent.is_dir():
        return resolve_hub_id(str(text), download=download)
    import difflib

    near = difflib.get_close_matches(path.name, _siblings(path), n=1)
    raise UsageError(
        "missing-path",
        "no such file or directory",
        where=str(path),
        hint=f"did you mean `{path.parent / near[0]}`?" if near else "",
    )


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no file can have such a name
        return False
    except OSError as error:
        what = f"cannot look at it: {error.strerror}"
        raise UnreadableError("unreadable-file", what, where=str(path), hint=advice(error)) from error
    return True


def _siblings(path: Path) -> list[str]:
    return [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
