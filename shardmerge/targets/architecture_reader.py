"""Reads a config.json by the table of its model type: fields, their defaults, and what must hold of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from shardmerge.errors import TargetError
from shardmerge.formulas import Formula, FormulaValue
from shardmerge.shown import shown
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.config_numbers import MAX_DIMENSION, MAX_LAYERS, JsonObject, dimension, finite, flag, is_size
from shardmerge.targets.tables import ArchitectureTable, Default, InnerModel, find_table, model_types, no_table


def read_architecture(config: Mapping[str, object], where: str, known: Collection[str] = ()) -> Architecture:
    """Returns the model that a config describes.

    Parameters
    ----------
    config
        Parsed.
    where
        Its file.
    known
        The model types that the caller can use; all that have a table where it is empty.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, or ``odd-config`` for a size that is no size.
    """
    model_type = config.get("model_type")
    table = find_table(model_type)
    if table is None or (known and table.model_type not in known):
        raise TargetError(
            "unsupported-architecture",
            "the model's architecture is not one whose tensors are known here",
            where=where,
            found=f"model_type {shown(model_type)}",
            expected=f"model_type {', '.join(known or model_types())}",
        )
    if table.kind == "text":
        _check_classes(config, table, where)
    return _read(config, table, where)


def nested(config: Mapping[str, object], key: str) -> JsonObject | None:
    """Returns the config of a part; None where there is none.

    Configs of 2022 also have ``vision_config_dict``, and ``CLIPConfig`` lets that one win.
    """
    both = [one for one in (config.get(key), config.get(f"{key}_dict")) if isinstance(one, dict)]
    return {name: value for one in both for name, value in one.items()} if both else None


def _check_classes(config: Mapping[str, object], table: ArchitectureTable, where: str) -> None:
    """Checks that ``architectures`` does not name another family than ``model_type``: Granite has LLaMA's names too."""
    stated = config.get("architectures")
    classes = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    odd = [name for name in classes if not re.match(rf"{table.family}(?!moe|vl|audio|_|\d)", name, re.IGNORECASE)]
    if odd:
        raise TargetError(
            "unsupported-architecture",
            "the config names a class of another family than its model_type",
            where=where,
            found=f"model_type {shown(table.model_type)}, architectures {shown(odd)}",
            expected=f"a class of {table.model_type}",
            hint=f"correct `architectures` or `model_type`, whichever is wrong, in {where}",
        )


def _read(config: Mapping[str, object], table: ArchitectureTable, where: str) -> Architecture:
    parts = {key: _read_part(nested(config, key) or {}, part, where) for key, part in table.parts.items()}
    made = Architecture(table, {"num_labels": _labels(config), "in_memory": False}, parts, where)
    for key, default in table.fields.items():
        made = replace(made, values={**made.values, key: _field(config, key, default, made)})
    for key, listed in table.lengths.items():
        value = config.get(listed)
        made = made.changed(**{key: len(value) if isinstance(value, list) else 1})
    for key, size in table.sizes.items():
        made = replace(made, values={**made.values, key: made.whole(size)})
    for rule in table.must:
        if not made.value(rule):
            raise made.odd(rule, f"`{rule.text}` does not hold")
    return made


def _read_part(stated: JsonObject, part: InnerModel, where: str) -> Architecture:
    """Returns a model inside of another; of an encoder that has no table no more than the sizes that it states."""
    config = {"model_type": part.usual["model_type"], **stated} if stated else part.usual
    usual = (str(part.usual["model_type"]),)
    if part.kind == "vision" and find_table(config["model_type"]) is None:
        sizes = {key: value for key, value in config.items() if type(value) is int}
        return Architecture(no_table(str(config["model_type"])), sizes, where=where)
    return read_architecture(config, where, model_types(part.kind) if part.kind else usual)


def _labels(config: Mapping[str, object]) -> FormulaValue:
    """Returns the number of classes, as ``PreTrainedConfig`` finds it."""
    named, stated = config.get("id2label"), config.get("num_labels")
    if isinstance(named, dict) and named:
        return len(named)
    return stated if is_size(stated) else 2


def _field(config: Mapping[str, object], key: str, default: Default, made: Architecture) -> FormulaValue:
    if key in config and config[key] is None:
        default = made.table.null_fields.get(key, default)
    usual = made.value(default) if isinstance(default, Formula) else default
    value = config.get(key)
    if value is None:
        return made.whole(default) if isinstance(default, Formula) and not isinstance(usual, str) else usual
    return _checked(_side(value) if key in made.table.square else value, key, usual, made)


def _checked(value: object, key: str, usual: FormulaValue, made: Architecture) -> FormulaValue:
    """Returns what a config states, if it is of the kind that the field has: that of its default."""
    stated, where = {key: value}, made.where
    if isinstance(usual, bool):
        return flag(stated, key, where)
    if isinstance(usual, float):
        return finite(stated, key, usual, where)
    if isinstance(usual, str) and isinstance(value, str):
        return value
    if isinstance(usual, tuple) and isinstance(value, list) and all(type(one) is int for one in value):
        return tuple(value)
    if isinstance(usual, str | tuple):
        raise TargetError("odd-config", f"`{key}` in config.json cannot be used", where=where, found=shown(value))
    if value == 0 and key in made.table.zero and not isinstance(value, bool):
        return 0
    counted = any(key in number.names for number in made.table.numbers.values())
    return dimension(stated, key, 0, where, MAX_LAYERS if counted else MAX_DIMENSION)


def _side(value: object) -> object:
    """Returns the side of a square that is stated as a number or as height and width."""
    return value[0] if isinstance(value, list) and len(value) in (1, 2) and value[0] == value[-1] else value
