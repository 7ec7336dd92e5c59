"""What a ``.metadata`` of torch's distributed checkpoint says of tensors and chunks, as arrays of numbers.

A model of 405 billion parameters on 1,024 ranks has over a million chunks: here each is the numbers of its box and four
more, 60 bytes for a matrix, where objects took 3.9 KB.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from shardmerge.dtypes import DType
from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.tensors.entries import Shape

# Of one .metadata: 405 billion parameters with both moments of Adam on 1,024 ranks are 3.5 million.
_MOST_CHUNKS = 4_000_000
_NOWHERE = -1
_LARGEST = (1 << 63) - 1
_LONGEST_PATH = 255


class ChunkedTensor(NamedTuple):
    """A tensor, and which of all chunks are its own.

    Attributes
    ----------
    dtype, shape
        Of the whole tensor.
    first, chunks
        The number of its first chunk, and how many it has.
    box
        Where the numbers of the first one's box are.
    """

    dtype: DType
    shape: Shape
    first: int
    chunks: int
    box: int


class StoredChunk(NamedTuple):
    """A part of a tensor, and the item of a file that holds it.

    Attributes
    ----------
    offsets, sizes
        Its box, in elements, an axis each.
    file
        Name of the file in the checkpoint's directory; empty where no item holds the chunk.
    begin, length
        The item, in bytes.
    packed
        How the item is transformed (``stream.zstd/1``), or ``""``.
    """

    offsets: Shape
    sizes: Shape
    file: str
    begin: int
    length: int
    packed: str


class ChunkTable:
    """Tensors and chunks, in the order in which a ``.metadata`` names them: first all boxes, then all items.

    Parameters
    ----------
    keep
        Tells by its flat name whether a tensor is wanted; of any other nothing is held.
    keep_object
        The same of what is no tensor.

    Attributes
    ----------
    tensors
        By flat name.
    objects
        Where an object lies, by its flat name: a file, the item's first byte and bytes, and how it is transformed.
    dropped
        Names of tensors that were not kept.
    """

    def __init__(self, keep: Callable[[str], bool], keep_object: Callable[[str], bool]) -> None:
        self.tensors: dict[str, ChunkedTensor] = {}
        self.objects: dict[str, tuple[str, int, int, str]] = {}
        self.dropped: set[str] = set()
        self._keep, self._keep_object = keep, keep_object
        self._offsets, self._sizes = array("q"), array("q")
        self._files: dict[str, int] = {}
        self._file, self._begin, self._length = array("i"), array("q"), array("q")
        self._packed: dict[int, str] = {}
        self._places: tuple[str, dict[Shape, int]] = ("", {})

    def box(self, offsets: Sequence[int], sizes: Sequence[int]) -> int:
        """Adds the box of the next chunk; returns where its numbers are."""
        if len(offsets) != len(sizes) or len(self._sizes) > 8 * _MOST_CHUNKS:
            raise hostile("a chunk's offsets and sizes have different numbers of axes, or there are too many chunks")
        at = len(self._sizes)
        self._offsets.extend(offsets)
        self._sizes.extend(sizes)
        return at

    def tensor(self, name: str, dtype: DType, shape: Shape, boxes: Sequence[int]) -> None:
        """Adds the tensor to which the boxes belong that were added last."""
        if name in self.tensors or name in self.dropped:
            raise damaged("two tensors have the same name", name[:200])
        first, axes = len(self._file), len(shape)
        begin = boxes[0] if boxes else len(self._sizes)
        if len(self._sizes) - begin != axes * len(boxes) or any(
            boxes[k] != begin + k * axes for k in range(len(boxes))
        ):
            raise damaged("a tensor has chunks of another number of axes, or those of another tensor", name[:200])
        if not self._keep(name):
            del self._offsets[begin:], self._sizes[begin:]
            self.dropped.add(name)
            return
        if first + len(boxes) > _MOST_CHUNKS:
            raise hostile("more chunks than any checkpoint has", expected=f"at most {_MOST_CHUNKS:,}")
        self.tensors[name] = ChunkedTensor(dtype, shape, first, len(boxes), begin)
        self._file.extend([_NOWHERE] * len(boxes))
        self._begin.extend([0] * len(boxes))
        self._length.extend([0] * len(boxes))

    def item(  # the key of an item, and what it is
        self, name: str, offsets: Shape, index: int | None, path: str, begin: int, length: int, packed: str = ""
    ) -> None:
        """Says where a chunk lies. ``index`` is where it may be among the chunks of its tensor, if it is known."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return  # of an object, or of a tensor that is not kept
        _check_place(name, begin, length)
        chunk = self._find(name, tensor, offsets, index)
        if self._file[chunk] != _NOWHERE:
            raise damaged("two items hold one chunk", f"{name[:200]} at {list(offsets)}")
        self._file[chunk] = self._files.setdefault(_checked(path), len(self._files))
        self._begin[chunk], self._length[chunk] = begin, length
        if packed:
            self._packed[chunk] = packed

    def add_object(self, name: str, path: str, begin: int, length: int, packed: str) -> None:
        """Says where an object lies."""
        if self._keep_object(name):
            _check_place(name, begin, length)
            self.objects[name] = _checked(path), begin, length, packed

    def _find(self, name: str, tensor: ChunkedTensor, offsets: Shape, index: int | None) -> int:
        axes = len(tensor.shape)
        if index is not None and 0 <= index < tensor.chunks:
            at = tensor.box + index * axes
            if tuple(self._offsets[at : at + axes]) == offsets:
                return tensor.first + index
        if self._places[0] != name:
            starts = (
                self._offsets[at : at + axes] for at in range(tensor.box, tensor.box + tensor.chunks * axes, axes or 1)
            )
            self._places = name, {tuple(start): chunk for chunk, start in enumerate(islice(starts, tensor.chunks))}
        found = self._places[1].get(offsets) if axes else 0
        if found is None or found >= tensor.chunks:
            raise damaged("an item holds a chunk that its tensor does not have", f"{name[:200]} at {list(offsets)}")
        return tensor.first + found

    def chunks(self, name: str) -> Iterator[StoredChunk]:
        """Yields the chunks of a tensor."""
        tensor = self.tensors[name]
        axes, files = len(tensor.shape), self.files()
        for k in range(tensor.chunks):
            at, chunk = tensor.box + k * axes, tensor.first + k
            number = self._file[chunk]
            yield StoredChunk(
                tuple(self._offsets[at : at + axes]),
                tuple(self._sizes[at : at + axes]),
                files[number] if number != _NOWHERE else "",
                self._begin[chunk],
                self._length[chunk],
                self._packed.get(chunk, ""),
            )

    def files(self) -> list[str]:
        """Returns the names of the files that items lie in."""
        return list(self._files)


def _check_place(name: str, begin: int, length: int) -> None:
    if min(begin, length) < 0 or max(begin, length) > _LARGEST:
        raise damaged("an item begins before its file does, or has no size", f"{name[:200]}, {begin}, {length}")


def _checked(path: str) -> str:
    """A name in the checkpoint's own directory: anything else in it is an attack."""
    if not path or len(path) > _LONGEST_PATH or "/" in path or "\\" in path or "\0" in path or path in (".", ".."):
        raise hostile("an item lies in a file outside of the checkpoint", repr(path[:80]))
    return path
