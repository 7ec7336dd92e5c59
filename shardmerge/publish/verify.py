"""A finished directory against its receipt, its sources, a reference, or transformers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, VerificationError, raise_all
from shardmerge.execute.executors.contract import Progress
from shardmerge.execute.gather import Assembler
from shardmerge.execute.pins import Pins
from shardmerge.plan.tasks import batches
from shardmerge.plan.value import Plan
from shardmerge.prepare.loading import Answer, ask
from shardmerge.prepare.publishable import PARTIAL, describe
from shardmerge.publish.held_files import HeldTensors, frame_sha256, held_tensors, tensor_crc32
from shardmerge.publish.receipt import read_receipt
from shardmerge.publish.second_opinion import reference_problems
from shardmerge.shown import Displayed
from shardmerge.storage.reading import FilePool
from shardmerge.targets.agreement import INCOMPLETE, disagreements
from shardmerge.tensors.file_roles import CONFIG, RECEIPT


@dataclass(frozen=True, slots=True, repr=False)
class Verdict(Displayed):
    """What was checked, for people and JSON; a failure is raised, so a verdict is always good.

    Attributes
    ----------
    checks
        One line a check, in the order they were made.
    tensors, nbytes
        Of the directory.
    unchecked
        What could not be checked, in words; nothing if all was.
    """

    checks: tuple[str, ...]
    tensors: int
    nbytes: int
    unchecked: tuple[str, ...] = ()


def verify_directory(folder: Path, progress: Progress | None = None) -> Verdict:
    """Checks a directory against its own receipt, by our parser and the reference parser, every byte.

    Tensors that were cloned have no checksum: their places are checked, their bytes are not, and the verdict says so.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made.
    VerificationError
        All that differs, at once.
    """
    receipt = read_receipt(folder)
    shards = _table(receipt, "shards")
    tensors = _table(receipt, "tensors")
    raise_all(_file_problems(folder, receipt))
    held = {name: held_tensors(folder, name, tensors) for name in shards}
    raise_all(_frame_problems(folder, held, shards, tensors))
    raise_all(reference_problems(folder, held))
    raise_all(_model_problems(folder, held, receipt))
    raise_all(_checksum_problems(folder, held, tensors, progress))
    total = sum(entry.nbytes for entries in held.values() for entry in entries.values())
    unseen = [int(str(tensor["nbytes"])) for tensor in tensors.values() if "crc32" not in tensor]
    checks = (
        f"{len(shards)} shard(s) and {len(_table(receipt, 'side_files'))} side file(s) are those of the receipt",
        f"{len(tensors)} tensors have the receipt's names, types, shapes and places",
        "a reader that is not ours finds the same",
        f"{total - sum(unseen):,} bytes have the receipt's checksums",
    )
    unchecked = f"{sum(unseen):,} bytes in {len(unseen)} tensors: cloned from their source, they have no checksum"
    return Verdict(checks, len(tensors), total, (unchecked,) if unseen else ())


def verify_sources(folder: Path, plan: Plan, tile: int, progress: Progress | None = None) -> Verdict:
    """Makes every tensor again from the sources and compares it with the directory, bit for bit.

    Raises
    ------
    VerificationError
        ``plan-differs``: sources or mapping are not those of the run. ``tensor-differs``: with the tensor and byte.
    """
    recorded = read_receipt(folder).get("plan")
    if recorded != plan.id:
        raise VerificationError(
            "plan-differs",
            "the mapping and sources now give another plan than the one that made this directory",
            where=str(folder),
            found=plan.id[:16],
            expected=str(recorded)[:16],
            hint="a source, the mapping or the options changed; convert again, or verify without --sources",
        )
    raise_all(_remade_problems(folder, plan, tile, progress))
    return Verdict(("every tensor was made again and is bit for bit the same",), _count(plan), plan.tensor_bytes)


def verify_load(folder: Path, python: str = sys.executable) -> Answer:
    """Loads the directory with the transformers of an environment, in a child process.

    Parameters
    ----------
    folder
        A model directory.
    python
        The interpreter whose transformers is asked.

    Raises
    ------
    UsageError
        ``no-transformers``: that environment cannot load models.
    VerificationError
        ``does-not-load``: an exception, or missing, unexpected or mismatched keys.
    """
    answer = ask(str(folder), python=python)
    if answer.failed:
        raise VerificationError("does-not-load", f"transformers could not load it: {answer.failed}", where=str(folder))
    keys = answer.keys
    lists = (("missing", keys.missing), ("unexpected", keys.unexpected), ("mismatched", keys.mismatched))
    wrong = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in lists if names]
    if wrong:
        raise VerificationError(
            "does-not-load",
            f"{answer.says()} with wrong keys",
            where=str(folder),
            found="; ".join(wrong),
            expected="no missing, unexpected or mismatched keys",
        )
    return answer


def _table(receipt: Mapping[str, object], key: str) -> dict[str, dict[str, object]]:
    value = receipt.get(key)
    if not isinstance(value, dict):
        raise VerificationError("damaged-receipt", f"the receipt has no {key}", where=RECEIPT)
    return value


def _file_problems(folder: Path, receipt: Mapping[str, object]) -> Iterator[ShardmergeError]:
    for name, shard in _table(receipt, "shards").items():
        path = folder / name
        if not path.is_file():
            yield _wrong("missing-file", "a shard is missing", path)
        elif path.stat().st_size != shard["nbytes"]:
            yield _wrong("size-differs", "a shard has another size", path, path.stat().st_size, shard["nbytes"])
    for name, digest in _table(receipt, "side_files").items():
        path = folder / name
        if not path.is_file():
            yield _wrong("missing-file", "a side file is missing", path)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != str(digest):
            yield _wrong("file-differs", "a side file was changed after the run", path)


def _frame_problems(
    folder: Path,
    held: Mapping[str, HeldTensors],
    shards: Mapping[str, Mapping[str, object]],
    tensors: Mapping[str, Mapping[str, object]],
) -> Iterator[ShardmergeError]:
    """Everything in a file that is no tensor, and which tensors are in which file."""
    for name in held:
        own = [tensor for tensor in tensors.values() if tensor["shard"] == name]
        if frame_sha256(folder / name, own) != shards[name]["frame_sha256"]:
            yield _wrong("header-differs", "the header of a shard was changed", folder / name)
    found = {(shard, name) for shard, entries in held.items() for name in entries}
    listed = {(str(tensor["shard"]), str(tensor["stored"])) for tensor in tensors.values()}
    if found != listed:
        names = ", ".join(name for _, name in sorted(found ^ listed)[:5])
        yield VerificationError("tensors-differ", f"shards and receipt do not list the same tensors: {names}")


def _model_problems(
    folder: Path, held: Mapping[str, HeldTensors], receipt: Mapping[str, object]
) -> Iterator[ShardmergeError]:
    """Every config.json against the shards beside it, unless a part of a model is what was asked for."""
    warnings = receipt.get("warnings")
    partial = isinstance(warnings, list) and any(str(one).startswith(PARTIAL) for one in warnings)
    for name in _table(receipt, "side_files"):
        place, _, base = name.rpartition("/")
        config = _config(folder / name) if base == CONFIG else None
        beside = [entries for shard, entries in held.items() if shard.rpartition("/")[0] == place]
        entries = {key: entry for shard in beside for key, entry in shard.items()}
        if config is None or not entries:
            continue
        for error in disagreements(describe(config, str(folder / name), entries)):
            if not (partial and error.code == INCOMPLETE):
                fields = {"where": error.where, "found": error.found, "expected": error.expected}
                yield VerificationError(error.code, error.what, **fields, hint="convert again, from sources that agree")


def _config(path: Path) -> dict[str, object] | None:
    """Returns a config, or None for a file that says nothing that could be compared."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _checksum_problems(
    folder: Path,
    held: Mapping[str, HeldTensors],
    tensors: Mapping[str, Mapping[str, object]],
    progress: Progress | None,
) -> Iterator[ShardmergeError]:
    pool = FilePool()
    for name, tensor in tensors.items():
        entry = held[str(tensor["shard"])][str(tensor["stored"])]
        found = f"{tensor_crc32(pool, entry):08x}" if "crc32" in tensor else ""
        if found and found != tensor["crc32"]:
            yield VerificationError(
                "checksum-differs",
                f"the bytes of {name} are not those that were written",
                where=str(folder / str(tensor["shard"])),
                found=found,
                expected=str(tensor["crc32"]),
                hint="the disk or a copy damaged the file: convert again",
            )
        if progress is not None:
            progress(entry.nbytes)


