"""Lazy streaming state-dict merger: training checkpoints to Hugging Face models in a few dozen MB of memory.

The public door. Everything here imports neither torch nor transformers.

    import shardmerge

    checkpoint = shardmerge.open_checkpoint("work_dirs/iter_5198.pth")
    checkpoint["llm.lm_head.weight"][:4]          # reads four rows

    shardmerge.run("mapping.yaml")                # what the command does
    merged = shardmerge.open_checkpoint("mapping.yaml")   # the same tensors, never written
"""

from __future__ import annotations

from shardmerge.api import convert, diff, inspect, open_checkpoint, plan, presets, run, verify
from shardmerge.conversion import Options, Result
from shardmerge.errors import (
    CheckpointError,
    InterruptedRunError,
    MappingError,
    OutputError,
    Problems,
    RefusedError,
    ResourceError,
    ShardmergeError,
    TargetError,
    UsageError,
    VerificationError,
)
from shardmerge.lazy import LazyCheckpoint, LazyTensor
from shardmerge.plan import Plan
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.verify import Difference, Verdict
from shardmerge.version import __version__

__all__ = [
    "Catalog",
    "CheckpointError",
    "Difference",
    "InterruptedRunError",
    "LazyCheckpoint",
    "LazyTensor",
    "MappingError",
    "Options",
    "OutputError",
    "Plan",
    "Problems",
    "RefusedError",
    "ResourceError",
    "Result",
    "ShardmergeError",
    "TargetError",
    "TensorEntry",
    "UsageError",
    "Verdict",
    "VerificationError",
    "__version__",
    "convert",
    "diff",
    "inspect",
    "open_checkpoint",
    "plan",
    "presets",
    "run",
    "verify",
]
