"""What names and shapes in distributed safetensors say of the number of ranks, which stands nowhere.

Without the shards of the last ranks every tensor is smaller, and complete: torch.chunk cuts an axis of ``n`` in chunks
of ``ceil(n / ranks)``, shorter or empty ones last, so that any number of equal chunks is a tensor, too. Where there are
replicas (HSDP) or stages, the last ranks hold tensors of their own, and without them names are missing. What tells:

- A norm of the hidden size beside an embedding, whose columns FSDP does not cut.
- Layers that are not alike.
- A tensor that is cut over some ranks, one of which lacks the file of another tensor, cut over fewer of them.

Nothing here tells of the last ranks of tensor parallelism alone, which keeps norms whole: a config.json does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.sources.distributed_files import ShardFile, shard_name
from shardmerge.tensors import Shape

_EMBEDDING = re.compile(r"(?P<prefix>(?:.*\.)?)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight")
_NORM = re.compile(r".*(?:norm|ln_\w+)\.weight")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Towers have sizes of their own.
_TOWER = re.compile(r"vis|image|audio|speech", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CutTensor:
    """A tensor and the chunks that it is cut into.

    Attributes
    ----------
    shape
        Of the whole, as far as the chunks reach.
    chunks
        Shapes of those with elements, in ascending order of their offsets.
    ranks
        Which rank's shard holds each of them, from 1.
    part
        The number of the file, of those of each rank, that holds them.
    """

    shape: Shape
    chunks: Sequence[Shape]
    ranks: Sequence[int]
    part: int


CutTensors: TypeAlias = Mapping[str, CutTensor]


@dataclass(frozen=True, slots=True)
class NarrowNorm:
    """A norm that is smaller than the embedding is wide, as the first chunks of a larger one are.

    Attributes
    ----------
    name
        Of the tensor.
    size, hidden
        Its elements, and the columns of the embedding.
    ranks
        How many such chunks the hidden size takes.
    """

    name: str
    size: int
    hidden: int
    ranks: int


def narrow_norm(tensors: CutTensors) -> NarrowNorm | None:
    """Returns the widest norm of a model where the shards of some ranks must be missing, or None."""
    hidden, norms = _hidden(tensors)
    if not norms:
        return None
    name, tensor = max(norms, key=lambda one: one[1].shape[0])
    size, chunk = tensor.shape[0], tensor.chunks[0][0]
    ranks = -(-hidden // chunk)
    equal = all(shape[0] == chunk for shape in tensor.chunks)
    if size < hidden and equal and -(-hidden // ranks) == chunk:
        return NarrowNorm(name, size, hidden, ranks)
    return None


def is_counted(tensors: CutTensors, ranks: int) -> bool:
    """Tells whether the model looks whole: the norm behind its layers is, up to the last rank, and they are alike."""
    hidden, norms = _hidden(tensors)
    return _are_alike(tensors) and any(
        tensor.shape[0] == hidden and len(tensor.chunks) > 1 and tensor.ranks[-1] == ranks
        for name, tensor in norms
        if not _NUMBER.search(name)
    )


def lacking_files(tensors: CutTensors, files: Sequence[ShardFile]) -> list[str]:
    """Returns the names of files that must have been there, since their ranks hold a part of the tensors of others.

    Stages of a pipeline share no tensor, and replicas the chunks of one: neither lacks a file. A part of the model of
    which no tensor is cut at all would be refused; no known mapping of names to files makes one.
    """
    there = {(file.rank, file.part) for file in files}
    widest: dict[int, frozenset[int]] = {}
    for tensor in tensors.values():
        widest[tensor.part] = max(widest.get(tensor.part, frozenset()), frozenset(tensor.ranks), key=len)
    lost = {
        (rank, part)
        for part, ranks in widest.items()
        for more in widest.values()
        if ranks < more
        for rank in more - ranks
        if (rank, part) not in there
    }
    return [shard_name(rank, part, files[0].parts) for rank, part in sorted(lost)]


def _hidden(tensors: CutTensors) -> tuple[int, list[tuple[str, CutTensor]]]:
    """Returns the columns of the text model's embedding, and that model's norms; none where it is not one."""
    embeddings = [
        (match["prefix"], tensor.shape[1])
        for name, tensor in tensors.items()
        if (match := _EMBEDDING.fullmatch(name)) and _has_whole_rows(tensor)
    ]
    if len(embeddings) != 1:
        return 0, []
    prefix, hidden = embeddings[0]
    return hidden, list(_norms(tensors.items(), prefix))


def _norms(tensors: Iterable[tuple[str, CutTensor]], prefix: str) -> Iterator[tuple[str, CutTensor]]:
    for name, tensor in tensors:
        inside = name.startswith(prefix) and not _TOWER.search(name.removeprefix(prefix))
        if inside and len(tensor.shape) == 1 and tensor.chunks and _NORM.fullmatch(name):
            yield name, tensor


def _has_whole_rows(tensor: CutTensor) -> bool:
    columns = {shape[1:] for shape in tensor.chunks}
    return len(tensor.shape) == 2 and columns == {tensor.shape[1:]}


def _are_alike(tensors: CutTensors) -> bool:
    """Whether all layers of a stack hold the same names in the same shapes."""
    stacks: dict[str, dict[str, dict[str, Shape]]] = {}
    for name, tensor in tensors.items():
        number = _NUMBER.search(name)
        if number:
            layers = stacks.setdefault(name[: number.start()], {})
            layers.setdefault(number[0], {})[name[number.end() :]] = tensor.shape
    return all(layer == first for first, *rest in map(dict.values, stacks.values()) for layer in rest)
