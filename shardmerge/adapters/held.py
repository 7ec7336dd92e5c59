"""The base that a training checkpoint holds itself, below and beside its adapter. Pure.

A LoRA run that saves its whole state (DeepSpeed by default, torch's distributed checkpoints, FSDP's full state dict,
``model.state_dict()``) has every weight of the model. peft calls the weight below an adapter ``base_layer.weight``
(before 0.6 ``weight``), and that below a module trained whole ``original_module.weight``.
"""

from __future__ import annotations

import re
from dataclasses import replace

from shardmerge.adapters.roots import behind
from shardmerge.adapters.types import as_frozen
from shardmerge.mapping.pattern import Template
from shardmerge.tensors import PEFT_ADAPTER, Catalog, TensorEntry

_ADAPTED = re.compile(r"(?P<module>.+)\.(?:lora_\w+|modules_to_save|token_adapter(?!\.base_layer))(?:\.|$)")
_BELOW = re.compile(r"\.(?:(?:token_adapter\.)?base_layer|original_module)\.")


def held_base(catalog: Catalog, onto: Template, *, typed: bool = False) -> Catalog | None:
    """Returns the base that a checkpoint of a LoRA run holds, under its own names; None where it does not hold all.

    Parameters
    ----------
    catalog
        Of the run.
    onto
        What stands around the model's names in the base: names of the result are those that it makes.
    typed
        Whether the output has a type of its own; otherwise all gets the type of what was frozen.

    Notes
    -----
    Tensors that are not below peft's prefix keep their names.
    """
    if catalog.kind == PEFT_ADAPTER:
        return None
    plain = behind(catalog, onto)
    adapted = {match["module"] for rest in plain.values() if (match := _ADAPTED.match(rest)) is not None}
    base = {name: _BELOW.sub(".", rest) for name, rest in plain.items() if _ADAPTED.match(rest) is None}
    have = {rest.rpartition(".")[0] for name, rest in base.items() if name not in catalog.absent}
    if not adapted or not adapted <= have:
        return None
    names = {name: onto.format({"rest": rest}) for name, rest in base.items()}
    names |= {name: name for name in (*catalog.names(), *catalog.absent) if name not in plain}
    found = _renamed(catalog, names)
    return found if typed else as_frozen(found)


def _renamed(catalog: Catalog, names: dict[str, str]) -> Catalog:
    """Returns the catalog with the names that are left; an alias whose owner is gone becomes a tensor of its own."""
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    for name, entry in catalog.entries.items():
        if name in names:
            entries[names[name]] = replace(entry, name=names[name])
    for alias, owner in catalog.aliases.items():
        if alias not in names or names[alias] in entries:
            continue
        if owner in names:
            aliases[names[alias]] = names[owner]
        else:
            entries[names[alias]] = replace(catalog[owner], name=names[alias])
    absent = frozenset(names[name] for name in catalog.absent if name in names)
    return replace(catalog, entries=entries, aliases=aliases, absent=absent)
