"""How tensors are laid out in files of weights, and the index. Every offset is fixed before any byte moves."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.plan.moments import NO_MOMENTS, Moments
from shardmerge.plan.phases import Arrangement, arrange, by_source
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.torch_layout import lay_out_torch
from shardmerge.plan.training_files import Files, dcp_files, torch_shard, zero_universal_files
from shardmerge.shown import shown
from shardmerge.targets.expectation import FileGroup, Format
from shardmerge.tensors import SideFile
from shardmerge.tensors.natural_order import natural_key

# What huggingface_hub and DeepSpeed use; decimal, as everywhere in the ecosystem.
DEFAULT_SHARD_SIZE = 5_000_000_000

# Data starts on a page, or at the offset in one that cloning asks for. The format wants a multiple of 8; a page costs
# at most 4 KB a shard, lets loaders map tensors aligned, and keeps two threads from writing the same page of the file.
_PAGE = 4096

# What readers of safetensors refuse. The format keeps one name for itself (safetensors 0.8, ``tensor.rs``), a lone
# surrogate is no UTF-8, and control characters and longer names are refused when shardmerge reads them.
_METADATA = "__metadata__"
_UNPRINTABLE = re.compile("[\x00-\x1f\ud800-\udfff]")
_LONGEST_NAME = 4096
# ``MAX_HEADER_SIZE`` of safetensors, in bytes.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class _Naming:
    """How the files of a group are called."""

    folder: str
    stem: str
    suffix: str
    numbered: str

    def path(self, name: str) -> str:
        """Returns a path inside the output directory."""
        return f"{self.folder}/{name}" if self.folder else name


def lay_out(
    tensors: Iterable[PlannedTensor],
    shard_size: int,
    groups: Sequence[FileGroup] = (FileGroup(),),
    form: Format = "safetensors",
    root: tuple[str, ...] = (),
    moments: Moments = NO_MOMENTS,
) -> tuple[tuple[PlannedShard, ...], tuple[SideFile, ...]]:
    """Returns the shards, and what goes with them: the index of a group that has several, the tables of a checkpoint.

    Tensors stand in natural key order; shards are filled greedily, no tensor is split, one that is too large is alone.
    What can be cloned from one source file stays together: it begins a new shard if it does not fit into the last.

    Parameters
    ----------
    tensors
        With any offset and stored name; both are set here.
    shard_size
        Most bytes of tensors in one shard.
    groups
        How tensors are spread; each belongs to the first whose prefix its name has.
    form
        Of the groups that leave it open.
    root
        For ``dcp``: the keys under which a state dict holds the model.
    moments
        For ``dcp`` and ``zero-universal``: what the optimizer remembers.
    """
    shards: list[PlannedShard] = []
    indexes: list[SideFile] = []
    ordered = sorted(tensors, key=lambda tensor: natural_key(tensor.name))
    for group, members in _grouped(ordered, groups):
        most = shard_size if group.sharded else None
        if form == "dcp" and not group.suffix:
            made, tables = dcp_files(members, partial(_cut_one, shard_size=most), group.folder, root, moments)
        elif form == "zero-universal" and not group.suffix:
            made, tables = zero_universal_files(members, group.folder, moments)
        else:
            made, tables = _loaded_files(_naming(group, form), members, most)
        shards += made
        indexes += tables
    return tuple(shards), tuple(indexes)


def _loaded_files(naming: _Naming, members: list[PlannedTensor], most: int | None) -> Files:
    """Returns the files of a model that is loaded as a whole, with the index of several."""
    parts = by_source(members) if naming.suffix == ".safetensors" else [members]
    cut = list(_cut(parts, most))
    made = [_shard(naming, name, part) for name, part in zip(_names(naming, len(cut)), cut, strict=True)]
    if len(made) == 1:
        return made, []
    return made, [SideFile(naming.path(f"{naming.stem}{naming.suffix}.index.json"), (index_json(made),))]


def index_json(shards: Sequence[PlannedShard]) -> bytes:
    """Returns ``model.safetensors.index.json`` as transformers writes it: sorted, indented, with the exact total."""
    weight_map = {tensor.stored: shard.name.rsplit("/", 1)[-1] for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _grouped(
    tensors: list[PlannedTensor], groups: Sequence[FileGroup]
) -> Iterator[tuple[FileGroup, list[PlannedTensor]]]:
    """Yields the groups that have tensors, the first group always if nothing else has any."""
    members: list[list[PlannedTensor]] = [[] for _ in groups]
    for tensor in tensors:
        index = next(i for i, group in enumerate(groups) if tensor.name.startswith(group.prefix))
        stored = tensor.name.removeprefix(groups[index].prefix)
        members[index].append(tensor if tensor.stored == stored else replace(tensor, stored=stored))
    for group, own in zip(groups, members, strict=True):
        if own or (not tensors and group is groups[0]):
            yield group, own


def _naming(group: FileGroup, form: Format) -> _Naming:
    suffix = group.suffix or (".bin" if form == "bin" else ".safetensors")
    stem = "pytorch_model" if group.stem == "model" and suffix == ".bin" else group.stem
    return _Naming(group.folder, stem, suffix, f"{stem}-{{:05d}}-of-{{:05d}}{suffix}")


def _names(naming: _Naming, count: int) -> list[str]:
    if count == 1:
        return [f"{naming.stem}{naming.suffix}"]
    return [naming.numbered.format(number, count) for number in range(1, count + 1)]


def _cut(parts: Sequence[list[PlannedTensor]], shard_size: int | None) -> Iterator[list[PlannedTensor]]:
    """A part that does not fit into what is left of a shard begins the next, as a tensor does."""
    group: list[PlannedTensor] = []
    filled = 0
    for part in parts:
        needed = sum(tensor.nbytes for tensor in part)
        for tensor in part:
            if group and shard_size is not None and filled + max(needed, tensor.nbytes) > shard_size:
                yield group
                group, filled = [], 0
            needed = 0
            group.append(tensor)
            filled += tensor.nbytes
    yield group


def _cut_one(part: Sequence[PlannedTensor], shard_size: int | None) -> Iterator[list[PlannedTensor]]:
    return _cut([list(part)], shard_size)


def _shard(naming: _Naming, name: str, tensors: list[PlannedTensor]) -> PlannedShard:
    path = naming.path(name)
    if naming.suffix == ".safetensors":
        return _safetensors(path, tensors)
    listed = [(tensor.stored, tensor.dtype, tensor.shape) for tensor in tensors]
    return torch_shard(path, tensors, lay_out_torch(listed, name.rsplit(".", 1)[0]))


def _safetensors(path: str, tensors: list[PlannedTensor]) -> PlannedShard:
    raise_all(_unusable_names(path, tensors))
    order = arrange(sorted(tensors, key=lambda tensor: natural_key(tensor.name)))
    header = _header(order)
    if len(header) > _LARGEST_HEADER:
        raise TargetError(
            "header-too-large",
            "a file of weights would list more tensors than safetensors reads",
            where=path,
            found=f"a header of {len(header):,} bytes",
            expected=f"at most {_LARGEST_HEADER:,} bytes",
            hint="make more files: a smaller --shard-size",
        )
    cursor = len(header)
    placed = []
    for tensor in order.tensors:
        placed.append(replace(tensor, offset=cursor))
        cursor += tensor.nbytes
    return PlannedShard(path, cursor, ((0, header),), tuple(placed))


def _unusable_names(path: str, tensors: Iterable[PlannedTensor]) -> Iterator[ShardmergeError]:
    for tensor in tensors:
        name = tensor.stored
        if name and name != _METADATA and len(name) <= _LONGEST_NAME and not _UNPRINTABLE.search(name):
            continue
        reserved = name == _METADATA
        yield TargetError(
            "unusable-name",
            "safetensors reserves this name" if reserved else "readers of safetensors reject this name",
            where=f"{tensor.rule}, in {path}",
            found=shown(name),
            expected="" if reserved else f"1 to {_LONGEST_NAME} characters, none of them a control character",
            hint="give the tensor another name in a mapping, or `drop` it",
        )


def _header(order: Arrangement) -> bytes:
    """Returns the header with the spaces behind it that bring the data to its phase."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    cursor = 0
    for tensor in order.tensors:
        end = cursor + tensor.nbytes
        fields[tensor.stored] = {
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "data_offsets": [cursor, end],
        }
        cursor = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    length = len(text) + (order.phase - 8 - len(text)) % _PAGE
    return struct.pack("<Q", length) + text.ljust(length)
