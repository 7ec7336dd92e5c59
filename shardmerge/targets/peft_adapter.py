"""Names, shapes and adapter_config.json of an adapter as peft saves it.

File names, keys and fields follow peft 0.11 to 0.21 (``get_peft_model_state_dict``, ``LoraConfig``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from shardmerge.errors import TargetError
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Catalog, Shape
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

ROOT = "base_model.model."
STEM = "adapter_model"

# ...q_proj.lora_A.default.weight and its kin: the module, the kind, the adapter's name where the key has one.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>[^.]+)")
# Rows of an embedding that were trained, and whatever else is no weight of the model.
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
OF_ADAPTERS = re.compile(r"\.(?:lora_\w+|modules_to_save|token_adapter\.(?!base_layer\.)\w+)(?:\.|$)")
# What a full dump holds beside an adapter: the base's own weights under the names of the wrapped module.
_BASE = (".base_layer.weight", ".original_module.weight", ".original_module.bias")


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether any of these names is one of a LoRA adapter."""
    return any(".lora_" in name for name in names)


def saved_name(name: str) -> str:
    """Returns the key that peft saves for a parameter of a wrapped model: without the adapter's name.

    ``base_model.model.x.lora_A.default.weight`` is saved as ``base_model.model.x.lora_A.weight``, and a module of
    ``modules_to_save`` under its plain name. A magnitude vector has no ``.weight``, whichever peft trained it.
    """
    if (match := _WHOLE.fullmatch(name)) is not None:
        return f"{match['module']}.{match['leaf']}"
    if (match := _TOKENS.fullmatch(name)) is not None:
        return f"{match['module']}.token_adapter.trainable_tokens_delta"
    if (match := _PART.fullmatch(name)) is not None:
        leaf = "" if match["kind"] == "lora_magnitude_vector" else match["leaf"] or ""
        return f"{match['module']}.{match['kind']}{leaf}"
    return name


def adapter_tensors(
    catalog: Catalog, prefix: str = "", gone: Collection[str] = (), *, biases: str = "none", adapter: str = ""
) -> dict[str, Shape]:
    """Returns the keys and shapes that peft saves for an adapter.

    Parameters
    ----------
    catalog
        Of the training: the wrapped model's parameters, or keys as peft saves them.
    prefix
        What stands in front of ``base_model.model.``, e.g. ``llm.``.
    gone
        Names that the user drops.
    biases
        peft's ``bias``: ``none``, ``lora_only`` or ``all`` of the base's were trained.
    adapter
        Which one, where the names of the run say it; what has no such name is of every one.
    """
    start = prefix + ROOT
    left = {*tensors_of_the_base(catalog, start, biases=biases), *gone}
    if adapter:
        left.update(name for name in catalog.names() if (adapter_of(name) or adapter) != adapter)
    names = [name for name in catalog.names() if name.startswith(start) and name not in left]
    return {saved_name(name.removeprefix(prefix)): catalog[name].shape for name in names}


def adapter_of(name: str) -> str:
    """Returns the name of the adapter that a parameter of a wrapped model is of, ``""`` where it says none."""
    match = part_of(name)
    return (match["adapter"] or "") if match is not None else ""


def part_of(name: str) -> re.Match[str] | None:
    """Returns module and adapter of a parameter that is part of an adapter, None for any other one."""
    return _PART.fullmatch(name) or _WHOLE.fullmatch(name) or _TOKENS.fullmatch(name)


def trained_tokens(names: Iterable[str]) -> bool:
    """Whether single rows of an embedding are among what was trained."""
    return any(_TOKENS.fullmatch(name) for name in names)


def tensors_of_the_base(catalog: Catalog, start: str, *, biases: str = "none") -> frozenset[str]:
    """Returns the tensors of a run that are its base's: what the files call frozen, and what peft has below an adapter.

    Where a run's whole state holds the weights below its adapters and nothing says what was frozen, peft's rule is
    that what no adapter has was: it unfreezes ``modules_to_save``, and biases where the config says so.
    """
    names = [name for name in catalog.names() if name.startswith(start)]
    frozen = {name for name in names if catalog[name].origin.startswith("frozen")}
    below = {name for name in names if name.endswith(_BASE)}
    if frozen or not _holds_base(names):
        return frozenset(frozen | below)
    plain = {name for name in names if OF_ADAPTERS.search(name) is None}
    trained = {"all": (".bias",), "lora_only": (".base_layer.bias",)}.get(biases, ())
    return frozenset(below | {name for name in plain if not name.endswith(trained)})


def _holds_base(names: Collection[str]) -> bool:
    """Whether the weight below every adapter is there (before peft 0.6 without ``base_layer``)."""
    there = set(names)
    modules = {match["module"] for name in names if (match := _PART.fullmatch(name)) is not None}
    return bool(modules) and all({f"{one}.base_layer.weight", f"{one}.weight"} & there for one in modules)


