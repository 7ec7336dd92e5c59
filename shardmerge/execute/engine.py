"""Streams a plan to files: workers take tiles in the order of the sources and write them at their final offsets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from shardmerge.errors import InterruptedRunError
from shardmerge.execute.checksum import crc32, joined
from shardmerge.execute.cloning import clone_shard, ranges_left
from shardmerge.execute.gather import Assembler
from shardmerge.execute.order import ordered
from shardmerge.execute.pins import Pins
from shardmerge.execute.products import one_thread_for
from shardmerge.execute.records import ReadRecords, RecordChecks, RecordCounts, no_records
from shardmerge.plan.clones import Clone, overlapping
from shardmerge.plan.memory import has_state, tile_elements
from shardmerge.plan.value import Plan, PlannedShard, PlannedTensor
from shardmerge.storage.limits import return_freed_memory
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.storage.writing import OutputFile

if TYPE_CHECKING:
    from shardmerge.execute.gpu import CudaCasts

# Called with the bytes just written, from any worker, one call at a time.
Progress: TypeAlias = Callable[[int], None]

# Where casts are made; everything else is done by the CPU.
Device: TypeAlias = Literal["cpu", "cuda"]


def check_device(device: Device) -> None:
    """Raises ``device-unavailable`` where casts cannot be made on a device."""
    if device == "cuda":
        from shardmerge.execute.gpu import require_cuda

        require_cuda()


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements ``[start, start + count)`` of a planned tensor."""

    shard: PlannedShard
    tensor: PlannedTensor
    start: int
    count: int

    @property
    def offset(self) -> int:
        """In bytes, from the start of the shard."""
        return self.tensor.offset + self.start * self.tensor.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes
    ----------
    overflows
        Finite values that became infinite (or NaN, in types without infinities), by tensor; only those with any.
    checksums
        CRC-32 of each tensor's bytes in the output, but for those of which something was cloned: nobody saw the bytes.
    bytes_read, reads
        Data read from the sources, in bytes and calls.
    bytes_written
        Data written to the shards.
    cloned
        The source file of each tensor of which something was cloned, and where in it the tensor begins, in bytes.
    bytes_cloned
        Bytes of the shards that are shared with the sources.
    clone_seconds
        What cloning them took; the kernel first writes out what of the sources is not on the disk yet.
    records
        What became of the checksums that source files carry.
    """

    overflows: dict[str, int]
    checksums: dict[str, int]
    bytes_read: int
    reads: int
    bytes_written: int
    cloned: dict[str, tuple[str, int]] = field(default_factory=dict)
    bytes_cloned: int = 0
    clone_seconds: float = 0.0
    records: RecordCounts = field(default_factory=RecordCounts)


def tasks(plan: Plan) -> Iterator[tuple[Tile, ...]]:
    """Yields what a worker takes at a time, in source order: a tile, or all of a tensor that something is kept for."""
    for shard in plan.shards:
        yield from shard_tasks(plan, shard, ())


def shard_tasks(plan: Plan, shard: PlannedShard, cloned: Sequence[Clone]) -> Iterator[tuple[Tile, ...]]:
    """Yields the tasks of a shard of which some ranges are there already."""
    for tensor in ordered(shard.tensors):
        step = tile_elements(tensor.entry, plan.memory.tile)
        every = (
            Tile(shard, tensor, start, min(step, first + count - start))
            for first, count in ranges_left(tensor, cloned)
            for start in range(first, first + count, step)
        )
        if has_state(tensor.entry):
            yield tuple(every)
        else:
            yield from ((tile,) for tile in every)


def execute(
    plan: Plan,
    folder: Path,
    pool: FilePool,
    *,
    sync: bool = True,
    progress: Progress | None = None,
    device: Device = "cpu",
    records: ReadRecords = no_records,
) -> Outcome:
    """Writes the plan's shards into an existing, empty directory.

    Parameters
    ----------
    plan
        What to do.
    folder
        Where the shards go; names as planned.
    pool
        Reads the sources. Where its pages leave the page cache at once, those of the output do.
    sync
        Whether each shard is synced before its first bytes are written.
    progress
        Told about every tile.
    device
        Where casts are made.
    records
        Gives the records of a source file that have checksums there.

    Raises
    ------
    CheckpointError
        ``source-changed``: a source file is not the one that was planned with. ``damaged-record``: the bytes of a
        record do not have its checksum.
    ResourceError, OutputError
        From the writing side.
    InterruptedRunError
        ``interrupted``: Ctrl-C or SIGTERM.
    """
    pins = Pins(plan.files())
    pins.check()
    checks = RecordChecks(records)
    pool.opened, pool.seen, pool.skimmed = _both(pins.opened, checks.opened), checks.seen, checks.skimmed
    return_freed_memory()
    run = _Run(plan, folder, pool, sync, progress, device)
    threads = [threading.Thread(target=run.work, name=f"worker-{n}") for n in range(plan.memory.workers)]
    with one_thread_for(tensor.entry for tensor in plan.tensors()):
        _carry_out(run, threads)
    if run.failure is not None:
        raise run.failure
    counts = checks.finish(pool)
    pins.check()
    return replace(run.outcome(), records=counts)


def _carry_out(run: _Run, threads: Sequence[threading.Thread]) -> None:
    """Starts the workers and waits for them."""
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
    finally:
        run.close()


def _both(first: Callable[[SourceFile], None], second: Callable[[SourceFile], None]) -> Callable[[SourceFile], None]:
    def opened(file: SourceFile) -> None:
        first(file)
        second(file)

    return opened


def _casts_on(device: Device) -> CudaCasts | None:
    if device == "cpu":
        return None
    from shardmerge.execute.gpu import CudaCasts

    return CudaCasts()


@dataclass(slots=True)
class _Run:
    """The state that the workers of one execution share; everything here is guarded by ``lock``."""

    plan: Plan
    folder: Path
    pool: FilePool
    sync: bool
    progress: Progress | None
    device: Device
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: BaseException | None = None
    written: int = 0
    overflows: Counter[str] = field(default_factory=Counter)
    checksums: dict[str, int] = field(default_factory=dict)
    cloned: dict[str, tuple[str, int]] = field(default_factory=dict)
    bytes_cloned: int = 0
    clone_seconds: float = 0.0
    _queue: Iterator[tuple[Tile, ...]] = field(init=False)
    _left: Counter[str] = field(default_factory=Counter)  # bytes of tensors still to be written, by shard
    # Offset, bytes and CRC-32 of the tiles of tensors under way: of all of a 405B they would take 70 MB.
    _sums: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    _files: dict[str, OutputFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._queue = (task for shard in self.plan.shards for task in self._begin(shard))

    def work(self) -> None:
        """Takes tasks until there are none, or another worker failed."""
        try:
            assembler = Assembler(self.pool, self.plan.memory.tile, _casts_on(self.device))
            while (task := self._next()) is not None:
                for tile in task:
                    self._carry(tile, assembler)
                assembler.forget()
        except BaseException as error:  # noqa: BLE001  # whatever happens in a thread must reach the caller
            self.stop(error)

    def _carry(self, tile: Tile, assembler: Assembler) -> None:
        """Makes and writes one tile; its window goes with this frame, before the next one is mapped."""
        before = assembler.overflowed
        data = assembler.view(tile.tensor.entry, tile.start, tile.count)
        self._file(tile.shard).write(tile.offset, data)
        self._done(tile, data, assembler.overflowed - before)
        assembler.release(data)

    def stop(self, error: BaseException) -> None:
        """Remembers the first failure; workers stop at their next tile."""
        with self.lock:
            self.failure = self.failure or error

    def close(self) -> None:
        """Closes the files that a failure left open; none is otherwise."""
        for file in self._files.values():
            file.abandon()

    def outcome(self) -> Outcome:
        """Returns the totals of a finished run."""
        whole = (tensor.name for tensor in self.plan.tensors() if tensor.name not in self.cloned)
        return Outcome(
            dict(self.overflows),
            {name: self.checksums.get(name, 0) for name in whole},  # 0: of no bytes
            self.pool.bytes_read,
            self.pool.reads,
            self.written,
            self.cloned,
            self.bytes_cloned,
            self.clone_seconds,
        )

    def _next(self) -> tuple[Tile, ...] | None:
        with self.lock:
            return None if self.failure else next(self._queue, None)

    def _begin(self, shard: PlannedShard) -> Iterator[tuple[Tile, ...]]:
        """Opens a shard, clones what can be cloned, and returns the tasks that are left. The lock is held."""
        file = self._open(shard)
        started = time.monotonic()
        cloned = clone_shard(shard, file, self.pool)
        self.clone_seconds += time.monotonic() - started
        for tensor in shard.tensors:
            for one in overlapping(tensor, cloned):
                self.cloned[tensor.name] = one.file, one.start + tensor.offset - one.offset
        nbytes = sum(one.nbytes for one in cloned)
        self.bytes_cloned += nbytes
        if self.progress is not None and nbytes:
            self.progress(nbytes)
        self._left[shard.name] = sum(tensor.nbytes for tensor in shard.tensors) - nbytes
        if not self._left[shard.name]:  # all cloned, or nothing but empty tensors
            self._seal(shard, self._files.pop(shard.name))
        return shard_tasks(self.plan, shard, cloned)

    def _file(self, shard: PlannedShard) -> OutputFile:
        with self.lock:
            return self._files[shard.name]

    def _open(self, shard: PlannedShard) -> OutputFile:
        file = OutputFile(self.folder / shard.name, shard.nbytes, sync=self.sync, bounded=self.pool.bounded)
        for offset, blob in shard.blobs:
            reserved = max(8 - offset, 0)  # written last: see OutputFile
            file.write(offset + reserved, memoryview(blob)[reserved:])
        self._files[shard.name] = file
        return file

    def _done(self, tile: Tile, data: memoryview, overflowed: int) -> None:
        checksum = crc32(data)
        with self.lock:
            self.written += data.nbytes
            self._sum_up(tile, data.nbytes, checksum)
            if overflowed:
                self.overflows[tile.tensor.name] += overflowed
            self._left[tile.shard.name] -= data.nbytes
            last = not self._left[tile.shard.name]
            if self.progress is not None:
                self.progress(data.nbytes)
        if last:  # outside the lock: syncing a shard takes seconds, and the other workers go on
            self._seal(tile.shard, self._files.pop(tile.shard.name))

    def _seal(self, shard: PlannedShard, file: OutputFile) -> None:
        for name, offsets in shard.checksums.items():
            for offset in offsets:
                file.write(offset, memoryview(self.checksums.get(name, 0).to_bytes(4, "little")))
        file.seal(shard.blobs[0][1][:8])

    def _sum_up(self, tile: Tile, nbytes: int, checksum: int) -> None:
        """Keeps a tile's checksum, or joins those of its tensor if it was the last one."""
        name = tile.tensor.name
        if name in self.cloned:  # parts of it nobody saw
            return
        found = self._sums.setdefault(name, [])
        found.append((tile.offset, nbytes, checksum))
        if sum(size for _, size, _ in found) == tile.tensor.nbytes:
            self.checksums[name] = joined((size, one) for _, size, one in sorted(self._sums.pop(name)))
