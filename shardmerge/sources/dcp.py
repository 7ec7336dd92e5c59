"""Checkpoints of ``torch.distributed.checkpoint``: FSDP, torchtitan, Lightning, Accelerate, OLMo-core, torchtune.

``.metadata`` says which boxes tile a tensor, and which item of which file holds each; it alone says which files count
(a smaller world that saved into the directory of a larger one leaves files behind). Without collectives each rank has a
``__R.metadata`` of its own chunks. No file of data is opened by pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from math import prod
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.dcp_items import ItemFiles
from shardmerge.sources.dcp_metadata import DcpMetadata, read_metadata
from shardmerge.sources.dcp_roots import choose_root, is_state
from shardmerge.sources.dcp_table import ChunkedTensor
from shardmerge.sources.rank_files import METADATA, RANK_METADATA
from shardmerge.sources.rank_sets import ranks_in_words
from shardmerge.storage.listing import matching
from shardmerge.tensors import Box, Catalog, TensorEntry
from shardmerge.tensors.boxes import boxed

# Names that torch's writer gives: the rank, and the number of a file of it.
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")


def read_dcp(folder: Path, root: str = "") -> Catalog:
    """Returns the catalog of one directory.

    Parameters
    ----------
    folder
        With ``.metadata``, or ``__R.metadata``, and ``.distcp`` files.
    root
        Dotted path of the state dict in what was saved; empty to find it.

    Raises
    ------
    CheckpointError
        ``missing-metadata``: there is none. ``mixed-ranks``: metadata of several ranks that contradict each other.
        ``box-hole``, ``box-overlap``, ``box-outside``, ``box-cuts``: chunks that do not tile their tensor. And what
        ``read_metadata``, ``choose_root`` and ``ItemFiles.box`` raise.
    """
    read = [read_metadata(path, lambda name: not is_state(name)) for path in metadata_files(folder)]
    tensors = same_tensors(folder, read)
    chosen = choose_root(folder, read, list(tensors), root)
    origin = f"{chosen.title} of {folder.name}"
    entries = {}
    with closing(ItemFiles(folder)) as items:
        for short, name in chosen.names.items():
            entries[short] = chunked_entry(short, name, tensors[name], read, items, origin)
        stamps = tuple(chain((one.stamp for one in read), items.stamps()))
    return Catalog(str(folder), _kind(read), entries, files=stamps, notes=chosen.notes, warnings=chosen.warnings)


def metadata_files(folder: Path) -> list[Path]:
    """Returns ``.metadata``, or those of the ranks; raises ``missing-metadata`` where there are none."""
    if (folder / METADATA).is_file():
        return [folder / METADATA]
    found = matching(folder, RANK_METADATA)
    if found:
        return found
    raise CheckpointError(
        "missing-metadata",
        "a distributed checkpoint without its .metadata, which alone says what is in the .distcp files",
        where=str(folder),
        found=", ".join(sorted(path.name for path in folder.iterdir())[:8]),
        expected=".metadata, a hidden file, which is written last",
        hint="copy it too (cp -a, not cp dir/*); where there is none the save did not end: take an earlier checkpoint",
    )


def chunked_entry(
    short: str, name: str, tensor: ChunkedTensor, read: Iterable[DcpMetadata], items: ItemFiles, origin: str
) -> TensorEntry:
    """Returns a tensor under another name, as the boxes that hold its elements; raises as ``read_dcp``."""
    dtype, shape = tensor.dtype, tensor.shape
    return TensorEntry(short, dtype, shape, boxed(dtype, shape, _boxes(name, read, items), short), origin)


def same_tensors(folder: Path, read: Sequence[DcpMetadata]) -> dict[str, ChunkedTensor]:
    """Returns the tensors of all ranks by flat name; raises ``mixed-ranks``."""
    found: dict[str, ChunkedTensor] = {}
    for one in read:
        for name, tensor in one.table.tensors.items():
            first = found.setdefault(name, tensor)
            if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    "mixed-ranks",
                    "two ranks describe one tensor differently",
                    where=f"{folder}, {name[:200]}",
                    found=f"{first.dtype.name} {list(first.shape)} and {tensor.dtype.name} {list(tensor.shape)}",
                    hint="metadata of two saves are mixed: copy the directory again",
                )
    return found


def _boxes(name: str, read: Iterable[DcpMetadata], items: ItemFiles) -> Iterator[Box]:
    """Yields the boxes that hold elements; torch writes empty ones behind the end where there are too many ranks."""
    for one in read:
        if name in one.table.tensors:
            dtype = one.table.tensors[name].dtype
            yield from (items.box(name, dtype, chunk) for chunk in one.table.chunks(name) if prod(chunk.sizes))


def _kind(read: Sequence[DcpMetadata]) -> str:
    ranks = {match[1] for one in read for file in one.table.files() if (match := _RANK_FILE.fullmatch(file))}
    return f"torch distributed checkpoint, {ranks_in_words(len(ranks))}" if ranks else "torch distributed checkpoint"
