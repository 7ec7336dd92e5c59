"""A mapping with all that it came to, short of a plan: its sources, what every target is made of, what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.errors import raise_all
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.same_names import keep_names, only_keeps_names
from shardmerge.mapping.spec import Spec
from shardmerge.prepare.expecting import codes_agree, expectation_of, idle_words, with_format_warning
from shardmerge.prepare.opened import open_mapping
from shardmerge.prepare.options import Options
from shardmerge.prepare.ready import Ready, make_ready
from shardmerge.prepare.side_files import SideFiles
from shardmerge.targets.expectation import Expectation
from shardmerge.tensors import Catalog


@dataclass(frozen=True, slots=True)
class Resolved:
    """A mapping with all that it came to, short of a plan.

    Attributes
    ----------
    spec
        Its preset combined with it.
    opened, merged
        The sources as they are, and without what is dropped, adapters merged.
    sides
        The small files that were read for it.
    """

    spec: Spec
    opened: Mapping[str, Catalog]
    merged: Mapping[str, Catalog]
    resolution: Resolution
    expectation: Expectation
    sides: SideFiles


def resolved(spec: Spec, folder: Path, options: Options, known: Mapping[str, Catalog] | None = None) -> Resolved:
    """Opens the sources of a mapping, but for those that are ``known``, and says what every target is made of.

    Raises as ``preparation.prepare``.
    """
    opened = open_mapping(spec, folder, options, known or {})
    ready = make_ready(opened)
    expectation = expectation_of(ready, ready.beside)
    raise_all(idle_words(opened.spec, expectation))
    expectation = with_format_warning(opened.spec, options, expectation)
    resolution = _resolution(ready, expectation)
    resolution = replace(resolution, dropped=tuple(sorted({*resolution.dropped, *ready.settled.dropped})))
    expectation = codes_agree(ready, resolution, expectation)
    told = ready.settled.told(ready.merged, (one.entry for one in resolution.assignments.values()))
    whole = expectation or _as_resolved(resolution)
    return Resolved(opened.spec, opened.catalogs, told, resolution, whole, opened.sides)


def _resolution(ready: Ready, expectation: Expectation | None) -> Resolution:
    spec = ready.opened.spec
    source = only_keeps_names(spec, ready.merged) if expectation is None or expectation.open else ""
    if source:
        return keep_names(spec.rules[0], source, ready.merged[source], ())
    from shardmerge.mapping.resolve import resolve  # a conversion that keeps every name starts without it

    return resolve(
        spec.rules,
        ready.dropped,
        ready.merged,
        expectation,
        user_file=spec.file,
        variables=ready.variables,
        merged=ready.used | ready.settled.used | ready.settled.dropped,
    )


def _as_resolved(resolution: Resolution) -> Expectation:
    return Expectation({name: assignment.entry.shape for name, assignment in resolution.assignments.items()})
