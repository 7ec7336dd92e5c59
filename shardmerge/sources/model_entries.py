"""The ways into a model's directory: an adapter, the usual names, a config alone, checkpoints further inside."""

from __future__ import annotations

from pathlib import Path

from shardmerge.sources.choosing import Remarks, checkpoints_inside, nothing_here, several
from shardmerge.sources.hf_folder import ReadShard
from shardmerge.sources.model_files import read_single, read_usual
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.peft_folder import read_adapter
from shardmerge.sources.weights_file import read_weights
from shardmerge.tensors import Catalog


def read_adapter_folder(path: Path, options: OpenOptions) -> Catalog | None:
    """A PEFT directory; of checkpoints further inside it is said that they are not read."""
    catalog = read_adapter(path, lambda weights: read_weights(weights, options))
    inside = [f"{item.name}/" for item in checkpoints_inside(path)]
    if catalog is None or not inside:
        return catalog
    said = f"the adapter of this directory is read, and not those in {', '.join(inside[:8])}"
    return Remarks((said,)).on(catalog)


def read_usual_model(path: Path, options: OpenOptions) -> Catalog | None:
    """A model under one of the names that ``from_pretrained`` looks for."""
    return read_usual(path, lambda shard: read_weights(shard, options))


def read_single_model(path: Path, options: OpenOptions, read_file: ReadShard) -> Catalog | None:
    """One file of weights, one index, or a whole set of shards without one, under any name."""
    return read_single(path, lambda shard: read_weights(shard, options), read_file)


def refuse_inside(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory of checkpoints is none itself: no convention says which of them is meant."""
    del options
    inside = checkpoints_inside(path)
    if not inside or (path / "config.json").is_file():
        return None
    what = (
        "no weights here, but in " + ("a directory" if len(inside) == 1 else f"{len(inside)} directories") + " inside"
    )
    raise several("several-checkpoints", what, path, inside)


def read_config_only(path: Path, options: OpenOptions) -> Catalog | None:
    """A base model of which nothing but config and tokenizer is needed, since the checkpoint has all of its tensors."""
    del options
    if not (path / "config.json").is_file():
        return None
    elsewhere = tuple(str(item) for item in checkpoints_inside(path))
    return Catalog(str(path), "config without weights", {}, notes=tuple(nothing_here(path)), elsewhere=elsewhere)
