"""adapter_config.json by an allow-list: what a merge honours, what it may ignore, and nothing else.

Fields are those of peft's ``LoraConfig`` from 0.1 to 0.21 (``peft/tuners/lora/config.py``), of its LoHa and LoKr, and
what ms-swift adds. The tables stand in ``adapter_fields``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite

from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.targets import adapter_fields as known
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.adapter_fields import BESIDE, BY_PEFT
from shardmerge.targets.config_numbers import JsonObject, is_whole
from shardmerge.targets.name_expressions import compiled, matches
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

# In front of an expression among names: no module's name begins so.
EXPRESSION = "re:"
_BIASES = (None, "none", "all", "lora_only")
# The largest rank or alpha that anybody could mean; beyond it the file is damaged.
_MOST = 1e9


def read_adapter_config(config: JsonObject, where: str) -> AdapterConfig:
    """Returns what a config says, if a merge can do all of it.

    Raises
    ------
    MappingError
        All problems at once. ``not-lora``: another kind of adapter. ``adapter-setting``: a field that no merge can
        honour, or that is not known here. ``odd-setting``: a value of the wrong kind.
    """
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        return _mlx_config(config, where)
    _check_tuner(config.get("peft_type"), where)
    reader = _ConfigValues(config, where)
    found = reader.config()
    raise_all([*_refusals(config, where), *reader.problems])
    return found


def _mlx_config(config: JsonObject, where: str) -> AdapterConfig:
    """Reads the file that mlx-lm 0.32 writes (``tuner/utils.py``): its scale is the factor, with no rank below it."""
    kind = config.get("fine_tune_type", "lora")
    parameters = config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict):
        raise MappingError(
            "not-lora",
            f"an adapter of mlx-lm of fine_tune_type {shown(kind)} is not merged",
            where=where,
            expected="fine_tune_type lora or dora, with lora_parameters",
            hint="fuse it with mlx-lm itself (`mlx_lm.fuse`), and convert the result",
        )
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < _MOST:
        raise _odd("lora_parameters.scale", scale, "a finite number", where)
    return AdapterConfig(rank=rank if is_whole(rank) else None, scale=float(scale), dora=kind == "dora")


def _check_tuner(kind: object, where: str) -> None:
    if kind in ("", None) or (isinstance(kind, str) and kind in known.MERGED_TUNERS):
        return
    name = str(kind)
    beside = known.BESIDE_TUNERS.get(name)
    reason = beside or known.OTHER_TUNERS.get(name)
    raise MappingError(
        "not-lora",
        f"adapters of peft_type {shown(kind)} are not merged" + (f": {reason}" if reason else ""),
        where=where,
        expected=", ".join(known.MERGED_TUNERS),
        hint=BESIDE if beside else BY_PEFT,
    )


def _refusals(config: JsonObject, where: str) -> Iterator[ShardmergeError]:
    for key, value in config.items():
        if key in known.HONOURED or key in known.IRRELEVANT or _is_neutral(value):
            continue
        reason = known.REFUSED.get(key)
        yield MappingError(
            "adapter-setting",
            f"the adapter cannot be merged: {reason}"
            if reason
            else f"the adapter's config sets `{shown(key)[1:-1]}`, which is not known here and may change the sums",
            where=where,
            found=f"{shown(key)[1:-1]}: {shown(value)}",
            hint=_way_on(key),
        )
    yield from _lost_start(config.get("init_lora_weights"), where)
    if config.get("bias") not in _BIASES:
        yield _odd("bias", config.get("bias"), "none, all or lora_only", where)


def _way_on(key: str) -> str:
    if key in known.REFUSED:
        return BY_PEFT if key in known.MERGED_BY_PEFT else BESIDE
    return f"{BY_PEFT}; if it changes no weight, remove the line from {ADAPTER_CONFIG}"


def _is_neutral(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _lost_start(init: object, where: str) -> Iterator[ShardmergeError]:
    """Some initialisations change the base by what no file says: ``B @ A`` belongs to what is left of it."""
    family = known.init_family(init)
    if family in known.UNCHANGED or family in known.TAKEN_OUT:
        return
    reason = known.LOST.get(family, "it is not known here and may have changed the base")
    yield MappingError(
        "adapter-setting",
        f"init_lora_weights {shown(init)}: `B @ A` may not be added to the base: {reason}",
        where=where,
        found=f"init_lora_weights: {shown(init)}",
        expected=", ".join((*known.UNCHANGED, *known.TAKEN_OUT)),
        hint="let peft write it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...); or "
        "name the residual model that it was trained on as the base, and set init_lora_weights to true in "
        f"{ADAPTER_CONFIG}",
    )


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
            alpha=self._number(self._alpha_key(), self.values.get(self._alpha_key())),
            rank=self._rank("r", self.values.get("r")),
            rslora=bool(self._flag("use_rslora")),
            fan_in_fan_out=bool(self._flag("fan_in_fan_out")),
            rank_pattern=self._pattern("rank_pattern", self._rank),
            alpha_pattern=self._pattern("alpha_pattern", self._number),
            targets=self._targets(),
            excluded=self._names("exclude_modules"),
            layers=self._layers(),
            saved=self._names("modules_to_save"),
            dora=self._flag("use_dora"),
            tokens=self._tokens(),
            tied=bool(self._flag("ensure_weight_tying")),
            task=task if isinstance(task := self.values.get("task_type"), str) else "",
            init=init if (init := known.init_family(self.values.get("init_lora_weights"))) in known.TAKEN_OUT else "",
            parameters=self._names("target_parameters"),
            peft_version=tuple(map(int, re.findall(r"\d{1,6}", str(self.values.get("peft_version") or ""))[:2])),
            replication=self._replication(),
        )

    def _alpha_key(self) -> str:
        """LoHa and LoKr call it ``alpha``."""
        return "lora_alpha" if self.values.get("peft_type") in ("LORA", "", None) else "alpha"

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
        """Names; an expression, which peft takes for all of a list, as one that begins with ``EXPRESSION``."""
        value = self.values.get(key)
        if isinstance(value, str) and value and key in ("target_modules", "exclude_modules"):
            return self._expression(value)
        return tuple(str(name) for name in value) if isinstance(value, list) else ()

    def _expression(self, value: str) -> tuple[str, ...]:
        if value == "all-linear":
            return ()
        try:
            compiled(value)
        except ValueError:
            return ()
        return (EXPRESSION + value,)

    def _targets(self) -> tuple[str, ...]:
        """What is missed where it has no tensors: nothing, where an expression that excludes some cannot be matched."""
        excluded = self.values.get("exclude_modules")
        return () if isinstance(excluded, str) and not self._names("exclude_modules") else self._names("target_modules")

    def _replication(self) -> tuple[tuple[int, int], ...]:
        value = self.values.get("layer_replication")
        if not value:
            return ()
        pairs = value if isinstance(value, list) else []
        found = tuple(tuple(pair) for pair in pairs if isinstance(pair, list) and all(map(_is_index, pair)))
        if not pairs or len(found) != len(pairs) or not all(len(one) == 2 and one[0] < one[1] for one in found):
            self._odd("layer_replication", value, "pairs of layer numbers, [start, end)")
            return ()
        return tuple((first, last) for first, last in found)

    def _layers(self) -> frozenset[int] | None:
        value = self.values.get("layers_to_transform")
        if value is None or value == []:
            return None
        numbers = value if isinstance(value, list) else [value]
        found = frozenset(number for number in numbers if is_whole(number))
        if all(map(is_whole, numbers)):
            return found
        self._odd("layers_to_transform", value, "a list of layer numbers")
        return None

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
    return is_whole(value) and value >= 0


def last_names(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of some names, or ends with one, as peft's ``target_modules`` match."""
    return any(
        matches(name.removeprefix(EXPRESSION), module)
        if name.startswith(EXPRESSION)
        else module == name or module.endswith(f".{name}")
        for name in names
    )


def layer_of(module: str) -> int | None:
    """Returns the number of the layer that a module belongs to: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", module)
    return int(found[1]) if found else None
