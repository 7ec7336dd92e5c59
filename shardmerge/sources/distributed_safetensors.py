"""Distributed safetensors: the shards of all ranks as one model, each tensor put together by its saved offsets.

Layout: see ``distributed_files`` and ``distributed_offsets``. A replicated tensor lies in the shard of one rank,
whichever had the least to write. DTensor writes a chunk without elements for a rank that has none, at the axis' end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import add
from pathlib import Path

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.sources.distributed_count import CutTensor, is_counted, lacking_files, narrow_norm
from shardmerge.sources.distributed_files import (
    BRING_ALL,
    KEEP_ONE,
    ShardFile,
    check_numbers,
    list_shards,
    missing_shards,
    mixed_shards,
)
from shardmerge.sources.distributed_offsets import saved_offsets
from shardmerge.sources.safetensors_file import SafetensorsHeader, read_header
from shardmerge.tensors import Box, Catalog, Extent, FileStamp, Shape, TensorEntry
from shardmerge.tensors.boxes import boxed

_MOST_NAMED = 5


@dataclass(slots=True)
class _Found:
    """What the shards hold of one tensor, as they are read: a few numbers a chunk, since there may be a million.

    Attributes
    ----------
    dtype, file
        As in the first shard that holds a part of it, and that shard.
    offsets, shapes
        Of each chunk.
    files, begins
        The number of the file that holds it, and where it begins there, in bytes.
    """

    dtype: DType
    file: ShardFile
    offsets: list[Shape] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    files: array[int] = field(default_factory=lambda: array("i"))
    begins: array[int] = field(default_factory=lambda: array("q"))


def read_shards(folder: Path) -> Catalog:
    """Returns the catalog of the shards in a directory.

    Raises
    ------
    CheckpointError
        ``missing-shard``, ``lone-shard``: not all are there, as far as numbers and shapes tell. ``mixed-shards``,
        ``box-overlap``: they are not of one save. ``box-hole``: a part of a tensor is in none. ``damaged-offsets``, and
        what ``read_header`` raises.
    """
    files = list_shards(folder)
    check_numbers(folder, files)
    found, stamps = _read_all(folder, files)
    entries, cuts = _assembled(folder, files, found)
    _check_count(folder, files, cuts)
    ranks = len({file.rank for file in files})
    doubt = "" if is_counted(cuts, ranks) else _uncounted(ranks)
    return Catalog(str(folder), f"distributed safetensors, {ranks} ranks", entries, files=stamps, doubt=doubt)


def _uncounted(ranks: int) -> str:
    return (
        f"the shards of {ranks} ranks are read, and nothing says how many there were: "
        "without the last ones tensors would be missing, or cut off at their ends"
    )


# ---- reading


def _read_all(folder: Path, files: Sequence[ShardFile]) -> tuple[dict[str, _Found], tuple[FileStamp, ...]]:
    found: dict[str, _Found] = {}
    stamps: list[FileStamp] = []
    problems: list[ShardmergeError] = []
    shared: dict[Shape, Shape] = {}
    for number, file in enumerate(files):
        try:
            header = read_header(file.path)
            problems += _add(found, number, file, header, shared)
            stamps.append(header.stamp)
        except CheckpointError as error:
            problems.append(error)
    raise_all(problems)
    return found, tuple(stamps)


def _add(
    found: dict[str, _Found], number: int, file: ShardFile, header: SafetensorsHeader, shared: dict[Shape, Shape]
) -> Iterator[CheckpointError]:
    """Adds the chunks of one file; ``shared`` has the shapes and offsets that many of them have in common."""
    path = str(file.path)
    offsets = saved_offsets(header.metadata, header.entries, path)
    if not offsets and header.entries:
        yield mixed_shards(path, "a file that is called a shard does not say which part of each tensor it holds", "")
        return
    for name, entry in header.entries.items():
        tensor = found.get(name)
        if tensor is None:
            tensor = found[name] = _Found(entry.dtype, file)
        problem = _differs(tensor, file, entry)
        if problem:
            yield mixed_shards(f"{path}, {name[:200]}", "two shards hold parts of two tensors under one name", problem)
            continue
        tensor.offsets.append(shared.setdefault(offsets[name], offsets[name]))
        tensor.shapes.append(shared.setdefault(entry.shape, entry.shape))
        tensor.files.append(number)
        tensor.begins.append(_begin(entry))


def _begin(entry: TensorEntry) -> int:
    held = entry.pieces[0].held if entry.pieces else None
    return held.offset if isinstance(held, Extent) else 0  # a chunk without elements lies nowhere


def _differs(tensor: _Found, file: ShardFile, entry: TensorEntry) -> str:
    """Returns in what a shard contradicts those before it."""
    if entry.dtype != tensor.dtype:
        return f"{entry.dtype}, and {tensor.dtype} in {tensor.file.path.name}"
    if tensor.shapes and len(entry.shape) != len(tensor.shapes[0]):
        return f"shape {list(entry.shape)}, and {list(tensor.shapes[0])} in {tensor.file.path.name}"
    if file.part != tensor.file.part:
        return f"in file {file.part} of {file.parts}, and in file {tensor.file.part} in {tensor.file.path.name}"
    return ""


# ---- putting together


def _assembled(
    folder: Path, files: Sequence[ShardFile], found: Mapping[str, _Found]
) -> tuple[dict[str, TensorEntry], dict[str, CutTensor]]:
    paths = [str(file.path) for file in files]
    entries: dict[str, TensorEntry] = {}
    cuts: dict[str, CutTensor] = {}
    misfits: dict[str, list[CheckpointError]] = {}
    for name, tensor in found.items():
        cuts[name] = cut = _cut(tensor, files)
        try:
            pieces = boxed(tensor.dtype, cut.shape, _boxes(tensor, paths), name)
        except CheckpointError as error:
            misfits.setdefault(error.code, []).append(error)
            continue
        entries[name] = TensorEntry(name, tensor.dtype, cut.shape, pieces, "shards of all ranks")
    raise_all(_summed_up(folder, errors) for errors in misfits.values())
    return entries, cuts


def _boxes(tensor: _Found, paths: Sequence[str]) -> Iterator[Box]:
    size = tensor.dtype.itemsize
    for at, shape, file, begin in zip(tensor.offsets, tensor.shapes, tensor.files, tensor.begins, strict=True):
        yield Box(at, shape, Extent(paths[file], begin, prod(shape) * size))


def _cut(tensor: _Found, files: Sequence[ShardFile]) -> CutTensor:
    """Returns a tensor as large as its chunks reach; those without elements count where there are no others."""
    every = sorted(range(len(tensor.shapes)), key=tensor.offsets.__getitem__)
    full = [i for i in every if prod(tensor.shapes[i])]
    ends = [map(add, tensor.offsets[i], tensor.shapes[i]) for i in full or every]
    shape = tuple(max(axis) for axis in zip(*ends, strict=True))
    chunks, ranks = [tensor.shapes[i] for i in full], [files[tensor.files[i]].rank for i in full]
    return CutTensor(shape, chunks, ranks, tensor.file.part)


def _summed_up(folder: Path, errors: Sequence[CheckpointError]) -> CheckpointError:
    """Returns one error for all tensors that are no tiling in one and the same way."""
    first = errors[0]
    names = ", ".join(error.where[:200] for error in errors[:_MOST_NAMED])
    missing = BRING_ALL if first.code == "box-hole" else ""
    return CheckpointError(
        first.code,
        f"the shards of {len(errors)} tensors do not fit: {first.what}",
        where=f"{folder}, {names}",
        found=first.found,
        expected=first.expected,
        hint=KEEP_ONE if first.code == "box-overlap" else missing,
    )


# ---- whether it is all


def _check_count(folder: Path, files: Sequence[ShardFile], cuts: dict[str, CutTensor]) -> None:
    lost = lacking_files(cuts, files)
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        what = f"{lost[0]}{more} {'are' if more else 'is'} not there: these ranks hold a part of each tensor elsewhere"
        raise missing_shards(folder, what, "")
    narrow = narrow_norm(cuts)
    if narrow:
        raise missing_shards(
            folder,
            "the shards of the last ranks are not there: every tensor is cut off at its end",
            f"{narrow.name} of {narrow.size}, beside an embedding of {narrow.hidden} columns",
            f"the shards of {narrow.ranks} ranks",
        )