def adapter_config(tensors: Mapping[str, Shape], facts: AdapterConfig, where: str, adapter: str = "") -> JsonObject:
    """Returns adapter_config.json: ranks, modules and kinds as the tensors say, the rest as ``facts`` say.

    Raises
    ------
    TargetError
        ``adapter-alpha`` where nobody says alpha, ``no-adapter`` where no tensor is one of LoRA, ``adapter-incomplete``
        where a module has half of a pair.
    """
    ranks = adapter_ranks(tensors)
    if not ranks:
        raise TargetError("no-adapter", "the checkpoint has no tensor of a LoRA adapter", where=where)
    if facts.alpha is None:
        named = f", adapter: {adapter}" if adapter else ""
        beside = f"{adapter}/{ADAPTER_CONFIG}" if adapter else ADAPTER_CONFIG
        raise TargetError(
            "adapter-alpha",
            f"alpha unknown for the adapter{f' {adapter}' if adapter else ''}, and its weights do not determine it",
            where=where,
            expected=f"`lora_alpha` in the training config or in {beside}",
            hint=f"write the alpha of the run: `target: {{name: peft/adapter, trained: SOURCE{named}, alpha: 16}}`",
        )
    halves = _halves(tensors)
    if halves:
        raise TargetError(
            "adapter-incomplete",
            f"{len(halves)} modules of the adapter have A without B, or B without A: {', '.join(halves[:3])}",
            where=where,
            hint="fetch the checkpoint again, whole; a line under `drop:` that takes one half must take both",
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: found for module, found in ranks.items() if found != rank}
    return {
        "alpha_pattern": dict(facts.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": facts.base or None,
        "bias": _bias(tensors, ranks),
        "fan_in_fan_out": facts.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(facts.alpha) if facts.alpha == int(facts.alpha) else facts.alpha,
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
        "lora_dropout": 0.0,
        "modules_to_save": _whole_modules(tensors) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": odd,
        "revision": None,
        "target_modules": _targets(ranks),
        "task_type": facts.task or None,
        "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        "use_rslora": facts.rslora,
    }


def adapter_ranks(tensors: Mapping[str, Shape]) -> dict[str, int]:
    """Returns the rank of each adapted module. A is [r, in] for a linear layer, and for an embedding [r, rows]."""
    ranks: dict[str, int] = {}
    for name, shape in tensors.items():
        match = _PART.fullmatch(name)
        if match is not None and match["kind"] in ("lora_A", "lora_embedding_A") and shape:
            ranks[match["module"].removeprefix(ROOT)] = shape[0]
    return ranks


def _halves(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the modules that have one of A and B and not the other."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for name in tensors:
        match = _PART.fullmatch(name)
        if match is not None and match["leaf"] != ".bias" and match["kind"] != "lora_magnitude_vector":
            family, _, half = match["kind"].rpartition("_")
            kinds.setdefault((match["module"], family), set()).add(half)
    return sorted(module for (module, _), found in kinds.items() if len(found) == 1)


def _targets(ranks: Mapping[str, int]) -> list[str]:
    """Returns ``target_modules``: last names where each is adapted in every layer, else whole names.

    peft takes a last name for every module that ends so, and an untrained adapter there would be news to the user.
    """
    layers: dict[str, set[int]] = {}
    for module in ranks:
        numbers = [int(part) for part in module.split(".") if part.isdecimal()]
        layers.setdefault(re.sub(r"\d+", "#", module), set()).update(numbers[:1])
    everywhere = [numbers for numbers in layers.values() if numbers]
    count = max((len(numbers) for numbers in everywhere), default=0)
    if all(numbers == set(range(count)) for numbers in everywhere):
        return sorted({module.rsplit(".", 1)[-1] for module in ranks})
    return sorted(ranks)


def _plain(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the names of trained tensors that are not LoRA's, without the root."""
    return [name.removeprefix(ROOT) for name in tensors if ".lora_" not in name]


def _bias(tensors: Mapping[str, Shape], ranks: Mapping[str, int]) -> str:
    """Returns peft's ``bias``: which of the base's own biases were trained."""
    whole = set(_whole_modules(tensors))
    biased = {name.rsplit(".", 1)[0] for name in _plain(tensors) if name.endswith(".bias")}
    modules = {module.removesuffix(".base_layer") for module in biased if module.rsplit(".", 1)[-1] not in whole}
    if not modules:
        return "none"
    return "lora_only" if modules <= set(ranks) else "all"


def _whole_modules(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the last names of modules that were trained whole."""
    return sorted(
        {name.rsplit(".", 2)[-2] for name in _plain(tensors) if name.endswith(".weight") and "." in name[:-7]}
    )
