"""Tensors of a finished directory, made again from the sources and compared with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, UnreadableError, VerificationError, raise_all
from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.gather import Assembler
from shardmerge.execute.pins import Pins
from shardmerge.plan.tasks import batches
from shardmerge.plan.value import Plan
from shardmerge.publish.recorded import read_recorded
from shardmerge.publish.selection import Selection
from shardmerge.publish.verify import ALL, Verdict
from shardmerge.storage.reading import FilePool


def verify_sources(
    folder: Path, plan: Plan, tile: int, progress: Progress | None = None, which: Selection = ALL
) -> Verdict:
    """Makes every selected tensor again from the sources and compares it with the directory, bit for bit.

    Raises
    ------
    VerificationError
        ``plan-differs``: sources or mapping are not those of the run. ``tensor-differs``: with the tensor and byte.
    """
    receipt = read_recorded(folder)
    names = which.of(receipt, folder).tensors.keys()
    check_plan(folder, receipt.plan, plan)
    raise_all(_remade_problems(folder, plan, tile, progress, names))
    found = f"{len(names)} of the tensors were" if which else "every tensor was"
    nbytes = sum(tensor.nbytes for tensor in plan.tensors() if tensor.name in names)
    return Verdict((f"{found} made again and {'are' if which else 'is'} bit for bit the same",), len(names), nbytes)


def check_plan(folder: Path, recorded: str, plan: Plan) -> None:
    """Raises ``plan-differs`` where a plan is not the one that a directory was made by."""
    if recorded != plan.id:
        raise VerificationError(
            "plan-differs",
            "the mapping and sources now give another plan than the one that made this directory",
            where=str(folder),
            found=plan.id[:16],
            expected=recorded[:16],
            hint="a source, the mapping or the options changed: convert again, or leave the mapping out",
        )


def _remade_problems(
    folder: Path, plan: Plan, tile: int, progress: Progress | None, names: Collection[str]
) -> Iterator[ShardmergeError]:
    pool = FilePool()
    pool.opened = Pins(plan.files()).opened
    assembler = Assembler(pool, tile)
    for shard in plan.shards:
        path = folder / shard.name
        for batch in batches(shard, tile):
            wanted = [task for task in batch if task.tensor.name in names]
            for tensor, start, count in ((task.tensor, *place) for task in wanted for place in task.tiles()):
                made = assembler.view(tensor.entry, start, count)
                at = tensor.offset + start * tensor.dtype.itemsize
                try:
                    held = pool.view(str(path), at, made.nbytes)
                except UnreadableError:
                    raise
                except CheckpointError as error:
                    yield VerificationError("size-differs", error.what, where=str(path))
                    return
                if made.cast("B") != held:
                    what = f"{tensor.name} differs from what its sources give"
                    yield VerificationError("tensor-differs", what, where=f"{path}, bytes {at} to {at + made.nbytes}")
                assembler.release(made)
                if progress is not None:
                    progress(made.nbytes)
            assembler.forget()
