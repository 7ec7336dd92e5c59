"""The receipt in every finished directory: what was made of what, with which checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardmerge.errors import UsageError, VerificationError
from shardmerge.execute.engine import Outcome
from shardmerge.plan.identity import SCHEMA
from shardmerge.plan.shard import PlannedShard, tensor_json
from shardmerge.plan.value import Plan
from shardmerge.publish.part_receipts import patched_blobs
from shardmerge.tensors.file_roles import RECEIPT

FORMAT = "shardmerge receipt"


def receipt_json(plan: Plan, outcome: Outcome, side_digests: dict[str, str], version: str) -> list[bytes]:
    """Returns the receipt as sorted JSON, in parts; no times, hosts or absolute paths: equal runs, equal receipts.

    Where something was cloned the receipt says so, so that of a run on another file system may differ there.
    """
    value = {
        "format": FORMAT,
        "schema": SCHEMA,
        "shardmerge": version,
        "plan": plan.id,
        "target": plan.target,
        "total_size": plan.tensor_bytes,
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
            shard.name: {"nbytes": shard.nbytes, "frame_sha256": _frame_sha256(shard, outcome)} for shard in plan.shards
        },
        "side_files": side_digests,
        "tensors": {},
        "unused": [{"source": unused.source, "tensor": unused.name, "reason": unused.reason} for unused in plan.unused],
    }
    head, key, tail = f"{_text(value)}\n".partition(_NO_TENSORS)
    return [f"{head}{key[:-1]}".encode(), *_rows(plan, outcome), f"}}{tail}".encode()]


# No text inside of JSON holds a line break, so this is the key itself.
_NO_TENSORS = '\n "tensors": {}'


def _text(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True)


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
    """The checksum of a tensor's bytes; of one that was cloned, whose bytes nobody saw, where they are from."""
    if name not in outcome.cloned:
        return {"crc32": f"{outcome.checksums[name]:08x}"}
    file, offset = outcome.cloned[name]
    return {"cloned": {"file": file.rsplit("/", 1)[-1], "offset": offset}}


def _frame_sha256(shard: PlannedShard, outcome: Outcome) -> str:
    """The digest of all bytes of a file that are no tensor data."""
    digest = hashlib.sha256()
    for _, blob in patched_blobs(shard, outcome):
        digest.update(blob)
    return digest.hexdigest()


def read_receipt(folder: Path) -> Mapping[str, object]:
    """Reads the receipt of a published directory.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made.
    VerificationError
        ``damaged-receipt``.
    """
    path = folder / RECEIPT
    try:
        value = json.loads(path.read_text("utf-8"))
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
    return value


def damaged(folder: Path, what: str) -> VerificationError:
    """Returns the error of a receipt that cannot be used."""
    return VerificationError("damaged-receipt", what, where=str(folder / RECEIPT))
