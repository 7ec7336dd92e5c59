"""How strongly an adapter counts: alpha, rank, rsLoRA, and the patterns that change them for some modules.

They stand in ``adapter_config.json``, in the training config that mmengine stores, or in the mapping; nowhere in the
tensors. What is not known is asked for, never assumed: peft's default alpha of 8 would merge most adapters wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt

from shardmerge.errors import MappingError
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.architectures import JsonObject, load_object
from shardmerge.targets.expectation import ReadSideFile
from shardmerge.targets.training_config import LoraFacts, read_training_config
from shardmerge.tensors import Catalog

_CONFIG = "adapter_config.json"
# Adapters that are no LoRA have other tensors and other sums.
_LORA_TYPES = ("LORA", "", None)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is known of an adapter.

    Attributes
    ----------
    alpha
        None where nobody says.
    rank
        What the config claims, to compare with the tensors; None where it does not.
    said_by
        Where alpha is from, for people.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    said_by: str = ""

    def scale(self, module: str, rank: int) -> float:
        """Returns the factor of ``B @ A`` for a module.

        Parameters
        ----------
        module
            Its name inside of the model, as peft sees it.
        rank
            Rows of its A.

        Raises
        ------
        MappingError
            ``adapter-rank``: the config says another rank. ``unknown-alpha``: nothing says alpha.
        """
        claimed = _pattern(self.rank_pattern, module) or self.rank
        if claimed is not None and claimed != rank:
            raise MappingError(
                "adapter-rank",
                f"{module}: the adapter's config says another rank than its tensors",
                found=f"A has {rank} rows",
                expected=f"r = {claimed:g} ({self.said_by})",
                hint="config and tensors are of different runs; or say `r:` in the mapping",
            )
        alpha = _pattern(self.alpha_pattern, module)
        alpha = self.alpha if alpha is None else alpha
        if alpha is None:
            raise MappingError("unknown-alpha", "nothing says the adapter's alpha, and so how strongly it counts")
        return alpha / sqrt(rank) if self.rslora else alpha / rank


def read_settings(spec: AdapterSpec, catalog: Catalog, read: ReadSideFile) -> Settings:
    """Returns what the adapter's own config says, and the mapping over it.

    Raises
    ------
    MappingError
        ``not-lora``: another kind of adapter. ``odd-setting``: a value of the mapping that is no number.
    """
    found = Settings()
    if _CONFIG in catalog.side_files:
        found = _from_peft(load_object(catalog.side_files[_CONFIG], read), catalog)
    elif catalog.training_config:
        found = _from_training(spec, catalog)
    return _overridden(found, spec)


def _from_peft(config: JsonObject, catalog: Catalog) -> Settings:
    kind = config.get("peft_type")
    if kind not in _LORA_TYPES or config.get("layer_replication"):
        raise MappingError(
            "not-lora",
            "only LoRA adapters are merged",
            where=catalog.side_files[_CONFIG].file,
            found=f"peft_type {kind!r}" if kind not in _LORA_TYPES else "layer_replication",
            hint="merge it with peft's merge_and_unload",
        )
    return Settings(
        _number(config.get("lora_alpha")),
        _whole(config.get("r")),
        config.get("use_rslora") is True,
        config.get("fan_in_fan_out") is True,
        _numbers(config.get("rank_pattern")),
        _numbers(config.get("alpha_pattern")),
        _CONFIG,
    )


def _from_training(spec: AdapterSpec, catalog: Catalog) -> Settings:
    facts = read_training_config(catalog.training_config)
    vision = spec.source.template.text.startswith("visual_encoder.")
    lora: LoraFacts | None = facts.visual_encoder_lora if vision else facts.llm_lora
    if lora is None:
        return Settings()
    return Settings(
        lora.alpha, lora.r, lora.use_rslora, lora.fan_in_fan_out, lora.rank_pattern, lora.alpha_pattern,
        "the training config",
    )  # fmt: skip


def _overridden(found: Settings, spec: AdapterSpec) -> Settings:
    said = spec.settings
    numbers = {key: _said_number(said[key], key, spec) for key in ("r", "alpha") if key in said}
    flags = {key: _said_flag(said[key], key, spec) for key in ("rslora", "fan_in_fan_out") if key in said}
    if "alpha" in numbers:
        found = replace(found, alpha=numbers["alpha"], alpha_pattern={}, said_by="the mapping")
    if "r" in numbers:
        found = replace(found, rank=int(numbers["r"]), rank_pattern={}, said_by="the mapping")
    return replace(
        found,
        rslora=flags.get("rslora", found.rslora),
        fan_in_fan_out=flags.get("fan_in_fan_out", found.fan_in_fan_out),
    )


def _said_number(text: str, key: str, spec: AdapterSpec) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise MappingError("odd-setting", f"`{key}: {text}` is no positive number", where=str(spec.mark))
    return value


def _said_flag(text: str, key: str, spec: AdapterSpec) -> bool:
    if text not in ("true", "false"):
        raise MappingError("odd-setting", f"`{key}: {text}` is neither true nor false", where=str(spec.mark))
    return text == "true"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: object) -> dict[str, float]:
    pairs = value.items() if isinstance(value, dict) else ()
    return {str(key): number for key, one in pairs if (number := _number(one)) is not None}


def _pattern(patterns: Mapping[str, float], module: str) -> float | None:
    r"""Returns the value of the first pattern that a module's name ends with, as peft's ``get_pattern_key``.

    peft matches ``(.*\.)?(KEY)$`` with KEY a regular expression. Plain names, with ``^`` for a whole one, are what
    people write; anything else is refused rather than matched, since a pattern may take for ever.
    """
    for key, value in patterns.items():
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain, re.ASCII):
            raise MappingError(
                "odd-pattern",
                "a rank or alpha pattern is more than a module's name",
                found=key[:80],
                expected="names such as `self_attn.q_proj`",
                hint="merge it with peft's merge_and_unload, or write the names out in adapter_config.json",
            )
        if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
            return value
    return None
