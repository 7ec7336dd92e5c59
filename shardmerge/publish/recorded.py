"""What a receipt says of files and tensors, each value looked at: the digest of a receipt is no signature."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardmerge.dtypes import DTYPES, DType
from shardmerge.plan.json_values import Row, fields, natural, naturals, text, texts
from shardmerge.plan.soundness import check_names
from shardmerge.prepare.publishable import PARTIAL
from shardmerge.publish.receipt import damaged, is_sealed, read_receipt, stated_digests

_CRC32, _SHA256 = re.compile("[0-9a-f]{8}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RecordedTensor:
    """A tensor of a result, as its receipt describes it.

    Attributes
    ----------
    name, stored
        In the model, and in the file.
    shard, offset, nbytes
        Where it lies.
    dtype, shape
        What it is.
    crc32
        Of its bytes, in hexadecimal; ``""`` where it was cloned.
    sha256
        Of its bytes, in hexadecimal; ``""`` where none was taken.
    """

    name: str
    stored: str
    shard: str
    offset: int
    nbytes: int
    dtype: DType
    shape: tuple[int, ...]
    crc32: str
    sha256: str

    @property
    def summed(self) -> bool:
        """Whether anything says what its bytes were."""
        return bool(self.crc32 or self.sha256)


@dataclass(frozen=True, slots=True)
class RecordedShard:
    """A file of weights.

    Attributes
    ----------
    nbytes
        Its size.
    frame_sha256, sha256
        In hexadecimal: of all of its bytes that are no tensor data; and of all of its bytes, ``""`` if none was taken.
    """

    nbytes: int
    frame_sha256: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a receipt says of a result.

    Attributes
    ----------
    plan
        Id of the plan.
    sealed
        Whether the receipt has a digest of itself.
    partial
        Whether a part of a model was asked for.
    shards, side_files, tensors
        By name; of a side file its SHA-256 (hex).
    within
        The tensors of each file of weights.
    """

    plan: str
    sealed: bool
    partial: bool
    shards: Mapping[str, RecordedShard]
    side_files: Mapping[str, str]
    tensors: Mapping[str, RecordedTensor]
    within: Mapping[str, Sequence[RecordedTensor]]

    @property
    def digested(self) -> bool:
        """Whether it has the SHA-256 of every file and tensor."""
        return any(shard.sha256 for shard in self.shards.values())

    def files(self) -> set[str]:
        """Returns the names of all files."""
        return {*self.shards, *self.side_files}


def read_recorded(folder: Path) -> Recorded:
    """Reads the receipt of a published directory.

    Raises
    ------
    UsageError
        ``no-receipt``.
    VerificationError
        ``damaged-receipt``: it was changed, or contradicts itself. ``newer-receipt``.
    """
    receipt = read_receipt(folder)
    try:
        found = _recorded(receipt)
        _check_places(found)
        _check_digests(found, stated_digests(receipt))
        if found.sealed:
            _check_cloned(found, fields(receipt["cloned"]))
    except KeyError as error:
        raise damaged(folder, f"the receipt does not state {error}") from error
    except ValueError as error:
        raise damaged(folder, f"the receipt contradicts itself: {error}"[:300]) from error
    return found


def _recorded(receipt: Mapping[str, object]) -> Recorded:
    shards = {name: _shard(fields(row)) for name, row in fields(receipt["shards"]).items()}
    side_files = {name: text(digest) for name, digest in fields(receipt["side_files"]).items()}
    check_names([*shards, *side_files])
    tensors = {name: _tensor(name, fields(row)) for name, row in fields(receipt["tensors"]).items()}
    partial = any(one.startswith(PARTIAL) for one in texts(receipt["warnings"]))
    within: dict[str, list[RecordedTensor]] = {name: [] for name in shards}
    for tensor in tensors.values():
        within[tensor.shard].append(tensor)
    return Recorded(text(receipt["plan"]), is_sealed(receipt), partial, shards, side_files, tensors, within)


def _shard(row: Row) -> RecordedShard:
    return RecordedShard(natural(row["nbytes"]), text(row["frame_sha256"]), _digest(row))


def _digest(row: Row) -> str:
    """Returns a SHA-256, or ``""`` where none was taken."""
    sha256 = text(row["sha256"]) if "sha256" in row else ""
    if "sha256" in row and not _SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256[:80]!r} is no SHA-256")
    return sha256


def _tensor(name: str, row: Row) -> RecordedTensor:
    dtype, shape, nbytes = text(row["dtype"]), naturals(row["shape"]), natural(row["nbytes"])
    if dtype not in DTYPES or prod(shape) * DTYPES[dtype].itemsize != nbytes:
        raise ValueError(f"{name} is no {dtype} of shape {list(shape)} with {nbytes} bytes")
    return RecordedTensor(
        name, text(row["stored"]), text(row["shard"]), natural(row["offset"]), nbytes, DTYPES[dtype], shape,
        _checksum(name, row), _digest(row),
    )  # fmt: skip


def _checksum(name: str, row: Row) -> str:
    """Returns the checksum of a tensor, or ``""`` of one that is stated to be cloned."""
    if "crc32" not in row:
        cloned = fields(row["cloned"])
        text(cloned["file"]), natural(cloned["offset"])
        return ""
    crc32 = text(row["crc32"])
    if not _CRC32.fullmatch(crc32):
        raise ValueError(f"the checksum of {name} is no CRC-32")
    return crc32


def _check_places(found: Recorded) -> None:
    """Raises ValueError where two tensors lie at one place of a file, or one behind its end."""
    for shard, tensors in found.within.items():
        end = 0
        for tensor in sorted(tensors, key=lambda one: (one.offset, one.nbytes)):
            if tensor.nbytes and tensor.offset < end:
                raise ValueError(f"{tensor.name} lies where another tensor lies")
            end = max(end, tensor.offset + tensor.nbytes)
        if end > found.shards[shard].nbytes:
            raise ValueError(f"a tensor ends behind the end of {shard}")


def _check_digests(found: Recorded, stated: object) -> None:
    """Raises ValueError where not all files and tensors have the digests that were taken, or some that were not."""
    if stated not in (None, "sha256"):
        raise ValueError(f"digests are sha256 or none, not {str(stated)[:80]}")
    digests = [(name, shard.sha256) for name, shard in found.shards.items()]
    digests += [(tensor.name, tensor.sha256) for tensor in found.tensors.values()]
    for name, sha256 in digests:
        if bool(sha256) != (stated is not None):
            raise ValueError(f"{name} has {'a' if sha256 else 'no'} SHA-256")


def _check_cloned(found: Recorded, stated: Row) -> None:
    cloned = [tensor.nbytes for tensor in found.tensors.values() if not tensor.crc32]
    if (natural(stated["tensors"]), natural(stated["nbytes"])) != (len(cloned), sum(cloned)):
        raise ValueError(f"{len(cloned)} tensors have no checksum, and {stated['tensors']} were cloned")
