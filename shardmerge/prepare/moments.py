"""The optimizer of a run, taken along: ``--with-optimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.errors import UsageError
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.spec import SourceSpec
from shardmerge.plan.universal_layout import KINDS, NO_MOMENTS, Moments
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.prepare.side_files import SideFiles
from shardmerge.prepare.unwrapping import without_wrapper
from shardmerge.tensors import Catalog, TensorEntry


def moments_of(source: SourceSpec, opened: Catalog, resolution: Resolution, options: Options) -> Moments:
    """Returns the moments of a source whose tensors keep their names, where they are asked for.

    Raises
    ------
    UsageError
        ``no-effect``: the format has no place for them. ``no-moments``: the source is no ZeRO checkpoint.
    CheckpointError
        ``no-moments``: it has none.
    """
    if not options.optimizer:
        return NO_MOMENTS
    if options.format != "zero-universal":
        what = "--with-optimizer is for a universal checkpoint: other formats hold no optimizer"
        raise UsageError("no-effect", what, hint="add --format zero-universal, or leave --with-optimizer out")
    if not opened.kind.startswith("DeepSpeed"):
        raise UsageError(
            "no-moments",
            "the optimizer is read of ZeRO checkpoints of DeepSpeed alone",
            where=opened.path,
            found=opened.kind,
            hint="leave --with-optimizer out: the optimizer then begins anew",
        )
    catalogs = {kind: _catalog(replace(source, view=kind), options) for kind in KINDS}
    step = float(catalogs[KINDS[0]].facts["step"])
    return Moments(step, {kind: _kept(catalog, resolution) for kind, catalog in catalogs.items()})


def _catalog(source: SourceSpec, options: Options) -> Catalog:
    return without_wrapper(open_source(source, Path(), options), SideFiles())[0]


def _kept(catalog: Catalog, resolution: Resolution) -> Mapping[str, TensorEntry]:
    return {name: entry for name, entry in catalog.entries.items() if name in resolution.assignments}
