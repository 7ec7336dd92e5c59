"""Lazy tensors of a checkpoint, or of a mapping that is not written. They read their bytes on access."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shardmerge.dtypes import DType
from shardmerge.execute.gather import Assembler
from shardmerge.execute.pins import Pins
from shardmerge.mapping.near import did_you_mean
from shardmerge.ops.arrays import Array, as_array, numpy_dtype
from shardmerge.packed_names import packed_name
from shardmerge.plan.value import Plan
from shardmerge.shown import Displayed
from shardmerge.storage.mapping import FileMaps
from shardmerge.storage.packed import source_opener
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog, Extent, FileStamp, Shape, TensorEntry, leaves
from shardmerge.tensors.indexing import Index, indexed
from shardmerge.tensors.pieces import single_extent

if TYPE_CHECKING:
    import torch

    from shardmerge.feeds import CheckpointReader, TorchState


class _Reader(Protocol):
    """Something that gives the elements of a tensor, row-major."""

    def read(self, ranges: Iterable[tuple[int, memoryview]]) -> None:
        """Fills each buffer with the elements from its start on."""

    def extent(self) -> Extent | None:
        """Returns the one extent that holds the tensor, or None if it lies otherwise or has no elements."""

    def view(self, *, alignment: int = 1, writable: bool = False) -> memoryview | None:
        """Returns that extent mapped, or None where it has no such alignment in bytes or the system maps nothing."""


class LazyTensor:
    """A tensor that is read on access.

    Attributes
    ----------
    name
        Its name in the checkpoint or mapping.
    dtype
        Its element type; ``str(dtype)`` is the safetensors name.
    shape
        Its shape; ``()`` for a scalar.
    origin
        A description of its source, for display.

    Examples
    --------
    ``tensor.numpy()`` is a view of the file where it can be, ``tensor[10:20]`` reads the bytes of ten rows,
    ``tensor.torch()`` needs torch. bfloat16 and the float8 types are the numpy types of ml_dtypes.
    """

    __slots__ = ("_reader", "dtype", "name", "origin", "shape")

    def __init__(self, name: str, dtype: DType, shape: Shape, origin: str, reader: _Reader) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.origin = origin
        self._reader = reader

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype} {list(self.shape)}, {self.origin!r})"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        """Returns the size of the first dimension."""
        if not self.shape:
            raise TypeError(f"{self.name!r} has no dimensions, so it has no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        """Yields the rows; each is read when it is yielded."""
        return (self[row] for row in range(len(self)))

    def __bool__(self) -> bool:
        """Behaves like an array: several elements have no truth value."""
        return bool(self.numpy())

    @property
    def mapped(self) -> bool:
        """Whether ``numpy()`` and ``torch()`` return views of the file without reading it.

        True if the tensor is contiguous in one file: in a safetensors or torch file, or in the partition of one
        rank. Tensors spread over ranks, strided views and the results of ops are read.
        """
        return self._reader.extent() is not None

    def numpy(self, *, copy: bool = False) -> Array:
        """Returns the whole tensor: a read-only view of the mapped file if it is ``mapped``, else a new array.

        A view loads bytes on access and shows later changes of the file. If the file is truncated or the disk fails,
        accessing the view kills the process (``SIGBUS``). A copy is not affected by either. The elements of a view
        may be unaligned (``array.flags.aligned``).

        Parameters
        ----------
        copy
            Whether to read the tensor now, into new writable memory.

        Raises
        ------
        CheckpointError
            ``source-changed``: the file is not the one whose header was read. ``truncated-file``, ``unreadable-file``.
        """
        view = None if copy else self._view()
        return self._copied() if view is None else view

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> Array:
        """Does as numpy 2 asks: ``copy=False`` is a view or a ``ValueError``, None a copy where there is no view."""
        wanted = numpy_dtype(self.dtype) if dtype is None else np.dtype(dtype)
        view = None if copy else self._view()
        if copy is False and (view is None or view.dtype != wanted):
            raise ValueError(f"{self.name!r} cannot be had as {wanted} without a copy; leave out copy=False")
        array = self._copied() if view is None else view
        return array.astype(wanted, copy=False)

    def torch(self, *, copy: bool = False) -> torch.Tensor:
        """Returns the whole tensor on the CPU: a view of the mapped file as in ``numpy()``, or read. Needs torch.

        A torch tensor cannot be read-only. Writes to a view are copied on write, page by page, and never
        reach the file or the result of another call. Unaligned tensors are read, because torch does not support
        them.

        Parameters
        ----------
        copy
            Whether to read the tensor now.

        Raises
        ------
        CheckpointError
            As for ``numpy()``.
        """
        import torch  # 200 MiB that no conversion needs

        dtype = getattr(torch, self.dtype.torch)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        data = None if copy else self._reader.view(alignment=self.dtype.itemsize, writable=True)
        return torch.frombuffer(self._read() if data is None else data, dtype=dtype).reshape(self.shape)

    def __dlpack__(self, **asked: object) -> object:
        """Gives the tensor to ``torch.as_tensor``, ``torch.tensor`` and ``from_dlpack``, of every type. Needs torch."""
        return self.torch().__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Says that the tensor comes in the memory of the CPU."""
        return 1, 0  # kDLCPU

    def _view(self) -> Array | None:
        """Returns a read-only view, or None where there can be none; what has no elements needs no file."""
        if not self.nbytes:
            return self._copied()
        data = self._reader.view()
        return None if data is None else as_array(data, self.dtype).reshape(self.shape)

    def _copied(self) -> Array:
        return as_array(self._read(), self.dtype).reshape(self.shape)

    def _read(self) -> memoryview:
        data = memoryview(bytearray(self.nbytes))
        self._reader.read([(0, data)])
        return data

    def __getitem__(self, index: Index) -> Array:
        """Reads a basic slice: integers, slices, an ellipsis. Only the runs of elements it takes are read.

        Raises
        ------
        IndexError, TypeError
            As numpy; TypeError also for lists, masks and new axes.
        """
        ranges, kept = indexed(index, self.shape)
        lengths = tuple(len(r) for r in ranges)
        found = np.empty(lengths, numpy_dtype(self.dtype))
        if found.size:
            self._fill(ranges, found)
        return found.reshape([n for n, keep in zip(lengths, kept, strict=True) if keep])

    def _fill(self, ranges: list[range], found: Array) -> None:
        """One read a run: the axes at the end that are whole, and the last one that is not, if its step is 1."""
        axis = len(ranges)
        while axis and ranges[axis - 1] == range(self.shape[axis - 1]):
            axis -= 1
        if axis and ranges[axis - 1].step == 1:
            axis -= 1
        strides = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        tail = sum(r.start * s for r, s in zip(ranges[axis:], strides[axis:], strict=True))
        run = prod(len(r) for r in ranges[axis:])
        rows = found.reshape(-1, run).view(np.uint8)
        starts = (sum(i * s for i, s in zip(outer, strides, strict=False)) + tail for outer in product(*ranges[:axis]))
        self._reader.read((start, row.data) for start, row in zip(starts, rows, strict=True))


