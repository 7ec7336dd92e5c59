"""The ways into a set of ranks, Megatron's or Meta's: its directory, the one above it, one of its files."""

from __future__ import annotations

from pathlib import Path

from shardmerge.sources.choosing import beside_numbered, several, whole_set
from shardmerge.sources.dcp_entries import read_distributed
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.rank_files import (
    TRACKER,
    is_distributed,
    is_megatron_folder,
    is_meta_file,
    is_rank_file,
    is_rank_folder,
    newest_iteration,
)
from shardmerge.tensors import Catalog


def read_iteration(path: Path, options: OpenOptions) -> Catalog | None:
    """One iteration, the parent with its tracker file, or the folder of one rank, which stands for its iteration."""
    if is_megatron_folder(path):
        return _read_megatron(path, options)
    if is_rank_folder(path):
        return whole_set(_read_megatron(path.parent, options), path)
    newest = newest_iteration(path)
    iterations = [item for item in sorted(path.glob("iter_*")) if item.is_dir() and is_megatron_folder(item)]
    if newest is None and len(iterations) > 1:
        raise several("several-tags", f"the directory holds several iterations and no {TRACKER}", path, iterations)
    if newest is None:
        return None
    others = [item.name for item in iterations if item != newest]
    return beside_numbered(newest.name, others, TRACKER).on(_read_megatron(newest, options))


def read_meta_folder(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory of ``consolidated.NN.pth``."""
    del options
    from shardmerge.sources.rank_sets import read_meta

    return read_meta(path)


def read_rank_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One rank of Meta's or Megatron's stands for the whole set."""
    if options.root:
        return None
    if is_rank_file(path):
        return whole_set(_read_megatron(path.parent.parent, options), path)
    if is_meta_file(path):
        catalog = read_meta_folder(path.parent, options)
        return whole_set(catalog, path) if catalog else None
    return None


def _read_megatron(folder: Path, options: OpenOptions) -> Catalog:
    if is_distributed(folder):
        return read_distributed(folder, options)
    from shardmerge.sources.megatron import read_megatron

    return read_megatron(folder)
