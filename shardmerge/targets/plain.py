"""The target ``state-dict``: the tensors as the rules make them, and the files beside a source as they are."""

from __future__ import annotations

import json

from shardmerge.dtypes import DType
from shardmerge.errors import TargetError
from shardmerge.json_limits import shallow, weighed
from shardmerge.targets.expectation import Expectation, Request, Target
from shardmerge.targets.quantization_config import without_quantization
from shardmerge.tensors import Catalog, SideFile
from shardmerge.tensors.file_roles import CONFIG

# How a plan also calls its target where there is none.
PLAIN = "state-dict"


def expect(request: Request) -> Expectation:
    """Returns the files beside a source, config.json brought up to date; names and shapes are as the rules make them.

    Tied names are written as copies: a state dict without its config cannot say which of two names is the owner.

    Raises
    ------
    TargetError
        ``missing-source``: there is no such source, or it has neither tensors nor a config.json.
    """
    name = request.roles.get("text", "text")
    catalog = request.catalogs.get(name)
    if catalog is None or not (catalog.entries or CONFIG in catalog.side_files):
        raise TargetError(
            "missing-source",
            f"the files of the source `{name}` should go along, and it has neither tensors nor a config.json",
            where=catalog.path if catalog else request.where,
            expected=f"a source named `{name}` with config.json",
        )
    config = catalog.side_files.get(CONFIG)
    changed = request.dtype is not None or catalog.dequantized
    content = () if config is None else (_updated(request.read(config), request.dtype, catalog) if changed else config,)
    made = (SideFile(CONFIG, content),) if content else ()
    return Expectation({}, side_files=made, beside=catalog.side_files, same_model=True, open=True)


def _updated(raw: bytes, dtype: DType | None, catalog: Catalog) -> bytes:
    """Sets ``torch_dtype`` or ``dtype`` (transformers >= 4.56), whichever the config has, and ends a quantization."""
    try:
        config = shallow(json.loads(weighed(raw)))
    except (ValueError, RecursionError):
        return raw
    if not isinstance(config, dict):
        return raw
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype.torch
    if catalog.dequantized:
        config = without_quantization(config)
    return (json.dumps(config, indent=2) + "\n").encode()


TARGET = Target(
    name=PLAIN,
    about="The tensors that the rules produce, and the files of a source: an unchanged config.json if it has one.",
    roles={"text": "the source whose config.json, tokenizer and other files are copied"},
    options={},
    expect=expect,
    codes=True,
)
