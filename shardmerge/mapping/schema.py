"""JSON Schema (draft 2020-12) of mapping.yaml and of presets, for editors. Pure.

Made of what the reader goes by: its keys, the ops and their parameters, the targets and their roles, the presets. A key
that the reader knows and this module has no line for is a ``KeyError``, so the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from shardmerge.mapping import preset_files, spec
from shardmerge.ops.contract import OpKind, Param, ParamKind
from shardmerge.ops.registry import OPS
from shardmerge.ops.row_init import ROW_INITS
from shardmerge.targets.expectation import FILE_MODES, FORMATS, Target
from shardmerge.targets.registry import TARGETS

Schema: TypeAlias = "dict[str, object]"

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NAME = "^[a-z][a-z0-9_-]*$"
_IDENTIFIER = "^[A-Za-z_][A-Za-z0-9_]*$"

# A scalar is its text, whatever YAML would make of it.
_TEXT: Schema = {"type": ["string", "number", "boolean"], "minLength": 1}
_FORMULA: Schema = {"type": ["string", "number"], "minLength": 1}
_POINTS: Schema = {"anyOf": [_FORMULA, {"type": "array", "minItems": 1, "items": _FORMULA}]}
_CASE: Schema = {
    "type": "object",
    "properties": {"filter": _TEXT, "value": _POINTS},
    "required": ["value"],
    "additionalProperties": False,
}
# A number; or points from the first layer to the last; or cases of which the first whose filter is in the name decides.
_SETTING: Schema = {"anyOf": [_POINTS, _CASE, {"type": "array", "minItems": 1, "items": _CASE}]}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+$"}]}
_VERSION: Schema = {"enum": [1, "1"], "description": "The version of this format."}
_REFERENCE: Schema = {"type": "string", "pattern": "^[a-z][a-z0-9_-]*:.", "description": "source:name"}


def mapping_schema() -> Schema:
    """Returns the schema of mapping.yaml."""
    properties: dict[str, Schema] = {
        "shardmerge": _VERSION,
        "sources": _names_to(_NAME, _either(_TEXT, _SOURCE), "Names and checkpoints: a path or a hub id."),
        "output": _about(_either(_TEXT, _OUTPUT), "Where the result goes."),
        "use": {"enum": list(preset_files.list_presets()), "description": "A preset: rules, drops and a target."},
        **_shared(),
        "vocabulary": _VOCABULARY,
        "config": _CONFIG,
    }
    required = {
        "required": ["shardmerge", "sources"],
        "anyOf": [{"required": [key]} for key in ("use", "tensors", "rest")],
    }
    return _document("shardmerge mapping", _object(spec.KEYS, properties) | required)


def preset_schema() -> Schema:
    """Returns the schema of a preset's file."""
    role_keys: dict[str, Schema] = {"about": _TEXT, "required": _FLAG, "strip": _TEXT, "model_types": _TEXT}
    role = _object(preset_files.ROLE_KEYS, role_keys, "about", "required")
    properties: dict[str, Schema] = {
        "preset": _VERSION,
        "title": _TEXT,
        "description": _TEXT,
        "sources": _names_to(_NAME, role, "The sources it works with."),
        **_shared(),
    }
    needed = ("preset", "title", "description", "sources")
    return _document("shardmerge preset", _object(preset_files.KEYS, properties, *needed))


def _document(title: str, schema: Schema) -> Schema:
    return {"$schema": _DRAFT, "title": title, **schema, "$defs": _definitions()}


