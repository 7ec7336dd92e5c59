"""The receipt that commits a part: what it was made by, and how to know it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.errors import UnreadableError
from shardmerge.execute.checksum import crc32, joined
from shardmerge.execute.engine import Outcome
from shardmerge.execute.frames import patched_blobs
from shardmerge.execute.records import RecordSums
from shardmerge.plan.json_values import Row, fields, listed, numbers, text, texts, whole
from shardmerge.plan.shard import PlannedShard
from shardmerge.plan.value import Part
from shardmerge.storage.reading import SourceFile
from shardmerge.version import __version__

FORMAT = "shardmerge part"

# What of a part is looked at again, in blocks of a page spread evenly over it: holes that a power cut left, a file cut
# off, another one. All of it is compared by --recheck, and by `verify`.
_SAMPLES = 16
_BLOCK = 4096
_READ = 1 << 20

# Between what a receipt says and the digest of all before it.
_DIGEST = b', "receipt_sha256": "'


@dataclass(frozen=True, slots=True)
class PartReceipt:
    """What stands in a receipt.

    Attributes
    ----------
    part
        Number of the part.
    sample
        SHA-256 (hex) of its size and of blocks of it.
    crc32
        Of the whole file; None where something was cloned, whose bytes nobody saw.
    outcome
        What was done; names of tensors are those of the plan.
    synced
        Whether it was made durable.
    machine
        Host and boot on which it was made: what was not synced is there and nowhere else.
    began, seconds
        When, in seconds since the epoch, and how long it took.
    """

    part: int
    sample: str
    crc32: int | None
    outcome: Outcome
    synced: bool
    machine: str
    began: float
    seconds: float


def receipt_of(part: Part, path: Path, outcome: Outcome, *, synced: bool, began: float, seconds: float) -> PartReceipt:
    """Returns the receipt of a part that was just made; some blocks of it are read back."""
    with SourceFile(path) as file:
        sample = _sample_digest(file)
    return PartReceipt(
        part.number, sample, _file_crc32(part.shard, outcome), outcome, synced, machine(), began, seconds
    )


def machine() -> str:
    """Returns the name of this host, and which of its boots this is."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        boot = ""
    return f"{os.uname().nodename} {boot}"


