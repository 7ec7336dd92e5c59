"""The target of a plain conversion: the same names, and the source's own side files."""

from __future__ import annotations

import json

from shardmerge.dtypes import DType
from shardmerge.targets.expectation import Expectation, ReadSideFile, SideFile
from shardmerge.tensors import Catalog

# What loaders look for beside weights. Anything else (logs, scripts, trainer state) is not part of a model.
_PREFIXES = (
    "config.json", "generation_config.json", "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab",
    "merges.txt", "chat_template", "preprocessor_config.json", "processor_config.json", "spiece.model",
)  # fmt: skip


def is_model_file(name: str) -> bool:
    """Whether loaders look for a file of this name beside the weights."""
    return name.startswith(_PREFIXES)


def expect_same(catalog: Catalog, read: ReadSideFile, dtype: DType | None) -> Expectation:
    """Returns the expectation that every name, aliases included, arrives with its shape.

    Tied names are written as copies: a state dict without its config cannot say which of two names is the owner.
    """
    tensors = {name: catalog[name].shape for name in catalog.names()}
    sides = [
        SideFile(name, (_with_dtype(read(extent), dtype),) if name == "config.json" and dtype else (extent,))
        for name, extent in catalog.side_files.items()
        if is_model_file(name)
    ]
    return Expectation(tensors, side_files=tuple(sides))


def _with_dtype(raw: bytes, dtype: DType) -> bytes:
    """Sets ``torch_dtype`` or ``dtype`` (transformers >= 4.56), whichever the config has."""
    try:
        config = json.loads(raw)
    except ValueError:
        return raw
    if not isinstance(config, dict):
        return raw
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = dtype.torch
    return (json.dumps(config, indent=2) + "\n").encode()