def _shared() -> dict[str, Schema]:
    """What mappings and presets have in common."""
    candidates: Schema = {"type": "array", "minItems": 1, "items": _ref("term")}
    return {
        "target": _ref("target"),
        "let": _names_to(_IDENTIFIER, _FORMULA, "Named numbers, for the formulas of ops."),
        "adapters": {"type": "array", "items": _ADAPTER, "description": "Adapters to merge into their bases."},
        "tensors": {
            "type": "object",
            "description": "Rules: each target name and what it is made of; of several candidates the first there is.",
            "additionalProperties": _either(_ref("term"), candidates),
        },
        "rest": {
            "type": "object",
            "description": "Rules for what no rule of `tensors` uses, for names that none of them makes.",
            "additionalProperties": _either(_ref("term"), candidates),
        },
        "drop": {"type": "array", "items": _REFERENCE, "description": "Source tensors that are not wanted."},
    }


def _definitions() -> dict[str, Schema]:
    return {
        "term": _either(_REFERENCE, _ref("op")),
        "op": {
            "type": "object",
            "required": ["op"],
            "properties": {"op": {"enum": list(OPS)}},
            "allOf": [_where("op", name, _ref(f"op-{name}")) for name in OPS],
        },
        "target": _either(
            {"enum": list(TARGETS)},
            {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"enum": list(TARGETS)}},
                "allOf": [_where("name", target.name, _target(target)) for target in TARGETS.values()],
            },
        ),
        **{f"op-{kind.name}": _op(kind) for kind in OPS.values()},
    }


def _op(kind: OpKind) -> Schema:
    one = _ref("term")
    several = _either(one, {"type": "array", "minItems": 1, "items": one})
    properties: dict[str, Schema] = {"op": {"const": kind.name}}
    properties["of"] = several if kind.many else one
    properties["for"] = _names_to(_IDENTIFIER, _FORMULA, "Captures of the target that count from 0 to a number.")
    properties |= dict.fromkeys((*kind.optional_terms, *kind.terms), one)
    properties |= {param.name: _about(_param(param), param.about) for param in kind.params}
    needed = [param.name for param in kind.params if param.default is None and not param.optional]
    of = ("of",) if kind.takes_of else ()
    return _about(_object(properties, properties, "op", *of, *kind.terms, *needed), kind.about)


def _param(param: Param) -> Schema:
    if param.choices:
        return {"enum": list(param.choices)}
    kinds: dict[ParamKind, Schema] = {
        "int": _FORMULA,
        "number": _SETTING,
        "ints": _either(_FORMULA, {"type": "array", "items": _FORMULA}),
        "numbers": _either(_SETTING, {"type": "array", "items": _SETTING}),
        "flag": _FLAG,
        "text": _TEXT,
        "dtype": _TEXT,
    }
    return kinds[param.kind]


def _target(target: Target) -> Schema:
    lines = {**target.roles, **target.options}
    properties: dict[str, Schema] = {"name": {"const": target.name}}
    properties |= {key: _about(_TEXT, about) for key, about in lines.items()}
    return _about(_object(properties, properties, "name"), target.about)


# --- the parts whose keys the reader names ---


def _object(keys: Iterable[str], properties: Mapping[str, Schema], *required: str) -> Schema:
    """A table of exactly these keys; one without a line is a KeyError."""
    found: Schema = {"type": "object", "properties": {key: properties[key] for key in keys}}
    found["additionalProperties"] = False
    return found | ({"required": list(required)} if required else {})


def _names_to(pattern: str, value: Schema, about: str) -> Schema:
    return {
        "type": "object",
        "description": about,
        "propertyNames": {"pattern": pattern},
        "additionalProperties": value,
    }


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _about(schema: Schema, text: str) -> Schema:
    return {"description": text, **schema}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _where(key: str, value: str, then: Schema) -> Schema:
    return {"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": then}


