"""``layer_replication``: a model of more layers than its base, each with an adapter of its own. Pure.

peft repeats the layers of the base in the order that the config says, shares their weights, and adapts every copy
(``replicate_layers``, peft 0.21). A merged model has each copy on its own.
"""

from __future__ import annotations

import re
from dataclasses import replace

from shardmerge.adapters.base import Base
from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Catalog

# Where LLaMA and its kin, BERT, and Falcon have their layers, as peft looks for them.
_LAYER = re.compile(r"(?P<head>(?:.*\.)?(?:layers|encoder\.layer|h)\.)(?P<number>\d{1,6})(?P<rest>\..+)")
_COUNT = "num_hidden_layers"


def replicated(base: Base, layers: tuple[tuple[int, int], ...], spec: AdapterSpec) -> Base:
    """Returns a base with the layers that an adapter's config says; ``layers`` are ranges ``[start, end)``.

    Raises
    ------
    MappingError
        ``adapter-setting``: the base has no such layers, or none that its config counts. ``adapters-clash``: another
        adapter was merged before, whose layers were numbered otherwise.
    """
    order = [layer for first, last in layers for layer in range(first, last)]
    have = base.config.get(_COUNT)
    heads = sorted({match["head"] for name in base.before.names() if (match := _LAYER.fullmatch(name))})
    if base.changed_by or base.replaced_by or base.changes:
        raise MappingError(
            "adapters-clash",
            "layer_replication renumbers the layers, and another adapter was merged before",
            where=str(spec.mark),
            hint="merge it alone and first, and use the result as the base of the others",
        )
    if not isinstance(have, int) or len(heads) != 1 or max(order) >= have:
        raise MappingError(
            "adapter-setting",
            "layer_replication does not fit the base",
            where=str(spec.mark),
            found=f"{_COUNT} {have}, layers below {listed(heads) or 'nothing'}",
            expected=f"one list of layers, with numbers up to {max(order)}",
            hint=f"name as `{base.name}` the model that the adapter was trained on",
        )
    done = replace(
        base,
        catalog=_repeated(base.catalog, order),
        before=_repeated(base.before, order),
        changes={**base.changes, **_counts(base.config, have, order)},
    )
    text = f"layer_replication: {len(order)} layers of the base's {have}: config.json says {_COUNT}: {len(order)}"
    return done.with_words((), (text,))


def _repeated(catalog: Catalog, order: list[int]) -> Catalog:
    shared = [alias for alias in catalog.aliases if _LAYER.fullmatch(alias)]
    names = [*catalog.entries, *shared]
    entries = {copy: replace(catalog[name], name=copy) for name in names for copy in _copies(name, order)}
    aliases = {alias: name for alias, name in catalog.aliases.items() if alias not in shared and name in entries}
    return replace(catalog, entries=entries, aliases=aliases)


def _copies(name: str, order: list[int]) -> list[str]:
    match = _LAYER.fullmatch(name)
    if match is None:
        return [name]
    return [
        f"{match['head']}{place}{match['rest']}" for place, layer in enumerate(order) if layer == int(match["number"])
    ]


def _counts(config: JsonObject, have: int, order: list[int]) -> JsonObject:
    """What the config counts by layers: their number, and lists of one item a layer."""
    lists = {
        key: [value[layer] for layer in order]
        for key, value in config.items()
        if key.endswith("layer_types") and isinstance(value, list) and len(value) == have
    }
    return {_COUNT: len(order), **lists}
