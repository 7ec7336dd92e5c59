"""What is merged into what: adapters one by one, or several combined first; and runs that hold their base. Pure.

Merged one after the other, adapters add up: peft's ``combination_type="cat"``, and its adapters active side by side.
Its ``linear`` is another sum: A and B are each added up, and multiplied then, so that parts of one adapter meet parts
of another (peft 0.21, ``LoraModel._generalized_task_arithmetic_weighted_adapter``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge.adapters.combining import combined, way_of
from shardmerge.adapters.held import held_base
from shardmerge.errors import ShardmergeError
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.tensors import Catalog, ReadSideFile


@dataclass(frozen=True, slots=True)
class AdapterJob:
    """An adapter and where it goes.

    Attributes
    ----------
    spec, adapter
        As the mapping says, or the combination of several.
    held
        The base, where the adapter's own checkpoint holds it.
    also
        (source, name) of the tensors that it was combined of.
    """

    spec: AdapterSpec
    adapter: Catalog
    held: Catalog | None = None
    also: frozenset[tuple[str, str]] = frozenset()


def jobs(
    specs: Sequence[AdapterSpec],
    catalogs: Mapping[str, Catalog],
    read: ReadSideFile,
    problems: list[ShardmergeError],
    *,
    typed: bool,
) -> Iterator[AdapterJob]:
    """Yields what is to be merged, in the order of the mapping; what is wrong goes to ``problems``."""
    there = [spec for spec in specs if spec.source.source in catalogs and spec.onto.source in catalogs]
    done = set[tuple[str, str]]()
    helds: dict[str, Catalog | None] = {}
    for spec in there:  # one that is not there was declared `required: false`
        try:
            way = way_of(spec)
            if way == "linear" and _onto(spec) in done:
                continue
            if way == "linear":
                done.add(_onto(spec))
                yield _combined(
                    [one for one in there if _onto(one) == _onto(spec) and way_of(one) == way], catalogs, read
                )
                continue
            adapter, base = catalogs[spec.source.source], catalogs[spec.onto.source]
            own = adapter.path == base.path
            if own and spec.onto.source not in helds:
                helds[spec.onto.source] = held_base(base, spec.onto.template, typed=typed)
            yield AdapterJob(spec, adapter, helds[spec.onto.source] if own else None)
        except ShardmergeError as error:
            problems += error.each()


def _onto(spec: AdapterSpec) -> tuple[str, str]:
    return spec.onto.source, spec.onto.template.text


def _combined(specs: Sequence[AdapterSpec], catalogs: Mapping[str, Catalog], read: ReadSideFile) -> AdapterJob:
    made = combined(specs, "linear", catalogs, read)
    said = {"alpha": str(made.rank), **({"fan_in_fan_out": "true"} if made.fan_in_fan_out else {})}
    first = replace(specs[0], settings=said, source=replace(specs[0].source, template=Template.parse("{rest...}")))
    return AdapterJob(first, made.catalog, also=made.used)
