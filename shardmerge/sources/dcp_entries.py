"""The ways into a distributed checkpoint: its directory, the one above it, one of its files."""

from __future__ import annotations

import re
from pathlib import Path

from shardmerge.sources.choosing import Remarks, several, whole_set
from shardmerge.sources.deepspeed_files import MOMENTS
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.rank_files import METADATA, RANK_METADATA, is_distributed
from shardmerge.tensors import Catalog

# Directories of a distributed checkpoint that hold no model: Accelerate's optimizer_0, those of schedulers.
_NO_MODEL = re.compile(r"\.|optim|scheduler|dataloader|rng")
# NeMo 2 keeps the weights beside context/; OLMo-core beside train/; Accelerate and the Trainer number the models.
_INNER = ("weights", "model_and_optim", "model", "pytorch_model_fsdp_0")


def read_distributed_parent(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory that a trainer put the model's into: ``checkpoint-500`` of Accelerate, ``step100`` of OLMo-core."""
    inside = [item for item in sorted(path.iterdir()) if item.is_dir() and not _NO_MODEL.match(item.name)]
    found = [item for item in inside if is_distributed(item)]
    usual = [path / name for name in _INNER if path / name in found]
    if len(found) > 1 and not usual:
        raise several("several-checkpoints", f"{len(found)} distributed checkpoints are inside", path, found)
    if not found:
        return None
    chosen = (usual or found)[0]
    others = [f"{item.name}/" for item in found if item != chosen]
    said = (f"{chosen.name}/ is read, and not {', '.join(others[:8])}",) if others else ()
    return Remarks(warnings=said).on(read_distributed(chosen, options))


def read_distributed_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One file of a distributed checkpoint stands for the whole of it."""
    mine = path.suffix == ".distcp" or path.name == METADATA or path.match(RANK_METADATA) or path.name == "common.pt"
    if not mine or not is_distributed(path.parent):
        return None
    return whole_set(read_distributed(path.parent, options), path)


def read_distributed(folder: Path, options: OpenOptions) -> Catalog:
    """Returns the catalog of a directory of ``.distcp`` files and their ``.metadata``; see ``dcp.read_dcp``."""
    from shardmerge.sources.dcp import read_dcp
    from shardmerge.sources.dcp_moments import read_dcp_moments
    from shardmerge.sources.megatron_dist import is_megatron_dist, read_megatron_dist

    if options.view in MOMENTS:
        return read_dcp_moments(folder, options.root, options.view)
    read = read_megatron_dist if is_megatron_dist(folder) else read_dcp
    return read(folder, options.root)
