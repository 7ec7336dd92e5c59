"""The ways into distributed safetensors: their directory, the one above ``sharded/``, one of the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardmerge.sources.choosing import Remarks, checkpoints_inside, weight_files, whole_set
from shardmerge.sources.distributed_files import SHARDED, ShardFile, list_shards, shard_file
from shardmerge.sources.open_options import OpenOptions
from shardmerge.tensors import Catalog

_LISTED = 8


def read_shard_folder(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory of shards, or one with nothing else than ``sharded/``, where nobody has consolidated them."""
    del options
    files = list_shards(path)
    if files:
        return _beside(path, files).on(_read(path))
    inner = path / SHARDED
    if not inner.is_dir() or weight_files(path) or not list_shards(inner):
        return None
    return Remarks((f"the shards in {SHARDED}/ are read",)).on(_read(inner))


def read_rank_shard(path: Path, options: OpenOptions) -> Catalog | None:
    """One shard stands for all of them."""
    if options.root or shard_file(path) is None:
        return None
    return whole_set(_read(path.parent), path)


def _beside(folder: Path, files: Sequence[ShardFile]) -> Remarks:
    """Says what else lies here; a consolidated model in a directory of its own has its config with it."""
    mine = {file.path.name for file in files}
    others = [path.name for path in weight_files(folder) if path.name not in mine]
    inside = [f"{path.name}/" for path in checkpoints_inside(folder)]
    notes = (f"the shards are read, and not what lies in {', '.join(inside[:_LISTED])}",) if inside else ()
    warnings = (f"the shards are read, and not {', '.join(others[:_LISTED])}",) if others else ()
    return Remarks(notes, warnings)


def _read(folder: Path) -> Catalog:
    from shardmerge.sources.distributed_safetensors import read_shards

    return read_shards(folder)
