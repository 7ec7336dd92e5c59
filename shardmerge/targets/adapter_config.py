"""adapter_config.json by an allow-list: what a merge honours, what it may ignore, and nothing else.

Fields are those of peft's ``LoraConfig`` from 0.1 to 0.21 (``peft/tuners/lora/config.py``), and what ms-swift adds. A
field that is not listed here may change the sums; set to anything but nothing, it is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite

from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

# Read below.
_HONOURED = frozenset({
    "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
    "use_dora", "lora_bias", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "trainable_token_indices", "ensure_weight_tying", "peft_type", "task_type",
})  # fmt: skip

# Of no weight in a merge, and why.
_IRRELEVANT: Mapping[str, str] = {
    "auto_mapping": "which classes the run had",
    "peft_version": "who wrote the file",
    "transformers_version": "who wrote the file",
    "base_model_name_or_path": "the user names the base",
    "revision": "the same",
    "inference_mode": "whether anything is trained",
    "lora_dropout": "in training alone",
    "merge_weights": "peft 0.1 and 0.2: whether its own eval() merges",
    "megatron_core": "a package, used with megatron_config alone",
    "qalora_group_size": "used with use_qalora alone",
    "loftq_config": "how A and B began: init_lora_weights tells",
    "eva_config": "the same; the ranks it chose stand in rank_pattern",
    "corda_config": "how A and B began: init_lora_weights tells",
    "lora_ga_config": "the same",
    "velora_config": "what the backward pass keeps",
    "runtime_config": "where DoRA's norms are computed",
    "lora_dtype": "ms-swift: the type in training",
    "lorap_lr_ratio": "ms-swift: a learning rate",
    "lorap_emb_lr": "the same",
}

# What is known to be no sum with a base, and why, for people.
_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) acts after its invocation tokens alone, and merged always",
    "layer_replication": "layer_replication builds a model of more layers than the base has",
    "megatron_config": "megatron_config splits the layers over ranks, each file holding a part",
    "target_parameters": "target_parameters adapts parameters such as fused experts, of which one pair serves all",
    "use_qalora": "QA-LoRA adds to the zero points of packed weights",
    "use_bdlora": "BD-LoRA stores A or B as the blocks of a diagonal",
    "arrow_config": "Arrow chooses between adapters token by token",
    "kasa_config": "KaSA cuts small singular values off the base before it adds",
    "monteclora_config": "MonteCLoRA samples around A with parameters of its own",
    "enable_lora": "enable_lora adapts parts of a fused layer",
}
_BY_PEFT = (
    "let peft merge it, and convert MERGED: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
    "ADAPTER).merge_and_unload().save_pretrained(MERGED)"
)

_BESIDE = (
    "no merge can do it: load it beside its base, "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
)
# Of those above: what peft 0.19 merges into numbers that answer as the adapter does.
_MERGED_BY_PEFT = frozenset({"target_parameters", "use_bdlora", "kasa_config", "monteclora_config"})

# Initialisations that leave the base as it is, by `LoraLayer.update_layer`. A missing one is peft's default.
_UNCHANGED = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BIASES = (None, "none", "all", "lora_only")
# The largest rank or alpha that anybody could mean; beyond it the file is damaged.
_MOST = 1e9


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says of the sums.

    Attributes
    ----------
    alpha, rank
        None where it does not say.
    targets
        ``target_modules`` where they are a list of names; empty for an expression or none.
    excluded, layers
        Modules and layer numbers that are not adapted though their names fit; ``layers`` is None for all.
    saved
        ``modules_to_save``.
    dora
        ``use_dora``; None where the file does not say.
    tokens
        ``trainable_token_indices`` by the name of the embedding, ``""`` for the model's own.
    tied
        ``ensure_weight_tying``.
    task
        ``task_type``: ``CAUSAL_LM``, ``SEQ_CLS``, ...; empty where it does not say.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    saved: tuple[str, ...] = ()
    dora: bool | None = None
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    task: str = ""


def read_adapter_config(config: JsonObject, where: str) -> AdapterConfig:
    """Returns what a config says, if a merge can do all of it.

    Raises
    ------
    MappingError
        All problems at once. ``not-lora``: another kind of adapter. ``adapter-setting``: a field that no merge can
        honour, or that is not known here. ``odd-setting``: a value of the wrong kind.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "", None):
        raise MappingError(
            "not-lora", "only LoRA adapters are merged", where=where, found=f"peft_type {shown(kind)}", hint=_BY_PEFT
        )
    reader = _ConfigValues(config, where)
    found = reader.config()
    raise_all([*_refusals(config, where), *reader.problems])
    return found


