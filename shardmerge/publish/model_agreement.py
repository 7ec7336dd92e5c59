"""What the configs of a finished directory say of the tensors beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardmerge.errors import ShardmergeError, VerificationError
from shardmerge.prepare.publishable import describe
from shardmerge.publish.held_files import HeldTensors
from shardmerge.publish.recorded import Recorded
from shardmerge.storage.reading import read_whole
from shardmerge.targets.agreement import INCOMPLETE, disagreements
from shardmerge.tensors.file_roles import CONFIG


def model_problems(folder: Path, held: Mapping[str, HeldTensors], receipt: Recorded) -> Iterator[ShardmergeError]:
    """Every config.json against the shards beside it, unless a part of a model is what was asked for."""
    for name in receipt.side_files:
        place, _, base = name.rpartition("/")
        config = _config(folder / name) if base == CONFIG else None
        beside = [entries for shard, entries in held.items() if shard.rpartition("/")[0] == place]
        entries = {key: entry for shard in beside for key, entry in shard.items()}
        if config is None or not entries:
            continue
        for error in disagreements(describe(config, str(folder / name), entries)):
            if not (receipt.partial and error.code == INCOMPLETE):
                fields = {"where": error.where, "found": error.found, "expected": error.expected}
                yield VerificationError(error.code, error.what, **fields, hint="convert again, from sources that agree")


def _config(path: Path) -> dict[str, object] | None:
    """Returns a config, or None for a file that says nothing that could be compared."""
    try:
        value = json.loads(read_whole(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
