"""A finished directory against its receipt, its sources, a reference, or transformers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardmerge.errors import ShardmergeError, VerificationError, raise_all
from shardmerge.execute.executors.contract import Progress
from shardmerge.mapping.near import printable
from shardmerge.prepare.loading import Answer, ask
from shardmerge.publish.held_files import HeldTensors, frame_sha256, held_tensors
from shardmerge.publish.model_agreement import model_problems
from shardmerge.publish.recorded import Recorded, read_recorded
from shardmerge.publish.second_opinion import reference_problems
from shardmerge.publish.selection import Selection
from shardmerge.publish.sums import FoundSums, read_sums
from shardmerge.publish.unlisted import unlisted_files, unlisted_problems
from shardmerge.shown import Displayed
from shardmerge.storage.reading import read_whole
from shardmerge.tensors.pieces import single_extent

ALL = Selection()


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
        What was not checked, in words; nothing if all was.
    unlisted
        Files that the receipt does not list, and that no loader picks up by their names.
    digests
        SHA-256 (hex) of the files of weights as they are, by name; empty where it was not taken.
    """

    checks: tuple[str, ...]
    tensors: int
    nbytes: int
    unchecked: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


def verify_directory(
    folder: Path,
    progress: Progress | None = None,
    which: Selection = ALL,
    *,
    compared: bool = False,
    digests: bool = False,
) -> Verdict:
    """Checks a directory against its own receipt, by our parser and the reference parser, every byte.

    Tensors that were cloned have no checksum: their places are checked, their bytes are not, and the verdict says so.

    Parameters
    ----------
    folder, progress
        The directory; called with the bytes of every tensor.
    which
        The tensors whose bytes are read. If not all: of the files only the headers of those that hold them.
    compared
        Whether all selected bytes are compared with something else too, so that none is left unchecked.
    digests
        Whether the SHA-256 of files is taken even if the receipt has none.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made. ``unknown-tensor``: not in it.
    VerificationError
        All that differs, at once.
    """
    whole = read_recorded(folder)
    receipt = which.of(whole, folder)
    unlisted = unlisted_files(folder, whole.files())
    raise_all([*unlisted_problems(folder, unlisted), *_file_problems(folder, receipt)])
    held = {name: held_tensors(folder, name, receipt.within[name]) for name in receipt.shards}
    raise_all(_frame_problems(folder, held, receipt))
    raise_all(_place_problems(folder, held, receipt))
    raise_all(reference_problems(folder, held, headers=bool(which)))
    raise_all(model_problems(folder, held, receipt))
    sums = read_sums(folder, held, receipt, progress, files=not which and (digests or receipt.digested))
    raise_all(_sum_problems(folder, receipt, sums))
    unchecked = [which.left_out(whole, receipt), *(() if compared else _unchecked(receipt))]
    checks = tuple(_checks(receipt, which))
    nbytes = sum(tensor.nbytes for tensor in receipt.tensors.values())
    return Verdict(
        checks,
        len(receipt.tensors),
        nbytes,
        tuple(filter(None, unchecked)),
        tuple(map(printable, unlisted)),
        sums.files,
    )


def _checks(receipt: Recorded, which: Selection) -> Iterator[str]:
    yield f"{len(receipt.shards)} shard(s) and {len(receipt.side_files)} side file(s) are those of the receipt"
    yield f"{len(receipt.tensors)} tensors have the receipt's names, types, shapes and places"
    if not which or any(name.endswith(".safetensors") for name in receipt.shards):
        yield "safetensors reads the same tensors"
    summed = sum(tensor.nbytes for tensor in receipt.tensors.values() if tensor.summed)
    yield f"{summed:,} bytes have the receipt's {'SHA-256' if receipt.digested else 'checksums'}"


def _unchecked(receipt: Recorded) -> Iterator[str]:
    cloned = [tensor.nbytes for tensor in receipt.tensors.values() if not tensor.summed]
    if cloned:
        yield f"{sum(cloned):,} bytes in {len(cloned)} tensors: cloned from their source, they have no checksum"
    if not receipt.sealed:
        yield "the receipt itself: the version of shardmerge that wrote it stated no digest of it"


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


def _file_problems(folder: Path, receipt: Recorded) -> Iterator[ShardmergeError]:
    for name, shard in receipt.shards.items():
        path = folder / name
        if not path.is_file():
            yield _wrong("missing-file", "a shard is missing", path)
        elif path.stat().st_size != shard.nbytes:
            yield _wrong("size-differs", "a shard has another size", path, path.stat().st_size, shard.nbytes)
    for name, digest in receipt.side_files.items():
        path = folder / name
        if not path.is_file():
            yield _wrong("missing-file", "a side file is missing", path)
        elif hashlib.sha256(read_whole(path)).hexdigest() != digest:
            yield _wrong("file-differs", "a side file was changed after the run", path)


def _frame_problems(folder: Path, held: Mapping[str, HeldTensors], receipt: Recorded) -> Iterator[ShardmergeError]:
    """Everything in a file that is no tensor, and which tensors are in which file."""
    for name in held:
        if frame_sha256(folder / name, receipt.within[name]) != receipt.shards[name].frame_sha256:
            yield _wrong("header-differs", "the header of a shard was changed", folder / name)
    for name, entries in held.items():
        odd = sorted(entries.keys() ^ {tensor.stored for tensor in receipt.within[name]})
        if odd:
            yield _wrong("tensors-differ", f"shard and receipt list other tensors: {', '.join(odd[:5])}", folder / name)


def _place_problems(folder: Path, held: Mapping[str, HeldTensors], receipt: Recorded) -> Iterator[ShardmergeError]:
    for name, tensor in receipt.tensors.items():
        entry = held[tensor.shard][tensor.stored]
        extent = single_extent(entry, 0, entry.numel)
        found = (entry.dtype.name, list(entry.shape), extent.offset if extent else tensor.offset)
        expected = (tensor.dtype.name, list(tensor.shape), tensor.offset)
        if found != expected:
            texts = ("{} {} at byte {}".format(*one) for one in (found, expected))
            yield _wrong("tensors-differ", f"{name} is another tensor in its file", folder / tensor.shard, *texts)


def _sum_problems(folder: Path, receipt: Recorded, sums: FoundSums) -> Iterator[ShardmergeError]:
    """Tensors that changed, and files of which it is not known what did."""
    named = set()
    for name, found in sums.tensors.items():
        tensor = receipt.tensors[name]
        pairs = (f"{found.crc32:08x}", tensor.crc32), (found.sha256, tensor.sha256)
        differing = [(is_now, was) for is_now, was in pairs if was and is_now != was]
        for is_now, was in differing[:1]:
            named.add(tensor.shard)
            yield VerificationError(
                "checksum-differs",
                f"the bytes of {name} changed after they were written",
                where=str(folder / tensor.shard),
                found=is_now,
                expected=was,
                hint="the disk or a copy damaged the file: convert again with --overwrite --fresh",
            )
    for name, is_now in sums.files.items():
        was = receipt.shards[name].sha256
        if was and is_now != was and name not in named:
            yield _wrong("file-differs", "a shard was changed after the run", folder / name, is_now, was)


def _wrong(code: str, what: str, path: Path, found: object = "", expected: object = "") -> VerificationError:
    return VerificationError(code, what, where=str(path), found=str(found), expected=str(expected))
