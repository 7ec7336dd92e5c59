"""Streams a plan to files: workers take tiles in output order and write them at their final offsets."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from shardmerge.errors import CheckpointError, InterruptedRunError
from shardmerge.execute.checksum import combine
from shardmerge.execute.gather import gather, single_extent
from shardmerge.memory import row_width
from shardmerge.ops.arrays import Array, as_array
from shardmerge.ops.vocabulary import BLOCK_ROWS
from shardmerge.plan import Compute, Copy, Part, Plan, PlannedShard, PlannedTensor, Reduce
from shardmerge.storage.reading import FilePool
from shardmerge.storage.writing import OutputFile
from shardmerge.tensors import FileStamp, TensorEntry

# Called with the bytes just written, from any worker, one call at a time.
Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements ``[start, start + count)`` of a part; a ``Reduce`` part is one tile."""

    shard: PlannedShard
    tensor: PlannedTensor
    part: Part
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes
    ----------
    overflows
        Finite values that became infinite (or NaN, in types without infinities), by tensor; only those with any.
    checksums
        CRC-32 of each tensor's bytes in the output.
    bytes_read, reads
        Data read from the sources, in bytes and calls.
    bytes_written
        Data written to the shards.
    """

    overflows: dict[str, int]
    checksums: dict[str, int]
    bytes_read: int
    reads: int
    bytes_written: int


def tiles(plan: Plan) -> Iterator[Tile]:
    """Yields every tile of the plan, in output order."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            for part in tensor.parts:
                yield from _split(shard, tensor, part, plan.memory.tile)


def _split(shard: PlannedShard, tensor: PlannedTensor, part: Part, tile_bytes: int) -> Iterator[Tile]:
    if isinstance(part.step, Reduce):
        yield Tile(shard, tensor, part, 0, part.count)
        return
    step = tile_bytes // max(tensor.dtype.itemsize, part.step.read.entry.dtype.itemsize)
    for start in range(0, part.count, step):
        yield Tile(shard, tensor, part, start, min(step, part.count - start))


