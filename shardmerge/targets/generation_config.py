"""generation_config.json beside a model with a pretrained language part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardmerge.targets.config_numbers import JsonObject, dump, load_object
from shardmerge.tensors import Catalog, ReadSideFile, SideFile

_TOKENS = ("bos_token_id", "eos_token_id")


def generation_config(
    catalog: Catalog,
    config: Mapping[str, object],
    read: ReadSideFile,
    changes: Mapping[str, object] | None = None,
    tokens: Sequence[str] = _TOKENS,
) -> tuple[SideFile, ...]:
    """Returns generation_config.json: the source's own, or the special tokens of its config, with ``changes``."""
    extent = catalog.side_files.get("generation_config.json")
    found: JsonObject = {key: config[key] for key in tokens if config.get(key) is not None}
    if extent is not None:
        found = load_object(extent, read)
        found.pop("_from_model_config", None)  # lets transformers replace the file by what config.json says
    found |= changes or {}
    return (SideFile("generation_config.json", (dump(found),)),) if found else ()
