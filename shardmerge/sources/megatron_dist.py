"""Checkpoints of Megatron-core's format ``torch_dist``, and those of NeMo 2, which are the same.

    iter_0001000/{.metadata, __R_N.distcp, common.pt, metadata.json}

torch's distributed checkpoint of whole tensors: tensor and pipeline ranks leave no trace but in the chunks. Layers are
stacked in a leading axis unless they differ. ``common.pt`` has what is not sharded, the arguments of the run among it
(``megatron/core/dist_checkpointing``; seen: 0.16.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.json_limits import weighed
from shardmerge.sources.dcp import read_dcp
from shardmerge.sources.megatron import scalars
from shardmerge.sources.rank_files import MEGATRON_DIST
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import read_torch_file
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Fact

_LARGEST_JSON = 1 << 20


def is_megatron_dist(folder: Path) -> bool:
    """Tells whether a distributed checkpoint is one of Megatron's."""
    return all((folder / name).is_file() for name in MEGATRON_DIST)


def read_megatron_dist(folder: Path, root: str = "") -> Catalog:
    """Returns the catalog of one iteration, the run's arguments as facts.

    Raises
    ------
    CheckpointError
        ``kind-not-yet``: another backend than ``torch_dist``. And what ``read_dcp`` raises.
    """
    backend = _backend(folder / MEGATRON_DIST[1])
    if backend != "torch_dist":
        raise CheckpointError(
            "kind-not-yet",
            "this is a distributed checkpoint of Megatron in a format that is not read",
            where=str(folder / MEGATRON_DIST[1]),
            found=repr(backend),
            expected="torch_dist",
            hint="run Megatron's training command once more with --ckpt-convert-format torch_dist "
            "--ckpt-convert-save NEW_DIRECTORY, and pass that",
        )
    common = read_torch_file(folder / MEGATRON_DIST[0])
    catalog = read_dcp(folder, root)
    facts: Mapping[str, Fact] = scalars(as_dict(common.root).get("args"))
    kind = catalog.kind.replace("torch distributed checkpoint", "Megatron torch_dist")
    return replace(catalog, kind=kind, facts=facts, files=(*catalog.files, common.stamp))


def _backend(path: Path) -> str:
    with SourceFile(path) as file:
        raw = file.read(0, min(file.size, _LARGEST_JSON))
    try:
        value = json.loads(weighed(raw))
    except (ValueError, RecursionError):
        return ""
    return str(value.get("sharded_backend", ""))[:80] if isinstance(value, dict) else ""