def execute(
    plan: Plan, folder: Path, pool: FilePool, *, sync: bool = True, progress: Progress | None = None
) -> Outcome:
    """Writes the plan's shards into an existing, empty directory.

    Parameters
    ----------
    plan
        What to do.
    folder
        Where the shards go; names as planned.
    pool
        Reads the sources.
    sync
        Whether each shard is synced before its first bytes are written.
    progress
        Told about every tile.

    Raises
    ------
    CheckpointError
        ``source-changed``: a source file is not the one that was planned with.
    ResourceError, OutputError
        From the writing side.
    InterruptedRunError
        ``interrupted``: Ctrl-C or SIGTERM.
    """
    stamps = {stamp.path: stamp for source in plan.sources for stamp in source.files}
    check_stamps(stamps.values())
    run = _Run(plan, folder, pool, sync, progress)
    threads = [threading.Thread(target=run.work, name=f"worker-{n}") for n in range(plan.memory.workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.5)  # a join without a timeout would not see Ctrl-C
    except KeyboardInterrupt as error:
        run.stop(InterruptedRunError("interrupted", "stopped before the result was published", hint="run it again"))
        for thread in threads:
            thread.join()
        raise run.failure or error from error
    if run.failure is not None:
        raise run.failure
    check_stamps(stamps.values())
    return run.outcome()


def check_stamps(stamps: Iterable[FileStamp]) -> None:
    """Compares source files with what they were when they were planned with."""
    for stamp in stamps:
        try:
            status = Path(stamp.path).stat()
        except OSError as error:
            raise _changed(stamp, "it is gone") from error
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            raise _changed(stamp, f"{status.st_size} bytes, modified meanwhile")


def _changed(stamp: FileStamp, found: str) -> CheckpointError:
    return CheckpointError(
        "source-changed",
        "a source file changed while it was being read",
        where=stamp.path,
        found=found,
        expected=f"{stamp.size} bytes, as when the plan was made",
        hint="wait until whoever writes it is done, then run again",
    )


@dataclass(slots=True)
class _Run:
    """The state that the workers of one execution share; everything here is guarded by ``lock``."""

    plan: Plan
    folder: Path
    pool: FilePool
    sync: bool
    progress: Progress | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: BaseException | None = None
    written: int = 0
    overflows: Counter[str] = field(default_factory=Counter)
    sums: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    _queue: Iterator[Tile] = field(init=False)
    _left: Counter[str] = field(init=False)
    _files: dict[str, OutputFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._queue = tiles(self.plan)
        self._left = Counter(tile.shard.name for tile in tiles(self.plan))
        for shard in self.plan.shards:
            if not self._left[shard.name]:  # nothing but empty tensors
                self._open(shard).seal(shard.header[:8])

    def work(self) -> None:
        """Takes tiles until there are none, or another worker failed."""
        buffers = new_buffers(self.plan.memory.tile)
        try:
            while (tile := self._next()) is not None:
                self._carry(tile, buffers)
        except BaseException as error:  # noqa: BLE001  # whatever happens in a thread must reach the caller
            self.stop(error)

    def _carry(self, tile: Tile, buffers: Buffers) -> None:
        """Makes and writes one tile; its window goes with this frame, before the next one is mapped."""
        data, overflowed = make_tile(tile, self.pool, buffers)
        self._file(tile.shard).write(_offset(tile), data)
        self._done(tile, data, overflowed)

    def stop(self, error: BaseException) -> None:
        """Remembers the first failure; workers stop at their next tile, and open files are closed by the caller."""
        with self.lock:
            self.failure = self.failure or error

    def outcome(self) -> Outcome:
        """Returns the totals of a finished run."""
        checksums = {tensor.name: _checksum(self.sums.get(tensor.name, [])) for tensor in self.plan.tensors()}
        return Outcome(dict(self.overflows), checksums, self.pool.bytes_read, self.pool.reads, self.written)

    def _next(self) -> Tile | None:
        with self.lock:
            return None if self.failure else next(self._queue, None)

    def _file(self, shard: PlannedShard) -> OutputFile:
        with self.lock:
            return self._files.get(shard.name) or self._open(shard)

    def _open(self, shard: PlannedShard) -> OutputFile:
        file = OutputFile(self.folder / shard.name, shard.nbytes, sync=self.sync)
        file.write(8, memoryview(shard.header)[8:])
        self._files[shard.name] = file
        return file

    def _done(self, tile: Tile, data: memoryview, overflowed: int) -> None:
        checksum = zlib.crc32(data)
        with self.lock:
            self.written += data.nbytes
            self.sums.setdefault(tile.tensor.name, []).append((_offset(tile), data.nbytes, checksum))
            if overflowed:
                self.overflows[tile.tensor.name] += overflowed
            self._left[tile.shard.name] -= 1
            last = not self._left[tile.shard.name]
            if self.progress is not None:
                self.progress(data.nbytes)
        if last:  # outside the lock: syncing a shard takes seconds, and the other workers go on
            self._files.pop(tile.shard.name).seal(tile.shard.header[:8])


def _offset(tile: Tile) -> int:
    return tile.tensor.offset + (tile.part.start + tile.start) * tile.tensor.dtype.itemsize


def _checksum(sums: list[tuple[int, int, int]]) -> int:
    total = 0
    for _, nbytes, checksum in sorted(sums):
        total = combine(total, checksum, nbytes)
    return total


@dataclass(frozen=True, slots=True)
class Buffers:
    """The two tiles of memory a worker owns; reused for every tile."""

    first: memoryview
    second: memoryview

    def input(self, nbytes: int) -> memoryview:
        """Returns the start of the first tile."""
        return self.first[:nbytes]

    def output(self, nbytes: int) -> memoryview:
        """Returns the start of the second tile."""
        return self.second[:nbytes]


def new_buffers(nbytes: int) -> Buffers:
    """Returns two fresh tiles of ``nbytes`` each."""
    # numpy leaves fresh memory untouched, so a tile that no step needs costs nothing; a bytearray is zeroed.
    return Buffers(np.empty(nbytes, np.uint8).data, np.empty(nbytes, np.uint8).data)


def make_tile(tile: Tile, pool: FilePool, buffers: Buffers) -> tuple[memoryview, int]:
    """Returns the output bytes of a tile, good until the buffers are used again, and how many values overflowed."""
    step = tile.part.step
    if isinstance(step, Copy):
        return read_range(pool, step.read.entry, tile.start, tile.count, buffers.input), 0
    if isinstance(step, Compute):
        data = read_range(pool, step.read.entry, tile.start, tile.count, buffers.input)
        out = buffers.output(tile.count * tile.tensor.dtype.itemsize)
        overflowed = step.op.apply(as_array(data, step.read.entry.dtype), as_array(out, tile.tensor.dtype))
        return out, overflowed
    return _reduce(tile, step, pool)


def read_range(
    pool: FilePool, entry: TensorEntry, start: int, count: int, buffer: Callable[[int], memoryview]
) -> memoryview:
    """Returns elements ``[start, start + count)``: mapped where one extent holds them, else gathered in ``buffer``."""
    extent = single_extent(entry, start, count)
    mapped = pool.window(extent.file, extent.offset, extent.nbytes) if extent is not None else None
    if mapped is not None:
        return mapped
    data = buffer(count * entry.dtype.itemsize)
    gather(pool, entry, start, data)
    return data


def _reduce(tile: Tile, step: Reduce, pool: FilePool) -> tuple[memoryview, int]:
    entry = step.read.entry
    width = row_width(entry.shape)
    out = memoryview(bytearray(tile.count * tile.tensor.dtype.itemsize))
    overflowed = step.op.apply(_blocks(pool, entry, width), width, as_array(out, tile.tensor.dtype))
    return out, overflowed


def _blocks(pool: FilePool, entry: TensorEntry, width: int) -> Iterator[Array]:
    """Yields the tensor's rows, ``BLOCK_ROWS`` at a time."""
    for first in range(0, entry.shape[0], BLOCK_ROWS):
        rows = min(BLOCK_ROWS, entry.shape[0] - first)
        data = bytearray(rows * width * entry.dtype.itemsize)
        gather(pool, entry, first * width, memoryview(data))
        yield as_array(memoryview(data), entry.dtype).reshape(rows, width)