_SOURCE = _object(
    spec.SOURCE_KEYS,
    {
        "path": _about(_TEXT, "A file, a directory or a hub id."),
        "required": _about(_FLAG, "Whether it is an error if nothing is there."),
        "view": {"enum": ["fp32", "module"], "description": "DeepSpeed: master weights or the 16-bit module."},
        "root": _about(_TEXT, "Dotted path of the state dict inside a torch file."),
        "strip": {
            "anyOf": [_TEXT, {"type": "array", "items": _TEXT}],
            "description": "Taken off the names that begin with it; words of torch's wrappers anywhere.",
        },
    },
    "path",
)
_FILES = _object(
    spec.FILES_KEYS,
    {
        "include": {"type": "array", "items": _TEXT, "description": "Patterns of names that go along, too."},
        "exclude": {"type": "array", "items": _TEXT, "description": "Patterns of names that stay behind."},
    },
)
_OUTPUT = _object(
    spec.OUTPUT_KEYS,
    {
        "path": _about(_TEXT, "The directory to make."),
        "dtype": _about(_TEXT, "The type of all float tensors: bfloat16, float16, float32, ..."),
        "shard_size": _about(_TEXT, "Most bytes of tensors in one file, decimal: 5GB."),
        "format": {"enum": [*FORMATS]},
        "dtypes": {
            "type": "object",
            "additionalProperties": _TEXT,
            "description": "Another type for some target names.",
        },
        "keep": {"type": "array", "items": _TEXT, "description": "Target names that keep their own type."},
        "partial": _about(_FLAG, "Whether only a part of the model that config.json describes is wanted."),
        "root": {
            "type": "string",
            "description": "For `dcp`: the key of the model in a state dict, `model` if not said.",
        },
        "optimizer": _about(_FLAG, "For `dcp` and `zero-universal`: whether the state of Adam goes along."),
        "card": _about(_FLAG, "Whether README.md says what was merged; by itself where models are merged."),
        "files": _about(_either({"enum": list(FILE_MODES)}, _FILES), "Which small files beside the weights go along."),
    },
    "path",
)
_ADAPTER_SIDE = _about(_TEXT, "A source, or source:template with one {rest...}.")
_ADAPTER = _object(
    (*spec.ADAPTER_KEYS, *spec.ADAPTER_SETTINGS),
    {
        "from": _ADAPTER_SIDE,
        "onto": _ADAPTER_SIDE,
        "rename": {
            "type": "object",
            "additionalProperties": _TEXT,
            "description": "The adapter's names by templates, and how they are called in the base.",
        },
        "r": _about(_TEXT, "The rank, where no file says it."),
        "alpha": _about(_TEXT, "alpha, where no file says it."),
        "rslora": _about(_TEXT, "Whether the scale is alpha / sqrt(r)."),
        "fan_in_fan_out": _about(_TEXT, "Whether the base stores [in, out]."),
        "combination_type": _about(_TEXT, "`cat`, the sum, where nothing is said; or peft's `linear`."),
        "weight": _about(_TEXT, "How often it counts, 1 where nothing is said; negative takes it off."),
        "name": _about(_TEXT, "The adapter's name in peft, `default` where nothing is said."),
    },
    "from",
    "onto",
)
_CONFIG = _about(
    _object(
        spec.CONFIG_KEYS,
        {
            "take": _about(_TEXT, "The nested config that becomes the whole: text_config."),
            "remove": {"type": "array", "items": _TEXT, "description": "Keys, with dots into nested ones."},
            "set": {"type": "object", "description": "Values by key, with dots into nested ones."},
        },
    ),
    "What the config.json of the result says.",
)
_VOCABULARY = _object(
    spec.VOCABULARY_KEYS,
    {
        "rows": _about(_COUNT, "Rows of embedding and head."),
        "multiple": _about(_COUNT, "Round up to a multiple of this."),
        "new": {"enum": [*ROW_INITS], "description": "How new rows are made."},
        "row": _about(_COUNT, "Which row is copied."),
        "seed": _about(_COUNT, "Of the normal distribution."),
        "trim": _about(_FLAG, "Whether rows may be cut off."),
        "tokens": {"type": "array", "items": _TEXT, "description": "Added to the tokenizer, in order."},
        "pad": _about(_TEXT, "The padding token among them."),
    },
)
