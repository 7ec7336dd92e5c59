"""Whether an adapter holds all that its config says it does. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shardmerge.adapters.base import Base
from shardmerge.adapters.names import Places
from shardmerge.adapters.parameters import unadapted_parameters
from shardmerge.adapters.parts import AdapterTensors
from shardmerge.errors import MappingError
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.adapter_config import last_names, layer_of
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def incomplete(
    config: AdapterConfig, parts: AdapterTensors, base: Base, places: Places, path: str
) -> Iterator[MappingError]:
    """Yields what the config promises and the tensors do not hold, and the reverse."""
    low_rank = [module for module, held in parts.modules.items() if set(held) != {"tokens"}]
    if config.targets and not low_rank:
        yield _missing(
            f"{ADAPTER_CONFIG} names target_modules, and no tensor is one of LoRA", list(config.targets), path
        )
    if config.targets and (gone := sorted(_left_unadapted(config, low_rank, base, places))):
        named = f"{count(len(gone), 'module')} that {ADAPTER_CONFIG} names"
        what = f"{named} have no tensors, though their like in other layers do"
        yield _missing(what, gone, path)
    if gone := sorted(unadapted_parameters(config, parts.modules, base, places)):
        yield _missing(f"{ADAPTER_CONFIG} says target_parameters, and some have no tensors", gone, path)
    if gone := sorted(_left_unsaved(config, parts, base, places)):
        yield _missing(f"{ADAPTER_CONFIG} says modules_to_save, and their weights are not there", gone, path)
    yield from _magnitudes(config, parts, low_rank, path)


def unweighable(weight: float, parts: AdapterTensors, spec: AdapterSpec) -> Iterator[MappingError]:
    """Yields why an adapter cannot count by a ``weight``: what it replaces whole is there or is not."""
    if weight == 1:
        return
    dora = [module for module, held in parts.modules.items() if "magnitude" in held]
    tokens = [module for module, held in parts.modules.items() if "tokens" in held]
    for what, names in (
        ("DoRA gives rows their length, of which there is no part", dora),
        ("modules_to_save and trained biases replace the base's, whole or not at all", sorted(parts.trained)),
        ("trained tokens replace rows of the base, whole or not at all", tokens),
    ):
        if names:
            yield MappingError(
                "adapter-setting",
                f"`weight: {weight:g}` cannot be: {what}: {listed(names, 3)}",
                where=str(spec.mark),
                hint="leave `weight:` out; or merge without it, and mix that model with the base by `op: linear`",
            )


def _missing(what: str, names: list[str], path: str) -> MappingError:
    return MappingError(
        "adapter-incomplete",
        f"{what}: {listed(names, 3)}",
        where=path,
        hint="fetch or save the adapter again, whole; if these were never trained, write the names that were into "
        f"{ADAPTER_CONFIG} (target_modules, modules_to_save)",
    )


def _left_unadapted(config: AdapterConfig, adapted: list[str], base: Base, places: Places) -> Iterator[str]:
    """Peft wraps every module that ``target_modules`` fits; of a kind that is adapted, all are."""
    known, kinds = set(adapted), {_NUMBER.sub("#", module) for module in adapted}
    nested = base.config.get("text_config")
    most = (nested if isinstance(nested, dict) else base.config).get("num_hidden_layers")
    for name in base.catalog.names():
        own = places.own(name)
        if own is None or not name.endswith(".weight"):
            continue
        module = own.removesuffix(".weight")
        if module in known or _NUMBER.sub("#", module) not in kinds or not last_names(module, config.targets):
            continue
        layer = layer_of(module)
        beyond = isinstance(most, int) and layer is not None and layer >= most  # layers of multi-token prediction
        if last_names(module, config.excluded) or beyond or (config.layers is not None and layer not in config.layers):
            continue
        yield module


def _left_unsaved(config: AdapterConfig, parts: AdapterTensors, base: Base, places: Places) -> Iterator[str]:
    """Names that the base does not have are peft's own additions (``classifier`` and ``score`` for every head)."""
    held = {one.rpartition(".")[0] for one in parts.whole}
    for name in base.catalog.entries:
        own = places.own(name)
        if own is None:
            continue
        module = own.rpartition(".")[0]
        if last_names(module, config.saved) and module not in parts.modules and module not in held:
            yield module


def _magnitudes(config: AdapterConfig, parts: AdapterTensors, low_rank: list[str], path: str) -> Iterator[MappingError]:
    if config.dora and (gone := [module for module in low_rank if "magnitude" not in parts.modules[module]]):
        yield _missing(
            f"{ADAPTER_CONFIG} says use_dora, and {count(len(gone), 'module')} have no magnitude", gone, path
        )
    if config.dora is False and (odd := [module for module in low_rank if "magnitude" in parts.modules[module]]):
        yield MappingError(
            "adapter-setting",
            f"{ADAPTER_CONFIG} says use_dora: false, and there are magnitudes of DoRA: {listed(odd, 3)}",
            where=path,
            hint=f"set use_dora to true in {ADAPTER_CONFIG}, if the run trained a DoRA",
        )
