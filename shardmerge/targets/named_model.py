"""The target ``hf/names``: a model with the names, and a config.json, of a generation of transformers.

The rules are made from the table of renames (``mapping.generations``); here is what lies beside the tensors.
"""

from __future__ import annotations

import json
from dataclasses import replace

from shardmerge.targets import any_model
from shardmerge.targets.config_numbers import JsonObject, dump, load_object
from shardmerge.targets.expectation import Expectation, Request, Target
from shardmerge.targets.older_config import older_config
from shardmerge.tensors import Extent, SideFile

# From this version on every config is read, whichever version wrote it.
_READS_ALL = (5,)


def expect(request: Request) -> Expectation:
    """Returns what is known of the finished directory: its files, and the tensors that a vocabulary resizes.

    Raises
    ------
    TargetError
        As ``any_model.expect``, and ``unsupported-rope``.
    """
    source = request.roles.get("model", "model")
    made = any_model.expect(replace(request, roles={"text": source}))
    generation = request.options.get("generation", "")
    version = tuple(int(part) for part in generation.split("."))
    if version >= _READS_ALL:
        return made
    files = tuple(
        _older(file, request, flat=version < (4, 52)) if file.name == "config.json" else file
        for file in made.side_files
    )
    return replace(made, side_files=files, warnings=(*made.warnings, *_newer_files(made, request)))


def _older(file: SideFile, request: Request, *, flat: bool) -> SideFile:
    (content,) = file.parts
    where = content.file if isinstance(content, Extent) else request.where
    config: JsonObject = load_object(content, request.read) if isinstance(content, Extent) else json.loads(content)
    older = older_config(config, flat=flat, where=where)
    return file if older == config else SideFile(file.name, (dump(older, sort=False),))


def _newer_files(made: Expectation, request: Request) -> tuple[str, ...]:
    """Says of a processor that 5.x saved in one file that older versions look for two."""
    extent = made.beside.get("processor_config.json")
    if extent is None or "preprocessor_config.json" in made.beside:
        return ()
    if "image_processor" not in load_object(extent, request.read):
        return ()
    return (
        f"{extent.file} holds the image processor, as transformers 5 saves it: older versions look for "
        "preprocessor_config.json. Take that file from the model as it was published",
    )


TARGET = Target(
    name="hf/names",
    about="A Hugging Face model with the tensor names and the config.json of a given transformers version.",
    roles={"model": "the source that is renamed, whose config.json and tokenizer files are copied"},
    options={
        "generation": "`4.51` (what every version loads), `4.52`, `5.0` or `5.6`: the names that a model has in memory "
        "from that version on, which earlier ones do not load"
    },
    expect=expect,
)
