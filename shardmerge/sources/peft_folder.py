"""A PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.

File names are those of ``peft/utils/constants.py``; ``non_lora_trainables.bin`` is what LLaVA's ``train.py`` saves
beside an adapter: the trained tensors that are none of its (the projector).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.hf_folder import ReadShard
from shardmerge.tensors import PEFT_ADAPTER, Catalog
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")  # the last is mlx-lm's
_FULL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LLAVA = "non_lora_trainables.bin"


def is_adapter_file(path: Path) -> bool:
    """Tells whether a file is the weights of an adapter whose config lies beside it."""
    return path.name in _WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path, read_shard: ReadShard) -> Catalog | None:
    """Returns the catalog of the adapter in a directory.

    ``None`` where there is no ``adapter_config.json``, or where the weights beside it are those of a full model.

    Raises
    ------
    CheckpointError
        ``missing-adapter``: the config is there, and no weights.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    full = [name for name in _FULL if (folder / name).is_file()]
    if weights is None and not full:
        raise CheckpointError(
            "missing-adapter",
            f"the directory has {ADAPTER_CONFIG}, and the weights of the adapter are not there",
            where=str(folder),
            expected=" or ".join(_WEIGHTS),
            hint="copy or download the rest, or save the adapter again with save_pretrained",
        )
    if weights is None:
        return None
    warnings = [
        f"the adapter is read, not the full model beside it: pass {folder / name} for that" for name in full[:1]
    ]
    second = [name for name in _WEIGHTS if name != weights.name and (folder / name).is_file()]
    warnings += [f"{weights.name} is read; {name} lies beside it: pass {folder / name} for that one" for name in second]
    notes = []
    if (folder / _LLAVA).is_file():
        notes.append(f"{_LLAVA} holds what was trained beside the adapter: make it a source of its own")
    catalog = read_shard(weights)
    return replace(
        catalog,
        path=str(folder),
        kind=PEFT_ADAPTER,
        notes=(*notes, *catalog.notes),
        warnings=(*warnings, *catalog.warnings),
    )


def stray_config(folder: Path) -> tuple[str, ...]:
    """Returns the note for a full model that has an adapter's config beside it and no adapter."""
    return (
        (f"{ADAPTER_CONFIG} lies here without an adapter: the full model is read",)
        if (folder / ADAPTER_CONFIG).is_file()
        else ()
    )
