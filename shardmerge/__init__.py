"""Lazy streaming state-dict merger: training checkpoints to Hugging Face models in a few dozen MB of memory.

This module is the public interface. It imports neither torch nor transformers.

    import shardmerge

    checkpoint = shardmerge.open_checkpoint("work_dirs/iter_5198.pth")
    checkpoint["llm.lm_head.weight"][:4]          # reads four rows

    shardmerge.run("mapping.yaml")                # the same as the command
    merged = shardmerge.open_checkpoint("mapping.yaml")   # the same tensors without writing them
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from shardmerge.version import __version__

if TYPE_CHECKING:
    from shardmerge.api import attest, clean, convert, diff, open_checkpoint, plan, presets, report, run, verify
    from shardmerge.errors import (
        CheckpointError,
        InterruptedRunError,
        MappingError,
        OutputError,
        Problems,
        PublishedError,
        RefusedError,
        ResourceError,
        ShardmergeError,
        TargetError,
        UsageError,
        VerificationError,
    )
    from shardmerge.lazy import LazyCheckpoint, LazyTensor
    from shardmerge.plan.value import Plan
    from shardmerge.prepare.inspection import inspect, layout_of, matching
    from shardmerge.prepare.options import Options
    from shardmerge.publish.closeness import Closeness, Distance
    from shardmerge.publish.comparing import Comparison, Difference
    from shardmerge.publish.results import Result
    from shardmerge.publish.verify import Verdict
    from shardmerge.tensors import Catalog, TensorEntry

__all__ = [
    "Catalog",
    "CheckpointError",
    "Closeness",
    "Comparison",
    "Difference",
    "Distance",
    "InterruptedRunError",
    "LazyCheckpoint",
    "LazyTensor",
    "MappingError",
    "Options",
    "OutputError",
    "Plan",
    "Problems",
    "PublishedError",
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
    "attest",
    "clean",
    "convert",
    "diff",
    "inspect",
    "layout_of",
    "matching",
    "open_checkpoint",
    "plan",
    "presets",
    "report",
    "run",
    "verify",
]

# Where a public name is made. `--help` needs none of these modules, and `inspect` a third of them.
_MODULES = {
    "shardmerge.api": ("attest", "clean", "convert", "diff", "open_checkpoint", "presets", "report", "run", "verify"),
    "shardmerge.plan": ("plan",),  # a package that can be called: see there
    "shardmerge.prepare.options": ("Options",),
    "shardmerge.publish.results": ("Result",),
    "shardmerge.errors": (
        "CheckpointError",
        "InterruptedRunError",
        "MappingError",
        "OutputError",
        "Problems",
        "PublishedError",
        "RefusedError",
        "ResourceError",
        "ShardmergeError",
        "TargetError",
        "UsageError",
        "VerificationError",
    ),
    "shardmerge.prepare.inspection": ("inspect", "layout_of", "matching"),
    "shardmerge.lazy": ("LazyCheckpoint", "LazyTensor"),
    "shardmerge.plan.value": ("Plan",),
    "shardmerge.tensors": ("Catalog", "TensorEntry"),
    "shardmerge.publish.closeness": ("Closeness", "Distance"),
    "shardmerge.publish.comparing": ("Comparison", "Difference"),
    "shardmerge.publish.verify": ("Verdict",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


class _Door(ModuleType):
    """The package: public names are imported when they are first asked for."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = import_module(_HOMES[name])
        value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*__all__, *super().__dir__()})


sys.modules[__name__].__class__ = _Door
