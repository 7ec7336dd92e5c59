"""A merge configuration of mergekit 0.1.5, read: which models, layers and parameters it names, each with its place.

Keys are those of mergekit's ``config.py``. What a mapping cannot say is refused by name. Several documents are merges
that may name each other, as ``mergekit-multi`` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.dtypes import float_dtype
from shardmerge.errors import MappingError, raise_all
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.yaml_nodes import Items, Mark, Node, Scalar, Table
from shardmerge.mapping.yaml_text import read_yaml

_KEYS = (
    "models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "modules",
)  # fmt: skip
_LINE = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class ParameterCase:
    """Points of a gradient, or one value as text, for tensors with ``filter`` in their names."""

    filter: str
    points: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a merge: cases, the first that fits deciding."""

    cases: tuple[ParameterCase, ...]
    mark: Mark


Parameters = Mapping[str, Parameter]


@dataclass(frozen=True, slots=True)
class MergeInput:
    """A model of a merge, or some of its layers, ``[first, behind the last)``.

    Attributes
    ----------
    model
        As written: a path or hub id, ``@revision``, ``+lora``; or the name of another merge.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: Parameters
    mark: Mark


@dataclass(frozen=True, slots=True)
class MergeSlice:
    """Layers of the result, or all of it, and what they are made of."""

    inputs: tuple[MergeInput, ...]
    base: str
    parameters: Parameters
    mark: Mark


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """One document."""

    method: str
    slices: tuple[MergeSlice, ...]
    base: str
    parameters: Parameters
    mark: Mark
    method_mark: Mark
    dtype: str = ""
    out_dtype: str = ""
    name: str = ""
    tokenizer: Node | None = None
    chat_template: Node | None = None

    @property
    def whole(self) -> bool:
        """Whether it names no layers."""
        return all(one.layers is None for each in self.slices for one in each.inputs)


def is_mergekit(text: str) -> bool:
    """Tells whether a YAML file is a configuration of mergekit, and not a mapping: by its keys at the left margin."""
    keys = set(re.findall(r"^([a-z_]+):", text, re.MULTILINE))
    return "merge_method" in keys and "shardmerge" not in keys


def read_mergekit(text: str, file: str) -> tuple[MergeConfig, ...]:
    """Returns all documents of a configuration.

    Raises
    ------
    ShardmergeError
        All problems at once: ``unknown-key``, ``wrong-kind``, ``not-sayable`` for what a mapping cannot say, and what
        is wrong with the YAML.
    """
    reader, found = NodeReader(file), []
    for part in _documents(text):
        node = read_yaml(part, file)
        found.append(_config(reader, node))
    raise_all(reader.problems)
    return tuple(found)


def _documents(text: str) -> Iterator[str]:
    """Yields each document behind as many empty lines as stand before it, so that its marks are right."""
    start = 0
    for match in (*_LINE.finditer(text), None):
        stop = match.start() if match is not None else len(text)
        if re.sub(r"#.*", "", text[start:stop]).strip():
            yield "\n" * text.count("\n", 0, start) + text[start:stop]
        start = match.end() if match is not None else stop


def _config(reader: NodeReader, node: Node) -> MergeConfig:
    table = reader.table(node, "a merge")
    fields = {key: value for key, value in reader.fields(table, _KEYS).items() if not _is_empty(value)}
    if "modules" in fields:
        what = "`modules`, a merge of a model part by part"
        refuse(reader, what, fields["modules"].mark)
    method = fields.get("merge_method")
    if method is None:
        reader.add("missing-parameter", "a merge needs `merge_method`", table.mark, "add `merge_method: linear`")
    given = [key for key in ("models", "slices") if key in fields]
    if len(given) != 1 and "modules" not in fields:
        reader.add("wrong-kind", "a merge has either `models` or `slices`", table.mark, "write one of the two")
    base = _model(reader, fields["base_model"]) if "base_model" in fields else ""
    return MergeConfig(
        reader.text(method, "merge_method") if method is not None else "",
        tuple(_slices(reader, fields)),
        base,
        _parameters(reader, fields.get("parameters")),
        table.mark,
        method.mark if method is not None else table.mark,
        dtype=_dtype(reader, fields, "dtype"),
        out_dtype=_dtype(reader, fields, "out_dtype"),
        name=reader.text(fields["name"], "name") if "name" in fields else "",
        tokenizer=fields.get("tokenizer", fields.get("tokenizer_source")),
        chat_template=fields.get("chat_template"),
    )


def _is_empty(node: Node) -> bool:
    return isinstance(node, Scalar) and node.empty


def refuse(reader: NodeReader, what: str, mark: Mark, hint: str = "") -> None:
    """Remembers what a mapping cannot say."""
    reader.add("not-sayable", f"a mapping cannot express {what}", mark, hint)


def _dtype(reader: NodeReader, fields: Mapping[str, Node], key: str) -> str:
    found = reader.said(fields.get(key), key, float_dtype)
    return found.torch if found is not None else ""


def _slices(reader: NodeReader, fields: Mapping[str, Node]) -> Iterator[MergeSlice]:
    if "models" in fields:
        inputs = tuple(_input(reader, node) for node in reader.items(fields["models"], "models"))
        yield MergeSlice(inputs, "", {}, fields["models"].mark)
        return
    for node in reader.items(fields.get("slices"), "slices"):
        table = reader.table(node, "a slice")
        parts = reader.fields(table, ("sources", "base_model", "parameters", "residual_weight"))
        if "residual_weight" in parts and not _is_empty(parts["residual_weight"]):
            refuse(
                reader, "`residual_weight`", parts["residual_weight"].mark, "remove it: mergekit makes nothing of it"
            )
        inputs = tuple(_input(reader, one, layers=True) for one in reader.items(parts.get("sources"), "sources"))
        base = _model(reader, parts["base_model"]) if "base_model" in parts else ""
        yield MergeSlice(inputs, base, _parameters(reader, parts.get("parameters")), node.mark)


def _input(reader: NodeReader, node: Node, *, layers: bool = False) -> MergeInput:
    table = reader.table(node, "a model")
    fields = reader.fields(table, ("model", "parameters", *(["layer_range"] if layers else [])))
    model = fields.get("model")
    if model is None:
        reader.add("missing-parameter", "a model needs `model`", table.mark, "add `model: PATH`")
    found = _layers(reader, fields.get("layer_range"), table.mark) if layers else None
    name = _model(reader, model) if model is not None else ""
    return MergeInput(name, found, _parameters(reader, fields.get("parameters")), node.mark)


def _layers(reader: NodeReader, node: Node | None, mark: Mark) -> tuple[int, int]:
    numbers = [reader.count(one, "layer_range") for one in reader.items(node, "layer_range")]
    if len(numbers) != 2 or numbers[0] >= numbers[1]:
        reader.add("wrong-kind", "`layer_range` is [first, last + 1]", mark, "write `layer_range: [0, 32]`")
        return 0, 1
    return numbers[0], numbers[1]


def _model(reader: NodeReader, node: Node) -> str:
    """Returns ``path@revision+lora`` of a text, or of a table that says the same."""
    if isinstance(node, Scalar):
        return reader.text(node, "model")
    fields = reader.fields(reader.table(node, "a model"), ("model", "lora", "override_architecture"))
    if "override_architecture" in fields:
        refuse(reader, "`override_architecture`", node.mark)
    return "+".join(_path(reader, fields[key]) for key in ("model", "lora") if key in fields)


def _path(reader: NodeReader, node: Node) -> str:
    if isinstance(node, Scalar):
        return reader.text(node, "model")
    fields = reader.fields(reader.table(node, "a path"), ("path", "revision"))
    return "@".join(reader.text(fields[key], key) for key in ("path", "revision") if key in fields)


def _parameters(reader: NodeReader, node: Node | None) -> Parameters:
    if node is None or _is_empty(node):
        return {}
    entries = reader.table(node, "`parameters`").entries
    return {key.text: Parameter(tuple(_cases(reader, value, key.text)), key.mark) for key, value in entries}


def _cases(reader: NodeReader, node: Node, name: str) -> Iterator[ParameterCase]:
    nodes = node.nodes if isinstance(node, Items) else (node,)
    if not any(isinstance(one, Table) for one in nodes):
        yield ParameterCase("", tuple(reader.text(one, name) for one in nodes))
        return
    for one in nodes:
        fields = reader.fields(reader.table(one, f"a case of `{name}`"), ("filter", "value"))
        if "value" not in fields:
            reader.add("missing-parameter", f"a case of `{name}` needs `value`", one.mark, "add `value: NUMBER`")
            continue
        value, text = fields["value"], reader.text(fields["filter"], "filter") if "filter" in fields else ""
        points = value.nodes if isinstance(value, Items) else (value,)
        yield ParameterCase("" if text == "*" else text, tuple(reader.text(point, "value") for point in points))


def flag_of(text: str) -> bool | None:
    """Returns what a word of YAML 1.1 means, None where it is no flag."""
    return _FLAGS.get(text.lower())


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as mergekit writes it, in its parts."""

    path: str
    lora: str = field(default="")

    @classmethod
    def of(cls, text: str) -> ModelName:
        """Returns the parts of ``path+lora``; revisions stay."""
        path, _, lora = text.partition("+")
        return cls(path, lora)


def not_sayable(what: str, mark: Mark, hint: str = "") -> MappingError:
    """Returns the error of what a mapping cannot say."""
    return MappingError("not-sayable", f"a mapping cannot express {what}", where=str(mark), hint=hint)