def _remade_problems(folder: Path, plan: Plan, tile: int, progress: Progress | None) -> Iterator[ShardmergeError]:
    pool = FilePool()
    pool.opened = Pins(plan.files()).opened
    assembler = Assembler(pool, tile)
    for shard in plan.shards:
        path = folder / shard.name
        for batch in batches(shard, tile):
            for tensor, start, count in ((task.tensor, *place) for task in batch for place in task.tiles()):
                made = assembler.view(tensor.entry, start, count)
                at = tensor.offset + start * tensor.dtype.itemsize
                try:
                    held = pool.view(str(path), at, made.nbytes)
                except CheckpointError as error:
                    yield _wrong("size-differs", error.what, path)
                    return
                if made.cast("B") != held:
                    what = f"{tensor.name} is not what its sources give"
                    yield VerificationError("tensor-differs", what, where=f"{path}, bytes {at} to {at + made.nbytes}")
                assembler.release(made)
                if progress is not None:
                    progress(made.nbytes)
            assembler.forget()


def _count(plan: Plan) -> int:
    return sum(1 for _ in plan.tensors())


def _wrong(code: str, what: str, path: Path, found: object = "", expected: object = "") -> VerificationError:
    return VerificationError(code, what, where=str(path), found=str(found), expected=str(expected))
