"""What a checkpoint holds. Apart from the rest of the public door, since it needs no arrays, plans or mappings."""

from __future__ import annotations

from pathlib import Path

from shardmerge.prepare.shard_counts import settled
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.opening import open_catalog
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Extent


def layout_of(catalog: Catalog) -> str:
    """Returns what a checkpoint is, by its names, shapes and config.json, for people; ``""`` where nothing is known."""
    from shardmerge.prepare.beside_config import read_config
    from shardmerge.recognition.recognised import recognise

    return recognise(catalog, read_config(catalog, _content)).title


def _content(extent: Extent) -> bytes:
    with SourceFile(Path(extent.file)) as file:
        return file.read(extent.offset, extent.nbytes)


def inspect(source: str | Path, *, view: DeepSpeedView = "fp32", root: str = "", download: bool = False) -> Catalog:
    """Returns what a checkpoint holds, from its headers alone.

    Parameters
    ----------
    source
        A file, a directory, or a hub id in the local cache (``org/name`` or ``org/name@revision``).
    view
        Of a DeepSpeed checkpoint: ``fp32`` master weights, or the 16-bit ``module``.
    root
        Dotted path of the state dict inside a torch file; empty to find it.
    download
        Whether a hub id may be downloaded.

    Raises
    ------
    UsageError, CheckpointError
        Nothing there, or nothing that can be read.
    """
    return settled(open_catalog(source, OpenOptions(view=view, root=root, download=download)))
