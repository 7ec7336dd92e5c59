"""One file of weights, whatever its format. What reads a format is imported where it was recognised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.sources.choosing import whole_set
from shardmerge.sources.hf_folder import read_indexed
from shardmerge.sources.model_files import read_set_of
from shardmerge.sources.not_read import unknown_format
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.peft_folder import is_adapter_file
from shardmerge.sources.safetensors_file import is_safetensors, read_safetensors
from shardmerge.tensors import PEFT_ADAPTER, Catalog


def read_weights(path: Path, options: OpenOptions) -> Catalog:
    """Returns the catalog of a file that must be weights, a shard as a rule; ``unknown-format`` if it is none."""
    if is_safetensors(path):
        return read_safetensors(path)
    catalog = read_torch(path, options)
    if catalog is None:
        raise unknown_format(path)
    return catalog


def read_any_safetensors(path: Path, options: OpenOptions) -> Catalog | None:
    """A safetensors file under any name."""
    del options
    return read_safetensors(path) if is_safetensors(path) else None


def read_torch(path: Path, options: OpenOptions) -> Catalog | None:
    """A file of ``torch.save`` under any name."""
    from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
    from shardmerge.sources.torch_file import is_torch_file

    return read_torch_checkpoint(path, root=options.root) if is_torch_file(path) else None


def read_index(path: Path, options: OpenOptions) -> Catalog | None:
    """The index of a sharded model stands for its shards."""
    if not path.name.endswith(".index.json"):
        return None
    return read_indexed(path, lambda shard: read_weights(shard, options))


def read_shard_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One shard stands for the whole model, as the file of a rank does."""
    catalog = None if options.root else read_set_of(path, lambda shard: read_weights(shard, options))
    return whole_set(catalog, path) if catalog else None


def read_adapter_file(path: Path, options: OpenOptions) -> Catalog | None:
    """The weights of a PEFT directory, their config beside them."""
    if options.root or not is_adapter_file(path):
        return None
    return replace(read_weights(path, options), kind=PEFT_ADAPTER)