class NoSuchTensor(KeyError):
    """A name that a checkpoint does not have, with the nearest ones where it is shown."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(name)
        self._names = names

    def __str__(self) -> str:
        near = did_you_mean(str(self.args[0]), self._names)
        return f"there is no tensor {self.args[0]!r}{f'; {near}' if near else ''}"


class LazyCheckpoint(Displayed, Mapping[str, LazyTensor]):
    """A checkpoint, or the result of a merge, as a mapping of names to tensors that read when asked.

    Attributes
    ----------
    kind
        The format, or the name of the target.
    notes
        What a user should know about it.
    """

    def __init__(self, kind: str, notes: tuple[str, ...], tensors: dict[str, LazyTensor]) -> None:
        self.kind = kind
        self.notes = notes
        self._tensors = tensors

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise NoSuchTensor(name, self._tensors) from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def torch(self) -> TorchState:
        """Returns a state dict of torch tensors, each read when it is taken. Needs torch.

        For ``LlamaForCausalLM.from_pretrained(None, config=config, state_dict=checkpoint.torch())``.
        """
        from shardmerge.feeds import TorchState

        return TorchState(self)

    def storage_reader(self) -> CheckpointReader:
        """Returns a reader for ``torch.distributed.checkpoint.load(state, storage_reader=...)``. Needs torch."""
        from shardmerge.feeds import CheckpointReader

        return CheckpointReader(self)


class _EntryReader:
    """The elements of an entry."""

    __slots__ = ("_entry", "_maps", "_pool")

    def __init__(self, pool: FilePool, maps: FileMaps, entry: TensorEntry) -> None:
        self._pool = pool
        self._maps = maps
        self._entry = entry

    def extent(self) -> Extent | None:
        return single_extent(self._entry, 0, self._entry.numel)

    def view(self, *, alignment: int = 1, writable: bool = False) -> memoryview | None:
        extent = self.extent()
        if extent is None or extent.offset % alignment or packed_name(extent.file):
            return None
        return self._maps.view(extent.file, extent.offset, extent.nbytes, writable=writable)

    def read(self, ranges: Iterable[tuple[int, memoryview]]) -> None:
        """Fills each buffer; what an op reads ahead of its tiles (all of a TIES tensor) is read once for all."""
        assembler = Assembler(self._pool)
        for start, out in ranges:
            assembler.fill(self._entry, start, out)


def _readers(stamps: Iterable[FileStamp]) -> Callable[[TensorEntry], _EntryReader]:
    """Returns what makes the readers of entries, all with the same open files."""
    pool = FilePool(open_file=source_opener())
    pool.opened = Pins(stamps).opened
    return partial(_EntryReader, pool, FileMaps(pool))


def lazy_catalog(catalog: Catalog) -> LazyCheckpoint:
    """Returns the tensors of a catalog; tied names give the same bytes."""
    reader = _readers(catalog.files)
    tensors = {}
    for name in catalog.names():
        entry = catalog[name]
        tensors[name] = LazyTensor(name, entry.dtype, entry.shape, entry.origin, reader(entry))
    return LazyCheckpoint(catalog.kind, (*catalog.warnings, *catalog.notes), tensors)


def lazy_plan(plan: Plan) -> LazyCheckpoint:
    """Returns the tensors that a plan would write, made as a run makes them."""
    reader = _readers(plan.files())
    tensors = {}
    for tensor in plan.tensors():
        origin = ", ".join(dict.fromkeys(f"{leaf.source}:{leaf.name}" for leaf in leaves(tensor.entry)))
        tensors[tensor.name] = LazyTensor(tensor.name, tensor.dtype, tensor.shape, origin, reader(tensor.entry))
    return LazyCheckpoint(plan.target, plan.warnings, tensors)
