"""The receipt in every finished directory: what was made of what, with which checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardmerge.errors import UsageError, VerificationError
from shardmerge.execute.engine import Outcome
from shardmerge.execute.frames import patched_blobs
from shardmerge.plan.shard import PlannedShard, tensor_json
from shardmerge.plan.value import Plan
from shardmerge.system_errors import about
from shardmerge.tensors.file_roles import RECEIPT
from shardmerge.version import __version__

FORMAT = "shardmerge receipt"

# Version of the receipt's shape. Those before 5 have no digest of themselves, and do not count what was cloned; those
# before 6 have no SHA-256 of files and tensors.
SCHEMA, _SEALED = 6, 5

# The line that holds the digest of all others. No text inside of JSON holds a line break: it cannot be in a value.
_SEAL = re.compile(rb'^ "sha256": "([0-9a-f]{64})",\n', re.MULTILINE)
_AFTER_SEAL = b'\n "shardmerge": '


def receipt_json(plan: Plan, outcome: Outcome, side_digests: dict[str, str], version: str) -> list[bytes]:
    """Returns the receipt as sorted JSON, in parts; no times, hosts or absolute paths: equal runs, equal receipts.

    Where something was cloned the receipt says so, so that of a run on another file system may differ there. The line
    ``"sha256"`` is the digest of the text without that line: ``grep -v '^ "sha256":' shardmerge.json | sha256sum``.
    """
    value = {
        "format": FORMAT,
        "schema": SCHEMA,
        "shardmerge": version,
        "plan": plan.id,
        "target": plan.target,
        "total_size": plan.tensor_bytes,
        "cloned": _cloned_json(plan, outcome),
        "digests": "sha256" if outcome.file_digests else None,
        "sources": {
            source.name: {
                "path": source.path,
                "kind": source.kind,
                "fingerprint": source.fingerprint,
                "notes": list(source.notes),
            }
            for source in plan.sources
        },
        "warnings": list(plan.warnings),
        "shards": {
            shard.name: {
                "nbytes": shard.nbytes,
                "frame_sha256": _frame_sha256(shard, outcome),
                **_sha256(outcome.file_digests, shard.name),
            }
            for shard in plan.shards
        },
        "side_files": side_digests,
        "tensors": {},
        "unused": [{"source": unused.source, "tensor": unused.name, "reason": unused.reason} for unused in plan.unused],
    }
    head, key, tail = f"{_text(value)}\n".partition(_NO_TENSORS)
    return _sealed([f"{head}{key[:-1]}".encode(), *_rows(plan, outcome), f"}}{tail}".encode()])


# As with the digest, this is the key itself.
_NO_TENSORS = '\n "tensors": {}'


def _text(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True)


def _cloned_json(plan: Plan, outcome: Outcome) -> dict[str, int]:
    sizes = [tensor.nbytes for tensor in plan.tensors() if tensor.name in outcome.cloned]
    return {"nbytes": sum(sizes), "tensors": len(sizes)}


def _sealed(pieces: list[bytes]) -> list[bytes]:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    line = f'\n "sha256": "{digest.hexdigest()}",'.encode()
    return [pieces[0].replace(_AFTER_SEAL, line + _AFTER_SEAL, 1), *pieces[1:]]


def _rows(plan: Plan, outcome: Outcome) -> Iterator[bytes]:
    """Yields the tensors by name as ``json.dumps`` of all of them writes them, in a tenth of its memory."""
    placed = sorted((tensor.name, shard.name, tensor) for shard in plan.shards for tensor in shard.tensors)
    for index, (name, shard, tensor) in enumerate(placed):
        row = tensor_json(tensor)
        del row["name"]
        row |= {"shard": shard, "stored": tensor.stored, **_proof(name, outcome)}
        if name in outcome.overflows:
            row["overflowed"] = outcome.overflows[name]
        text = _text(row).replace("\n", "\n  ")
        yield f"{',' if index else ''}\n  {json.dumps(name)}: {text}".encode()
    if placed:
        yield b"\n "


def _proof(name: str, outcome: Outcome) -> dict[str, object]:
    """The checksums of a tensor's bytes; of one that was cloned, whose bytes nobody wrote, where they are from."""
    digest = _sha256(outcome.digests, name)
    if name not in outcome.cloned:
        return {"crc32": f"{outcome.checksums[name]:08x}", **digest}
    file, offset = outcome.cloned[name]
    return {"cloned": {"file": file.rsplit("/", 1)[-1], "offset": offset}, **digest}


def _sha256(digests: Mapping[str, str], name: str) -> dict[str, str]:
    return {"sha256": digests[name]} if digests else {}


def _frame_sha256(shard: PlannedShard, outcome: Outcome) -> str:
    """The digest of all bytes of a file that are no tensor data."""
    digest = hashlib.sha256()
    for _, blob in patched_blobs(shard, outcome.checksums):
        digest.update(blob)
    return digest.hexdigest()


def read_receipt(folder: Path) -> Mapping[str, object]:
    """Reads the receipt of a published directory.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made.
    VerificationError
        ``damaged-receipt``: it was changed. ``newer-receipt``: a newer version wrote it.
    """
    try:
        with about(folder / RECEIPT):
            data = (folder / RECEIPT).read_bytes()
        value = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            "no-receipt",
            f"there is no {RECEIPT}: shardmerge did not make this directory",
            where=str(folder),
            hint="to compare it with another checkpoint: shardmerge diff A B",
        ) from None
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"the receipt is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise damaged(folder, "the receipt is not one of ours")
    _check_seal(folder, data, value)
    return value


def is_sealed(receipt: Mapping[str, object]) -> bool:
    """Tells whether a receipt has a digest of itself; those of the first versions have none."""
    return "sha256" in receipt or _schema(receipt) >= _SEALED


def stated_digests(receipt: Mapping[str, object]) -> object:
    """Returns which digests of files and tensors a receipt says that it has; those before schema 6 have none.

    Raises
    ------
    KeyError
        It does not say.
    """
    return receipt["digests"] if _schema(receipt) >= SCHEMA else None


def _schema(receipt: Mapping[str, object]) -> int:
    schema = receipt.get("schema")
    return schema if type(schema) is int else SCHEMA


def _check_seal(folder: Path, data: bytes, receipt: Mapping[str, object]) -> None:
    stated = _SEAL.findall(data)
    found = hashlib.sha256(_SEAL.sub(b"", data)).hexdigest().encode()
    if is_sealed(receipt) and stated != [found]:
        raise damaged(folder, "the receipt was changed: it does not have the SHA-256 that it states")
    if _schema(receipt) > SCHEMA:
        raise VerificationError(
            "newer-receipt",
            "the receipt was written by a newer version of shardmerge",
            where=str(folder / RECEIPT),
            found=f"schema {receipt['schema']}, shardmerge {receipt.get('shardmerge')}",
            expected=f"schema {SCHEMA}, shardmerge {__version__}",
        )


def damaged(folder: Path, what: str) -> VerificationError:
    """Returns the error of a receipt that cannot be used."""
    return VerificationError("damaged-receipt", what, where=str(folder / RECEIPT))
