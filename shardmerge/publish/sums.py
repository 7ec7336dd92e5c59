"""The checksums and digests of the files of a finished directory, as they are now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardmerge.execute.digests import Sums
from shardmerge.execute.executors.contract import Progress
from shardmerge.publish.held_files import HeldTensors, file_digester, tensor_sums
from shardmerge.publish.recorded import Recorded
from shardmerge.storage.reading import FilePool


@dataclass(frozen=True, slots=True)
class FoundSums:
    """What was found: the sums of tensors, and the SHA-256 (hex) of files of weights, by name."""

    tensors: Mapping[str, Sums]
    files: Mapping[str, str]


def read_sums(
    folder: Path, held: Mapping[str, HeldTensors], receipt: Recorded, progress: Progress | None, *, files: bool
) -> FoundSums:
    """Reads once what a receipt has sums of, or whole files where their SHA-256 is wanted."""
    tell = progress or _untold
    return _of_files(folder, receipt, tell) if files else FoundSums(_of_tensors(held, receipt, tell), {})


def _untold(nbytes: int) -> None:
    del nbytes


def _of_files(folder: Path, receipt: Recorded, tell: Progress) -> FoundSums:
    tensors, files = {}, {}
    for name, shard in receipt.shards.items():
        digester = file_digester(folder / name, receipt.within[name], each=receipt.digested)
        while digester.at < shard.nbytes:
            tell(digester.step(shard.nbytes))
        tensors.update({one.name: digester.of(one.name) for one in receipt.within[name]})
        files[name] = digester.sha256
    return FoundSums(tensors, files)


def _of_tensors(held: Mapping[str, HeldTensors], receipt: Recorded, tell: Progress) -> dict[str, Sums]:
    pool, found = FilePool(), {}
    for name, tensor in receipt.tensors.items():
        if tensor.summed:
            found[name] = tensor_sums(pool, held[tensor.shard][tensor.stored], sha256=receipt.digested)
        tell(tensor.nbytes)
    return found
