"""What somebody who keeps every name of a checkpoint probably wanted: refused where it makes no model, or said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.adapters.roots import PREFIX
from shardmerge.errors import TargetError, UsageError
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.tensors import PEFT_ADAPTER, Catalog
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, CONFIG

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset

# Factors of LoRA as peft, kohya, diffusers and mlx-lm call them, and of LyCORIS.
_FACTOR = re.compile(
    r"(?:^|[._])(?:lora[_.](?:a|b|down|up|embedding_a|embedding_b)|hada_w\d|lokr_w\d)(?:[._]|$)", re.IGNORECASE
)

# What `convert ADAPTER OUT --base base=MODEL` does.
ADAPTER_PRESET = "peft/merge"


def refuse_parts(source: SourceSpec, catalog: Catalog) -> None:
    """Refuses what is no model on its own: an adapter, a model with one inside, placeholders without data.

    Raises
    ------
    TargetError
        ``adapter-alone``. ``unmerged-adapter``: config.json describes a model, and the tensors are a LoRA run's.
    MappingError
        ``placeholder``.
    """
    if catalog.kind == PEFT_ADAPTER:
        raise _adapter_alone(catalog)
    if CONFIG in catalog.side_files and (parts := adapter_parts(catalog)):
        what = f"{_counted(parts, catalog)}, and config.json describes the model without them"
        raise TargetError("unmerged-adapter", what, where=catalog.path, hint=_adapter_roads(catalog))
    if catalog.absent:
        from shardmerge.mapping.refusals import placeholder_error

        raise placeholder_error(source.name, sorted(catalog.absent), catalog)


def nothing_to_convert(source: SourceSpec, catalog: Catalog) -> UsageError:
    """Returns the error for a checkpoint without tensors."""
    return UsageError(
        "nothing-to-convert",
        "the checkpoint holds no tensors: there is a config.json and no weights",
        where=source.path,
        found="; ".join(catalog.notes),
        hint=f"pass one of the checkpoints inside: {' or '.join(catalog.elsewhere[-8:])}" if catalog.elsewhere else "",
    )


def is_adapter(source: str | Path, options: Options) -> bool:
    """Tells whether a path, or a hub id, is a PEFT directory; reads headers only."""
    spec = SourceSpec("source", str(source), mark=COMMAND_LINE)
    return open_source(spec, Path(), options).kind == PEFT_ADAPTER


def _adapter_alone(catalog: Catalog) -> TargetError:
    return TargetError(
        "adapter-alone",
        "this is a PEFT adapter, which is not a model without its base",
        where=catalog.path,
        hint=f"name the model it was trained on: add --base base=MODEL, which is --use {ADAPTER_PRESET}",
    )


def better_roads(catalog: Catalog) -> tuple[str, ...]:
    """Returns when a preset probably is what the user wants."""
    from shardmerge.recognition.other_layouts import foreign_presets

    found, wrapped = foreign_presets(catalog)
    if not found:
        parts = adapter_parts(catalog)
        words = f"every tensor keeps its name, and {_counted(parts, catalog)}: {_adapter_roads(catalog)}"
        return (words,) if parts else _without_prefix(catalog)
    if wrapped:
        return (
            f"the names are those of a wrapped {wrapped}: `shardmerge init {catalog.path}` writes a mapping for it",
        )
    from shardmerge.mapping.preset_files import load_preset

    needs = "".join(f" --base {name}=PATH" for name in _bases(load_preset(found[0])))
    return (f"every tensor keeps its name: for a Hugging Face model add --use {found[0]}{needs}",)


def _without_prefix(catalog: Catalog) -> tuple[str, ...]:
    """Returns how to take a training wrapper's prefix off, where no config.json says that the model has it itself."""
    from shardmerge.tensors.wrapped_names import unwrapping_rules

    words, _ = unwrapping_rules([*catalog.names()]) if CONFIG not in catalog.side_files else ((), ())
    options = " ".join(f"--strip {word}" for word in words)
    return (
        (f"every tensor keeps its name, with the prefix of a training wrapper: to remove it add {options}",)
        if words
        else ()
    )


def adapter_parts(catalog: Catalog) -> list[str]:
    """Returns the names that are factors of an adapter: peft's below its prefix, any tool's where no config.json is.

    A model may have factors of its own, such as RWKV-7 and Phi-4-multimodal. Its config.json describes them.
    """
    model = CONFIG in catalog.side_files
    return [name for name in catalog.names() if _FACTOR.search(name) and (PREFIX in name or not model)]


def _counted(parts: list[str], catalog: Catalog) -> str:
    return (
        f"{len(parts)} of {len(catalog.entries)} tensors are those of an adapter, such as {parts[0]}" if parts else ""
    )


def _adapter_roads(catalog: Catalog) -> str:
    """Returns the commands that make something of a run's adapter, for people."""
    from shardmerge.adapters.held import held_base
    from shardmerge.mapping.pattern import Template

    parts = adapter_parts(catalog)
    wrapped, factors = (any(word in name for name in parts) for word in (PREFIX, ".lora_A."))
    base = "" if held_base(catalog, Template.parse("{rest...}")) is not None else " --base base=MODEL"
    merge = f"to merge it into its model add --use {ADAPTER_PRESET}{base}"
    keep = "; to keep it as an adapter add --use peft/export" if wrapped else ""
    told = ADAPTER_CONFIG in catalog.side_files or "lora_alpha" in catalog.facts or catalog.training_config
    alpha = (
        ""
        if told or not factors
        else f". Put the {ADAPTER_CONFIG} of the run beside it first: the tensors do not say alpha"
    )
    return f"{merge}{keep}{alpha}"


def _bases(preset: Preset) -> list[str]:
    """Returns the sources that a preset cannot do without, but for the first, which is the checkpoint itself."""
    return [name for name, role in preset.roles.items() if role.required][1:]
