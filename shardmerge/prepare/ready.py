"""Sources as rules and targets see them: numbers where they are needed, nothing dropped, adapters merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.dropping import Dropped, find_dropped
from shardmerge.mapping.spec import Spec
from shardmerge.mapping.variables import Variables
from shardmerge.plan.planner import OutputSettings
from shardmerge.prepare.dequantizing import Dequantized, dequantized
from shardmerge.prepare.mapping_checks import target_of
from shardmerge.prepare.needs import Needs, needs_of, says_codes
from shardmerge.prepare.opened import Opened
from shardmerge.prepare.side_files import SideFiles
from shardmerge.targets.changed_config import changed_reader
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import PEFT_ADAPTER, Catalog, Extent


@dataclass(frozen=True, slots=True)
class Ready:
    """Sources as rules and targets see them.

    Attributes
    ----------
    opened, needs, dropped, settled
        What was opened, who needs numbers, what is dropped, what was dequantized.
    merged, used
        The sources without what is dropped, adapters merged; and the adapters' tensors that are part of bases now.
    beside
        The sources for targets, which look at what lies beside weights: files of adapters go before those of bases.
    changes
        What config.json of a base has to say otherwise.
    variables
        What formulas may name; its reader gives those changed files.
    """

    opened: Opened
    needs: Needs
    dropped: Dropped
    settled: Dequantized
    merged: dict[str, Catalog]
    used: frozenset[tuple[str, str]]
    beside: dict[str, Catalog]
    changes: dict[Extent, JsonObject]
    variables: Variables


def make_ready(opened: Opened) -> Ready:
    """Returns the sources of a mapping, ready for its rules and its target; raises all that is wrong with them."""
    spec, catalogs, sides = opened.spec, opened.catalogs, opened.sides
    needs, dropped = _needs(spec, catalogs, opened.output), find_dropped(spec.drops, catalogs)
    settled = dequantized(catalogs, needs, sides.read)
    merged, used, changes = _merged(spec, settled.catalogs, dropped, sides, typed=opened.output.dtype is not None)
    beside = {name: _for_targets(one, merged[name]) for name, one in settled.catalogs.items()}
    variables = Variables(beside, changed_reader(changes, sides.read), spec.variables)
    return Ready(opened, needs, dropped, settled, merged, used, beside, changes, variables)


def _for_targets(opened: Catalog, merged: Catalog) -> Catalog:
    """A base has the shapes that it was opened with; an adapter is what it became with the others combined with it."""
    return merged if merged.kind == PEFT_ADAPTER else replace(opened, side_files=merged.side_files)


def _needs(spec: Spec, catalogs: Mapping[str, Catalog], output: OutputSettings) -> Needs:
    """Quantized sources are copied as they are into a target that takes codes, or where there is none."""
    cast = output.dtype or next((dtype for _, dtype in output.dtypes if dtype is not None), None)
    target = target_of(spec.target) if spec.target else None
    closed = target.name if target is not None and not target.codes else ""
    published = {spec.target.roles.get("text", "text")} if spec.target and not closed else set[str]()
    published = {name for name in published if name in catalogs and says_codes(catalogs[name])}
    return needs_of(spec, catalogs, str(cast or ""), published, closed)


def _merged(
    spec: Spec, catalogs: Mapping[str, Catalog], dropped: Dropped, sides: SideFiles, *, typed: bool
) -> tuple[dict[str, Catalog], frozenset[tuple[str, str]], dict[Extent, JsonObject]]:
    """Returns what is left of the catalogs, all adapters merged into their bases, the tensors so used up, and what the
    bases' config.json have to say otherwise.
    """
    left = dropped.left(catalogs)
    if not spec.adapters:
        return left, frozenset(), {}
    from shardmerge.adapters.combining import onto_adapters
    from shardmerge.adapters.merging import merge_adapters

    try:
        specs, left, joined = onto_adapters(spec.adapters, left, sides.read)
        merged = merge_adapters(specs, left, sides.read, typed=typed)
    except ShardmergeError as error:
        raise_all([_without_dropped_base(one, dropped) for one in error.each()])
        raise
    changes = {catalogs[name].side_files["config.json"]: changed for name, changed in merged.configs.items()}
    return merged.catalogs, merged.used | joined, changes


def _without_dropped_base(error: ShardmergeError, dropped: Dropped) -> ShardmergeError:
    """Says of an adapter whose base tensor is missing that it was dropped."""
    source, _, name = error.expected.partition(":")
    said = dropped.said(source, name)
    if error.code != "adapter-without-base" or not said:
        return error
    hint = "take that line out of `drop`, or drop the adapter's tensors of this module too"
    return MappingError(error.code, error.what, where=error.where, found=f"{error.expected} is {said}", hint=hint)