def _sample_digest(file: SourceFile) -> str:
    """Returns the SHA-256 (hex) of a file's size and of blocks of it."""
    digest = hashlib.sha256(file.size.to_bytes(8, "little"))
    last = max(file.size - _BLOCK, 0)
    for at in sorted({last * n // (_SAMPLES - 1) for n in range(_SAMPLES)}):
        digest.update(file.read(at, min(_BLOCK, file.size - at)))
    return digest.hexdigest()


def _file_crc32(shard: PlannedShard, outcome: Outcome) -> int | None:
    """Returns the CRC-32 of a whole file, from those of its tensors and the bytes between them."""
    if outcome.cloned:
        return None
    sums = [(offset, len(blob), crc32(blob)) for offset, blob in patched_blobs(shard, outcome.checksums)]
    sums += [(tensor.offset, tensor.nbytes, outcome.checksums[tensor.name]) for tensor in shard.tensors]
    return joined((nbytes, checksum) for _, nbytes, checksum in sorted(sums) if nbytes)


def unfit(receipt: PartReceipt, shard: PlannedShard, path: Path, *, recheck: bool = False) -> str:
    """Returns why a file is not the part that its receipt says, or ``""``.

    Parameters
    ----------
    receipt, shard, path
        The receipt, what was planned, and the file.
    recheck
        Whether all of it is read, and not some blocks.
    """
    gone = "the file is gone, or has another size"
    if not path.is_file():
        return gone
    try:
        with SourceFile(path) as file:
            return gone if file.size != shard.nbytes else _difference(receipt, file, recheck=recheck)
    except UnreadableError:
        if path.is_file():
            raise
        return gone  # another process took it away, to publish it


def _difference(receipt: PartReceipt, file: SourceFile, *, recheck: bool) -> str:
    if _sample_digest(file) != receipt.sample:
        return "its bytes changed after they were written"
    if recheck or not (receipt.synced or receipt.machine == machine()):
        if receipt.crc32 is None:
            return "some of it was cloned, and has no checksum"
        if _read_crc32(file) != receipt.crc32:
            return "its checksum is not that of what was written"
    return ""


def _read_crc32(file: SourceFile) -> int:
    total = 0
    buffer = memoryview(bytearray(_READ))
    for at in range(0, file.size, _READ):
        data = buffer[: min(_READ, file.size - at)]
        file.read_into(at, data)
        total = crc32(data, total)
    return total


# --- as text ---


def receipt_bytes(receipt: PartReceipt, part: Part) -> bytes:
    """Returns a receipt as JSON, with the SHA-256 of its own text at its end."""
    outcome = receipt.outcome
    numbered = {stamp.path: number for number, stamp in enumerate(part.files)}
    sums = [outcome.checksums.get(tensor.name) for tensor in part.shard.tensors]
    said = json.dumps(
        {
            "format": FORMAT,
            "shardmerge": __version__,
            "plan": part.plan,
            "part": part.number,
            "file": part.shard.name,
            "nbytes": part.shard.nbytes,
            "sample": receipt.sample,
            "crc32": receipt.crc32,
            "synced": receipt.synced,
            "machine": receipt.machine,
            "began": receipt.began,
            "seconds": receipt.seconds,
            "tensors": sums,
            "overflows": outcome.overflows,
            "cloned": outcome.cloned,
            "counts": [outcome.bytes_read, outcome.reads, outcome.bytes_written, outcome.bytes_cloned],
            "clone_seconds": outcome.clone_seconds,
            "records": [_record_row(one, numbered) for one in outcome.records],
            "sha256": outcome.file_digests.get(part.shard.name),
            "digests": [outcome.digests[tensor.name] for tensor in part.shard.tensors] if outcome.file_digests else [],
        }
    ).encode()
    return sealed(said)


def sealed(said: bytes) -> bytes:
    """Returns a JSON object with one more member: the SHA-256 of the text before it."""
    return said[:-1] + _DIGEST + hashlib.sha256(said[:-1]).hexdigest().encode() + b'"}'


def _record_row(one: RecordSums, numbered: dict[str, int]) -> list[object]:
    return [numbered[one.file], one.offset, one.nbytes, one.crc32, one.skimmed, one.sums]


def receipt_from(data: bytes, part: Part) -> PartReceipt | None:
    """Returns the receipt of a part, or None where the bytes are none: torn, damaged, of another plan or version."""
    if sealed(data.rpartition(_DIGEST)[0] + b"}") != data:
        return None
    try:
        row = fields(json.loads(data))
        if (row["plan"], row["part"], row["shardmerge"]) != (part.plan, part.number, __version__):
            return None
        crc = row["crc32"]
        return PartReceipt(
            part.number,
            text(row["sample"]),
            None if crc is None else whole(crc),
            _outcome(row, part),
            bool(row["synced"]),
            text(row["machine"]),
            float(str(row["began"])),
            float(str(row["seconds"])),
        )
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _outcome(row: Row, part: Part) -> Outcome:
    sums = zip(part.shard.tensors, listed(row["tensors"]), strict=True)
    cloned = {name: (text(file), whole(at)) for name, (file, at) in _pairs(row["cloned"])}
    read, reads, written, cloned_bytes = numbers(row["counts"])
    return Outcome(
        {name: whole(count) for name, count in fields(row["overflows"]).items()},
        {tensor.name: whole(one) for tensor, one in sums if one is not None},
        read,
        reads,
        written,
        cloned,
        cloned_bytes,
        float(str(row["clone_seconds"])),
        tuple(_record_of(listed(one), part) for one in listed(row["records"])),
        *_digests(row, part.shard),
    )


def _digests(row: Row, shard: PlannedShard) -> tuple[dict[str, str], dict[str, str]]:
    if row["sha256"] is None:
        return {}, {}
    found = zip(shard.tensors, texts(row["digests"]), strict=True)
    return {tensor.name: one for tensor, one in found}, {shard.name: text(row["sha256"])}


def _pairs(value: object) -> Iterator[tuple[str, list[object]]]:
    return ((name, listed(pair)) for name, pair in fields(value).items())


def _record_of(row: list[object], part: Part) -> RecordSums:
    file, offset, nbytes, crc, skimmed, sums = row
    spans = tuple((low, high, one) for low, high, one in map(numbers, listed(sums)))
    return RecordSums(part.files[whole(file)].path, whole(offset), whole(nbytes), whole(crc), spans, whole(skimmed))


def together(outcomes: list[Outcome]) -> Outcome:
    """Returns what was done to make several parts."""
    total = Outcome({}, {}, 0, 0, 0)
    for one in outcomes:
        total.overflows.update(one.overflows)
        total.checksums.update(one.checksums)
        total.cloned.update(one.cloned)
        total.digests.update(one.digests)
        total.file_digests.update(one.file_digests)
    return replace(
        total,
        bytes_read=sum(one.bytes_read for one in outcomes),
        reads=sum(one.reads for one in outcomes),
        bytes_written=sum(one.bytes_written for one in outcomes),
        bytes_cloned=sum(one.bytes_cloned for one in outcomes),
        clone_seconds=sum(one.clone_seconds for one in outcomes),
        records=tuple(record for one in outcomes for record in one.records),
    )
