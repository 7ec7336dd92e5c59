"""What somebody who keeps every name of a checkpoint probably wanted: refused where it makes no model, or said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import TargetError, UsageError
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec
from shardmerge.prepare.named_source import open_source
from shardmerge.prepare.options import Options
from shardmerge.tensors import PEFT_ADAPTER, Catalog

if TYPE_CHECKING:
    from shardmerge.mapping.preset_files import Preset

# What `convert ADAPTER OUT --base base=MODEL` does.
ADAPTER_PRESET = "peft/merge"


def refuse_parts(source: SourceSpec, catalog: Catalog) -> None:
    """Refuses what is no model on its own: an adapter, placeholders without data.

    Raises
    ------
    TargetError
        ``adapter-alone``.
    MappingError
        ``placeholder``.
    """
    if catalog.kind == PEFT_ADAPTER:
        raise _adapter_alone(catalog)
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
        "this is a PEFT adapter: on its own it makes no model",
        where=catalog.path,
        hint=f"name the model it was trained on: add --base base=MODEL, which is --use {ADAPTER_PRESET}",
    )


def better_roads(catalog: Catalog) -> tuple[str, ...]:
    """Returns when a preset probably is what the user wants."""
    from shardmerge.recognition.other_layouts import foreign_presets

    found, wrapped = foreign_presets(catalog)
    if not found:
        return ()
    if wrapped:
        return (
            f"the names are those of a wrapped {wrapped}: `shardmerge init {catalog.path}` writes a mapping for it",
        )
    from shardmerge.mapping.preset_files import load_preset

    needs = "".join(f" --base {name}=PATH" for name in _bases(load_preset(found[0])))
    return (f"every tensor keeps its name: for a Hugging Face model add --use {found[0]}{needs}",)


def _bases(preset: Preset) -> list[str]:
    """Returns the sources that a preset cannot do without, but for the first, which is the checkpoint itself."""
    return [name for name, role in preset.roles.items() if role.required][1:]
