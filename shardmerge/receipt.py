"""The receipt in every finished directory: what was made of what, with which checksums."""

from __future__ import annotations

import hashlib
import json

from shardmerge.execute.engine import Outcome
from shardmerge.plan import SCHEMA, Plan, tensor_json

FORMAT = "shardmerge receipt"


def receipt_json(plan: Plan, outcome: Outcome, side_digests: dict[str, str], version: str) -> bytes:
    """Returns the receipt as sorted JSON; no times, hosts or absolute paths, so equal runs give equal receipts."""
    value = {
        "format": FORMAT,
        "schema": SCHEMA,
        "shardmerge": version,
        "plan": plan.id,
        "target": plan.target,
        "total_size": plan.tensor_bytes,
        "sources": {
            source.name: {"path": source.path, "kind": source.kind, "fingerprint": source.fingerprint}
            for source in plan.sources
        },
        "shards": {
            shard.name: {"nbytes": shard.nbytes, "header_sha256": hashlib.sha256(shard.header).hexdigest()}
            for shard in plan.shards
        },
        "side_files": side_digests,
        "tensors": {
            tensor.name: {
                **{key: value for key, value in tensor_json(tensor).items() if key != "name"},
                "shard": shard.name,
                "crc32": f"{outcome.checksums[tensor.name]:08x}",
                **({"overflowed": outcome.overflows[tensor.name]} if tensor.name in outcome.overflows else {}),
            }
            for shard in plan.shards
            for tensor in shard.tensors
        },
        "unused": [{"source": unused.source, "tensor": unused.name, "reason": unused.reason} for unused in plan.unused],
    }
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
