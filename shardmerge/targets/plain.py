"""The target of a plain conversion: the same names, and the source's own side files."""

from __future__ import annotations

import json

from shardmerge.dtypes import DType
from shardmerge.targets.expectation import Expectation
from shardmerge.targets.quantization_config import without_quantization
from shardmerge.tensors import Catalog, ReadSideFile, SideFile

# How a plan calls its target where there is none.
PLAIN = "state-dict"


def expect_same(catalog: Catalog, read: ReadSideFile, dtype: DType | None) -> Expectation:
    """Returns the expectation that every name, aliases included, arrives with its shape.

    Tied names are written as copies: a state dict without its config cannot say which of two names is the owner.
    """
    tensors = {name: catalog[name].shape for name in catalog.names()}
    changed = dtype is not None or catalog.dequantized
    config = catalog.side_files.get("config.json")
    content = (_updated(read(config), dtype, catalog) if changed else config) if config is not None else b""
    made = (SideFile("config.json", (content,)),) if config is not None else ()
    return Expectation(tensors, side_files=made, beside=catalog.side_files, same_model=True)


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
