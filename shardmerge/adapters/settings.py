"""How strongly an adapter counts: alpha, rank, rsLoRA, and the patterns that change them for some modules.

They stand in ``adapter_config.json``, in the training config that mmengine stores, or in the mapping; nowhere in the
tensors. What is not known is asked for, never assumed: peft's default alpha of 8 would merge most adapters wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt

from shardmerge.errors import MappingError
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.adapter_config import read_adapter_config
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import JsonObject, load_object, parsed_object
from shardmerge.targets.name_expressions import matches
from shardmerge.targets.training_config import read_training_config
from shardmerge.tensors import PEFT_ADAPTER, Catalog, ReadSideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, ADAPTER_METADATA, LORA_META

# The largest number that anybody could mean.
_MOST = 1e9


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
    weight
        How often the adapter counts: the mapping's ``weight``, over alpha, its patterns and rsLoRA.
    alpha_is_rank
        Whether a module of which nothing says alpha has its rank for one: the rule of kohya and diffusers.
    """

    config: AdapterConfig = field(default_factory=AdapterConfig)
    said_by: str = ""
    turned: bool | None = None
    weight: float = 1.0
    alpha_is_rank: bool = False

    def scale(self, module: str, rank: int | None, *, beside: bool = False) -> float:
        """Returns the factor of ``B @ A`` for a module, without its alpha where that stands ``beside`` its factors.

        Parameters
        ----------
        module
            Its name inside of the model, as peft sees it.
        rank
            Rows of its A; None for a LoKr of two whole factors, which has none of its own.

        Raises
        ------
        MappingError
            ``adapter-rank``: the config says another rank. ``unknown-alpha``: nothing says alpha. ``odd-setting``:
            an alpha that is not finite.
        """
        config = self.config
        claimed = _pattern(config.rank_pattern, module) or config.rank
        if rank is None:
            rank = int(claimed or 0)
            if not rank:  # LyCORIS counts such a module once, whatever its alpha
                return self.weight
        if claimed is not None and claimed != rank:
            raise MappingError(
                "adapter-rank",
                f"{module}: the adapter's config states another rank than its tensors have",
                found=f"A has {rank} rows",
                expected=f"r = {claimed:g} ({self.said_by})",
                hint=f"put the adapter_config.json of the run there, or say `r: {rank}` under `adapters:`",
            )
        if config.scale is not None:
            return self.weight * config.scale
        alpha = _pattern(config.alpha_pattern, module)
        alpha = config.alpha if alpha is None else alpha
        if alpha is None and (beside or self.alpha_is_rank):
            return self.weight / rank if beside else self.weight
        if alpha is None:
            raise MappingError(
                "unknown-alpha", "the alpha of the adapter is unknown, and with it the strength of the adapter"
            )
        if not isfinite(alpha):
            raise MappingError(
                "odd-setting", f"{module}: alpha is {alpha}", hint="say `alpha: NUMBER` under `adapters:`"
            )
        return self.weight * (alpha / sqrt(rank) if config.rslora else alpha / rank)


def has_own_config(adapter: Catalog) -> bool:
    """Whether adapter_config.json lies beside an adapter."""
    return ADAPTER_CONFIG in adapter.side_files


def read_adapter_settings(
    spec: AdapterSpec, catalog: Catalog, read: ReadSideFile, *, alpha_is_rank: bool = False
) -> AdapterSettings:
    """Returns what the adapter's own config says, and the mapping over it; ``alpha_is_rank`` is its tool's rule.

    Raises
    ------
    MappingError
        Those of ``read_adapter_config``. ``odd-setting``: a value of the mapping that is no number.
    """
    found = AdapterSettings()
    if ADAPTER_CONFIG in catalog.side_files:
        extent = catalog.side_files[ADAPTER_CONFIG]
        found = AdapterSettings(read_adapter_config(load_object(extent, read), extent.file), ADAPTER_CONFIG)
    elif ADAPTER_METADATA in catalog.facts:
        text = str(catalog.facts[ADAPTER_METADATA])
        found = AdapterSettings(
            read_adapter_config(_of_part(text, spec, catalog.path), catalog.path), "the file's header"
        )
    elif "lora_alpha" in catalog.facts:
        found = AdapterSettings(_stated(catalog), "the combination" if _is_combined(catalog) else LORA_META)
    elif catalog.training_config:
        found = _from_training(spec, catalog)
    return replace(_overridden(found, spec), alpha_is_rank=alpha_is_rank)


def _is_combined(catalog: Catalog) -> bool:
    return catalog.kind == PEFT_ADAPTER


def _stated(catalog: Catalog) -> AdapterConfig:
    """What verl's ``lora_train_meta.json`` says, or a combination of adapters."""
    facts = catalog.facts
    said: JsonObject = {"r": facts.get("lora_r") or None, "lora_alpha": facts.get("lora_alpha")}
    turned = facts.get("lora_fan_in_fan_out") is True
    return replace(read_adapter_config(said, f"{catalog.path}/{LORA_META}"), fan_in_fan_out=turned)


def _of_part(text: str, spec: AdapterSpec, where: str) -> JsonObject:
    """Returns the config of one model of a pipeline: ``unet.lora_alpha`` and its like, without the model's name."""
    prefix = spec.source.template.text.partition("{")[0]
    said = parsed_object(text.encode(), where)
    return {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}


def _from_training(spec: AdapterSpec, catalog: Catalog) -> AdapterSettings:
    facts = read_training_config(catalog.training_config)
    vision = spec.source.template.text.startswith("visual_encoder.")
    config = facts.visual_encoder_lora if vision else facts.llm_lora
    return AdapterSettings(config, "the training config") if config is not None else AdapterSettings()


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
    weight = _said_number(said["weight"], "weight", spec, least=-_MOST) if "weight" in said else 1.0
    return AdapterSettings(config, "the mapping" if numbers else found.said_by, flags.get("fan_in_fan_out"), weight)


def _said_number(text: str, key: str, spec: AdapterSpec, *, least: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = least
    if not least < value < _MOST:
        what = f"`{key}: {text}` is no {'number' if least else 'positive number'}"
        raise MappingError("odd-setting", what, where=str(spec.mark), hint=f"say `{key}: NUMBER` under `adapters:`")
    return value


def _said_flag(text: str, key: str, spec: AdapterSpec) -> bool:
    if text not in ("true", "false"):
        raise MappingError("odd-setting", f"`{key}: {text}` is neither true nor false", where=str(spec.mark))
    return text == "true"


def _pattern(patterns: Mapping[str, float], module: str) -> float | None:
    r"""Returns the value of the first pattern that fits a module, as peft's ``get_pattern_key``: ``(.*\.)?(KEY)$``."""
    for key, value in patterns.items():
        try:
            if matches(rf"(.*\.)?({key})$", module):
                return value
        except ValueError as error:
            raise MappingError(
                "odd-pattern",
                f"a rank or alpha pattern cannot be matched: {error}",
                found=key[:80],
                expected="a module's name, or a plain regular expression over names",
                hint=f'write a line for each module into {ADAPTER_CONFIG}, such as "{module}": {value:g}',
            ) from error
    return None
