"""The target of a plain conversion: the same names, and the source's own side files."""

from __future__ import annotations

import json

from shardmerge.dtypes import DType
from shardmerge.targets.expectation import Expectation, ReadSideFile, SideFile
from shardmerge.tensors import Catalog


def expect_same(catalog: Catalog, read: ReadSideFile, dtype: DType | None) -> Expectation:
    """Returns the expectation that every name, aliases included, arrives with its shape.

    Tied names are written as copies: a state dict without its config cannot say which of two names is the owner.
    """
    tensors = {name: catalog[name].shape for name in catalog.names()}
    config = catalog.side_files.get("config.json")
    made = (
        () if config is None else (SideFile("config.json", (_with_dtype(read(config), dtype) if dtype else config,)),)
    )
    return Expectation(tensors, side_files=made, beside=catalog.side_files, same_model=True)


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
