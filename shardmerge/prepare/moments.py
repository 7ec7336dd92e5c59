"""The optimizer of a run, taken along: ``--with-optimizer``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.compose import cast_to
from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.same_names import keeps_names
from shardmerge.mapping.spec import Spec
from shardmerge.plan.moments import KINDS, Moments
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options, output_settings
from shardmerge.prepare.resolved import Resolved
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.tensors import Catalog
from shardmerge.tensors.optimizer import OptimizerState, ParameterGroup

_FORMATS = ("dcp", "zero-universal")
# Kinds of catalogs whose readers know the moments.
_SOURCES = ("DeepSpeed", "torch distributed checkpoint")
_LEAVE_OUT = "leave --with-optimizer out (in a mapping, `optimizer`): the optimizer then begins anew"
# What every Adam has; a resumed run would otherwise go on with other ones.
_NEEDED = ("lr", "betas", "eps", "weight_decay")
_DECOUPLED = "decoupled_weight_decay"


def moments_of(found: Resolved, folder: Path, options: Options) -> Moments:
    """Returns the moments of the source of a mapping that keeps its names.

    Raises
    ------
    UsageError
        ``no-effect``: rules make other weights, or the format has no place for them. ``no-moments``: of the source no
        moments are read.
    CheckpointError
        ``no-moments``: it has none, or says too little of the optimizer.
    """
    form = output_settings(found.spec.output, options).format
    source, resolution = found.spec.sources[keeping_names(found.spec)], found.resolution
    opened = found.opened[source.name]
    if form not in _FORMATS:
        what = "the optimizer goes along to checkpoints that training goes on from: other formats hold none"
        hint = f"add --format dcp or --format zero-universal, in a mapping `format: dcp`; or {_LEAVE_OUT}"
        raise UsageError("no-effect", what, hint=hint)
    if not opened.kind.startswith(_SOURCES):
        raise UsageError(
            "no-moments",
            "the optimizer is read from checkpoints of DeepSpeed and torch's distributed checkpoints only",
            where=opened.path,
            found=opened.kind,
            hint=_LEAVE_OUT,
        )
    catalogs = {kind: open_source(replace(source, view=kind), folder, options) for kind in KINDS}
    raise_all(_misfits(opened, catalogs))
    kept = {
        kind: {name: one for name, one in catalog.entries.items() if name in resolution.assignments}
        for kind, catalog in catalogs.items()
    }
    told = catalogs[KINDS[0]].optimizer or OptimizerState()
    if any(group.settings.get("amsgrad") for group in told.groups):
        raise no_moments(opened.path, "AMSGrad has a third moment, without which it is another optimizer")
    optimizer = told.of(kept[KINDS[0]])
    files = tuple(dict.fromkeys(stamp for catalog in catalogs.values() for stamp in catalog.files))
    if form != "dcp":
        floats = {
            kind: {name: cast_to(one, DTYPES["F32"]) for name, one in mine.items()} for kind, mine in kept.items()
        }
        return Moments(floats, optimizer, files)
    raise_all(_unsaid(opened.path, optimizer))
    return Moments(kept, optimizer, files, tuple(_warnings(optimizer)))


def keeping_names(spec: Spec) -> str:
    """Returns the only source, of which every tensor keeps its name; raises ``no-effect`` where rules make others."""
    source = "" if spec.use else keeps_names(spec)
    if not source:
        what = "the optimizer goes along with weights that keep their names: rules make others"
        raise UsageError("no-effect", what, hint=f"{_LEAVE_OUT}, or convert without --use")
    return source


def _misfits(opened: Catalog, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    """A weight has both moments, of its own shape."""
    for name in dict.fromkeys(name for catalog in catalogs.values() for name in catalog.entries):
        shapes = [catalog[name].shape if name in catalog else None for catalog in catalogs.values()]
        if name in opened and any(shape != opened[name].shape for shape in shapes):
            yield no_moments(opened.path, f"those of {shown(name)} are {shown(shapes)}", f"two of {opened[name].shape}")


def _unsaid(where: str, optimizer: OptimizerState) -> Iterator[ShardmergeError]:
    """What the settings must say so that a step of torch's Adam is that of the run."""
    for number, group in enumerate(optimizer.groups):
        lacking = [key for key in _NEEDED if key not in group.settings]
        if lacking:
            yield _unfit(where, f"parameter group {number} does not say {shown(lacking)}")
        elif group.settings.get("bias_correction", True) is not True:
            yield _unfit(where, f"parameter group {number} has no bias correction, and Adam of torch always has it")


def _unfit(where: str, what: str) -> CheckpointError:
    hint = f"{_LEAVE_OUT}; or take --format zero-universal, whose trainer keeps its own settings"
    return CheckpointError("no-moments", f"torch cannot resume with this optimizer: {what}", where=where, hint=hint)


def _warnings(optimizer: OptimizerState) -> Iterator[str]:
    """Before 2.7 torch did not write whether weight decay is apart from the gradient, and no name or number tells."""
    if any(_leaves_open(group) for group in optimizer.groups):
        yield (
            f"the checkpoint does not say {_DECOUPLED} (AdamW or Adam), so the result does not: torch 2.7 and later "
            "load it with `planner=DefaultLoadPlanner(allow_partial_load=True)`, and keep the trainer's own"
        )


def _leaves_open(group: ParameterGroup) -> bool:
    return bool(group.names) and _DECOUPLED not in group.settings
