"""How strongly an adapter counts: alpha, rank, rsLoRA, and the patterns that change them for some modules.

They stand in ``adapter_config.json``, in the training config that mmengine stores, or in the mapping; nowhere in the
tensors. What is not known is asked for, never assumed: peft's default alpha of 8 would merge most adapters wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt

from shardmerge.errors import MappingError
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.adapter_config import AdapterConfig, read_adapter_config
from shardmerge.targets.config_numbers import load_object
from shardmerge.targets.training_config import LoraFacts, read_training_config
from shardmerge.tensors import Catalog, ReadSideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What is known of an adapter: its config, the training config's or none, with the mapping's words over it.

    Attributes
    ----------
    config
        What adapter_config.json says, or as much of it as is known.
    said_by
        Where alpha is from, for people.
    turned
        The mapping's ``fan_in_fan_out``; None where it does not say.
    """

    config: AdapterConfig = field(default_factory=AdapterConfig)
    said_by: str = ""
    turned: bool | None = None

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
            ``adapter-rank``: the config says another rank. ``unknown-alpha``: nothing says alpha. ``odd-setting``:
            an alpha that is not finite.
        """
        config = self.config
        claimed = _pattern(config.rank_pattern, module) or config.rank
        if claimed is not None and claimed != rank:
            raise MappingError(
                "adapter-rank",
                f"{module}: the adapter's config says another rank than its tensors",
                found=f"A has {rank} rows",
                expected=f"r = {claimed:g} ({self.said_by})",
                hint=f"put the adapter_config.json of the run there, or say `r: {rank}` under `adapters:`",
            )
        alpha = _pattern(config.alpha_pattern, module)
        alpha = config.alpha if alpha is None else alpha
        if alpha is None:
            raise MappingError("unknown-alpha", "nothing says the adapter's alpha, and so how strongly it counts")
        if not isfinite(alpha):
            raise MappingError(
                "odd-setting", f"{module}: alpha is {alpha}", hint="say `alpha: NUMBER` under `adapters:`"
            )
        return alpha / sqrt(rank) if config.rslora else alpha / rank


def read_adapter_settings(spec: AdapterSpec, catalog: Catalog, read: ReadSideFile) -> AdapterSettings:
    """Returns what the adapter's own config says, and the mapping over it.

    Raises
    ------
    MappingError
        Those of ``read_adapter_config``. ``odd-setting``: a value of the mapping that is no number.
    """
    found = AdapterSettings()
    if ADAPTER_CONFIG in catalog.side_files:
        extent = catalog.side_files[ADAPTER_CONFIG]
        found = AdapterSettings(read_adapter_config(load_object(extent, read), extent.file), ADAPTER_CONFIG)
    elif catalog.training_config:
        found = _from_training(spec, catalog)
    return _overridden(found, spec)


def _from_training(spec: AdapterSpec, catalog: Catalog) -> AdapterSettings:
    facts = read_training_config(catalog.training_config)
    vision = spec.source.template.text.startswith("visual_encoder.")
    lora: LoraFacts | None = facts.visual_encoder_lora if vision else facts.llm_lora
    if lora is None:
        return AdapterSettings()
    config = AdapterConfig(
        lora.alpha, lora.r, lora.use_rslora, lora.fan_in_fan_out, lora.rank_pattern, lora.alpha_pattern
    )
    return AdapterSettings(config, "the training config")


def _overridden(found: AdapterSettings, spec: AdapterSpec) -> AdapterSettings:
    said = spec.settings
    numbers = {key: _said_number(said[key], key, spec) for key in ("r", "alpha") if key in said}
    flags = {key: _said_flag(said[key], key, spec) for key in ("rslora", "fan_in_fan_out") if key in said}
    config = found.config
    if "alpha" in numbers:
        config = replace(config, alpha=numbers["alpha"], alpha_pattern={})
    if "r" in numbers:
        config = replace(config, rank=int(numbers["r"]), rank_pattern={})
    config = replace(config, rslora=flags.get("rslora", config.rslora))
    return AdapterSettings(config, "the mapping" if numbers else found.said_by, flags.get("fan_in_fan_out"))


def _said_number(text: str, key: str, spec: AdapterSpec) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        what, hint = f"`{key}: {text}` is no positive number", f"say `{key}: NUMBER` under `adapters:`"
        raise MappingError("odd-setting", what, where=str(spec.mark), hint=hint)
    return value


def _said_flag(text: str, key: str, spec: AdapterSpec) -> bool:
    if text not in ("true", "false"):
        raise MappingError("odd-setting", f"`{key}: {text}` is neither true nor false", where=str(spec.mark))
    return text == "true"


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
                hint=f'write a line for each module into {ADAPTER_CONFIG}, such as "{module}": {value}',
            )
        if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
            return value
    return None
