"""The target of a plain conversion: the same names, and the source's own side files."""

from __future__ import annotations

import json

from shardmerge.dtypes import DType
from shardmerge.quantization_config import QUANTIZATION_FILES, without_quantization
from shardmerge.targets.expectation import Expectation, ReadSideFile, SideFile
from shardmerge.tensors import Catalog

# What loaders look for beside weights. Anything else (logs, scripts, trainer state) is not part of a model.
_PREFIXES = (
    "config.json", "generation_config.json", "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab",
    "merges.txt", "chat_template", "preprocessor_config.json", "processor_config.json", "spiece.model",
)  # fmt: skip


def is_model_file(name: str) -> bool:
    """Whether loaders look for a file of this name beside the weights."""
    return name.startswith(_PREFIXES) or name in QUANTIZATION_FILES


def expect_same(catalog: Catalog, read: ReadSideFile, dtype: DType | None) -> Expectation:
    """Returns the expectation that every name, aliases included, arrives with its shape.

    Tied names are written as copies: a state dict without its config cannot say which of two names is the owner.
    """
    tensors = {name: catalog[name].shape for name in catalog.names()}
    changed = dtype is not None or catalog.dequantized
    sides = [
        SideFile(name, (_updated(read(extent), dtype, catalog) if name == "config.json" and changed else extent,))
        for name, extent in catalog.side_files.items()
        if is_model_file(name)
    ]
    return Expectation(tensors, side_files=tuple(sides))


def _updated(raw: bytes, dtype: DType | None, catalog: Catalog) -> bytes:
    """Sets ``torch_dtype`` or ``dtype`` (transformers >= 4.56), whichever the config has, and ends a quantization."""
    try:
        config = json.loads(raw)
    except ValueError:
        return raw
    if not isinstance(config, dict):
        return raw
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype.torch
    if catalog.dequantized:
        config = without_quantization(config)
    return (json.dumps(config, indent=2) + "\n").encode()