def _refusals(config: JsonObject, where: str) -> Iterator[ShardmergeError]:
    for key, value in config.items():
        if key in _HONOURED or key in _IRRELEVANT or _is_neutral(value):
            continue
        known = _REFUSED.get(key)
        yield MappingError(
            "adapter-setting",
            f"the adapter cannot be merged: {known}"
            if known
            else f"the adapter's config sets `{shown(key)[1:-1]}`, which is not known here and may change the sums",
            where=where,
            found=f"{shown(key)[1:-1]}: {shown(value)}",
            hint=_way_on(key),
        )
    yield from _changed_base(config.get("init_lora_weights"), where)
    if config.get("bias") not in _BIASES:
        yield _odd("bias", config.get("bias"), "none, all or lora_only", where)


def _is_neutral(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _changed_base(init: object, where: str) -> Iterator[ShardmergeError]:
    """PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ start by changing the base: ``B @ A`` belongs to what is left of it."""
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in (*_UNCHANGED, "true")):
        return
    yield MappingError(
        "adapter-setting",
        f"init_lora_weights {shown(init)} changed the base before training, so `B @ A` may not be added to the base",
        where=where,
        found=f"init_lora_weights: {shown(init)}",
        expected="true, gaussian, eva or orthogonal, which leave the base as it is",
        hint="let peft write it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...); or "
        "name the residual model that it was trained on as the base, and set init_lora_weights to true in "
        f"{ADAPTER_CONFIG}",
    )


def _way_on(key: str) -> str:
    if key in _REFUSED:
        return _BY_PEFT if key in _MERGED_BY_PEFT else _BESIDE
    return f"{_BY_PEFT}; if it changes no weight, remove the line from {ADAPTER_CONFIG}"


def _odd(key: str, value: object, expected: str, where: str) -> MappingError:
    return MappingError(
        "odd-setting",
        f"`{key}` in {ADAPTER_CONFIG} cannot be used",
        where=where,
        found=shown(value),
        expected=expected,
        hint=f"write the value that the run had into {ADAPTER_CONFIG}",
    )


@dataclass(slots=True)
class _ConfigValues:
    """Values of the right kind, and what is wrong with the others."""

    values: JsonObject
    where: str
    problems: list[ShardmergeError] = field(default_factory=list)

    def config(self) -> AdapterConfig:
        return AdapterConfig(
            alpha=self._number("lora_alpha", self.values.get("lora_alpha")),
            rank=self._rank("r", self.values.get("r")),
            rslora=bool(self._flag("use_rslora")),
            fan_in_fan_out=bool(self._flag("fan_in_fan_out")),
            rank_pattern=self._pattern("rank_pattern", self._rank),
            alpha_pattern=self._pattern("alpha_pattern", self._number),
            # An expression is not matched: it may take for ever.
            targets=() if isinstance(self.values.get("exclude_modules"), str) else self._names("target_modules"),
            excluded=self._names("exclude_modules"),
            layers=self._layers(),
            saved=self._names("modules_to_save"),
            dora=self._flag("use_dora"),
            tokens=self._tokens(),
            tied=bool(self._flag("ensure_weight_tying")),
            task=task if isinstance(task := self.values.get("task_type"), str) else "",
        )

    def _odd(self, key: str, value: object, expected: str) -> None:
        self.problems.append(_odd(key, value, expected, self.where))

    def _number(self, key: str, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MOST:
            self._odd(key, value, "a finite number")
            return None
        return float(value)

    def _rank(self, key: str, value: object) -> int | None:
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and isfinite(value) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not whole or not 0 < value < _MOST:
            self._odd(key, value, "a whole number of at least 1")
            return None
        return int(value)

    def _flag(self, key: str) -> bool | None:
        """Python's own truth of numbers: ``use_rslora: 1`` is true in peft."""
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (int, float)) and value in (0, 1):
            return bool(value)
        self._odd(key, value, "true or false")
        return None

    def _pattern(self, key: str, read: Callable[[str, object], float | None]) -> dict[str, float]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            if value is not None:
                self._odd(key, value, "a number for each pattern of names")
            return {}
        found = ((str(name), read(f"{key}.{name}", number)) for name, number in value.items())
        return {name: number for name, number in found if number is not None}

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        return tuple(str(name) for name in value) if isinstance(value, list) else ()

    def _layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            self._odd("layers_to_transform", value, "a list of layer numbers")
            return None
        return frozenset(number for number in numbers if isinstance(number, int))

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        value = self.values.get("trainable_token_indices")
        if not value:
            return {}
        named: dict[object, object] = value if isinstance(value, dict) else {"": value}
        found = {str(name): tuple(rows) for name, rows in named.items() if isinstance(rows, list)}
        if len(found) != len(named) or not all(_is_index(row) for rows in found.values() for row in rows):
            self._odd("trainable_token_indices", value, "token ids, or lists of them by the name of an embedding")
            return {}
        return found


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def last_names(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of some names, or ends with one, as peft's ``target_modules`` match."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def layer_of(module: str) -> int | None:
    """Returns the number of the layer that a module belongs to: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", module)
    return int(found[1]) if found else None
