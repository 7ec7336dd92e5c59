"""The ways into a set of ranks, Megatron's, Meta's or FSDP's: its directory, the one above it, one of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.sources.choosing import Remarks, beside_numbered, several, whole_set
from shardmerge.sources.dcp_entries import read_distributed
from shardmerge.sources.hf_folder import side_files
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
from shardmerge.sources.rank_pickle_files import RankPickles, model_first, rank_pickles, set_of
from shardmerge.sources.verl_entries import newest_step, step_model, with_lora
from shardmerge.storage.listing import matching
from shardmerge.tensors import Catalog


def read_iteration(path: Path, options: OpenOptions) -> Catalog | None:
    """One iteration, the parent with its tracker file, or the folder of one rank, which stands for its iteration."""
    if is_megatron_folder(path):
        return _read_megatron(path, options)
    if is_rank_folder(path):
        return whole_set(_read_megatron(path.parent, options), path)
    newest = newest_iteration(path)
    iterations = [item for item in matching(path, "iter_*") if item.is_dir() and is_megatron_folder(item)]
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


def read_verl_run(path: Path, options: OpenOptions) -> Catalog | None:
    """The directory of all steps of verl, or of one."""
    newest = newest_step(path)
    step, remarks = newest or (path, Remarks())
    found = step_model(step)
    if found is not None:
        return remarks.on(found[1].on(_read_whole(found[0], options)))
    return remarks.on(_read_whole(step, options)) if newest and rank_pickles(step) else None


def read_rank_pickles(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory of one pickle a rank."""
    return _read_whole(path, options) if rank_pickles(path) else None


def read_rank_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One rank's file stands for the whole set."""
    if (found := set_of(path)) is not None:
        return whole_set(_read_set(found, options), path)
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


def _read_whole(folder: Path, options: OpenOptions) -> Catalog:
    """Returns the catalog of the rank files in a directory; of several sets the one that is meant, or an error."""
    sets = rank_pickles(folder)
    meant = model_first(sets, folder)
    if len(meant) > 1:
        firsts = [next(iter(one.files.values())) for one in meant]
        raise several("several-files", f"the directory holds {len(meant)} sets of rank files", folder, firsts)
    catalog = _read_set(meant[0], options)
    rest = [one.name(next(iter(one.files))) for one in sets if one is not meant[0]]
    said = f"{meant[0].name(0)} and so on are read, and not {', '.join(rest[:8])}"
    return Remarks(notes=(said,)).on(catalog) if rest else catalog


def _read_set(found: RankPickles, options: OpenOptions) -> Catalog:
    """Reads a set; config and tokenizer lie in verl's ``huggingface/``, or beside."""
    from shardmerge.sources.rank_pickles import read_rank_pickles as read_set

    catalog = read_set(found, root=options.root)
    beside = found.folder / "huggingface"  # where it is a link, it is not known where to
    sides = side_files(beside if beside.is_dir() and not beside.is_symlink() else found.folder)
    return with_lora(replace(catalog, side_files=sides), found.folder)
