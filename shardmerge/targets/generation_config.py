"""generation_config.json beside a model with a pretrained language part."""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.targets.bases import TextBase
from shardmerge.targets.config_numbers import dump, load_object
from shardmerge.targets.expectation import Request
from shardmerge.tensors import SideFile


def generation_config(text: TextBase, request: Request, changes: Mapping[str, object]) -> SideFile:
    """Returns generation_config.json: the text base's, or its special tokens, with ``changes``."""
    extent = text.catalog.side_files.get("generation_config.json")
    if extent is not None:
        config = load_object(extent, request.read)
        config.pop("_from_model_config", None)  # lets transformers replace the file by what config.json says
    else:
        config = {key: text.config.get(key) for key in ("bos_token_id", "eos_token_id")}
        config = {key: value for key, value in config.items() if value is not None}
    return SideFile("generation_config.json", (dump({**config, **changes}),))
