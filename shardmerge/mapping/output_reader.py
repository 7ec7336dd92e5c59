"""What a mapping says of its result: ``output:``, ``target:``, ``vocabulary:`` and ``config:``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.dtypes import DType, float_dtype
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.sizes import parse_size
from shardmerge.mapping.spec import CONFIG_KEYS, FILES_KEYS, OUTPUT_KEYS, VOCABULARY_KEYS, OutputSpec, TargetSpec
from shardmerge.mapping.yaml_nodes import Items, Mark, Node, Scalar, Table, json_value
from shardmerge.ops.row_init import ROW_INITS, row_init
from shardmerge.targets.config_edits import ConfigEdits
from shardmerge.targets.expectation import FILE_MODES, FORMATS, FileChoice, Format, Vocabulary

_FORMATS_HINT = (
    "write `format: safetensors` or `format: bin`, or for training `format: dcp` or `format: zero-universal`"
)


def read_output(reader: NodeReader, node: Node) -> OutputSpec | None:
    """Reads ``output:``, a path or a set of keys."""
    if isinstance(node, Scalar):
        return OutputSpec(reader.text(node, "output"), None, None, node.mark)
    fields = reader.fields(reader.table(node, "`output`"), OUTPUT_KEYS)
    path = reader.text(fields["path"], "path") if "path" in fields else ""
    dtype = reader.said(fields.get("dtype"), "dtype", float_dtype)
    size = reader.said(fields.get("shard_size"), "shard_size", parse_size)
    if "path" not in fields:
        reader.add("no-path", "`output` has no path", node.mark, "add `path: out/model`")
    dtypes = (*_kept(reader, fields.get("keep")), *_dtypes(reader, fields.get("dtypes")))
    partial = reader.flag(fields["partial"], "partial") if "partial" in fields else False
    form, files = _format(reader, fields.get("format")), _files(reader, fields.get("files"))
    root = _root(reader, fields.get("root"))
    card = reader.flag(fields["card"], "card") if "card" in fields else None
    optimizer = reader.flag(fields["optimizer"], "optimizer") if "optimizer" in fields else False
    return OutputSpec(path, dtype, size, node.mark, dtypes, form, partial, files, root, card, optimizer)


def _files(reader: NodeReader, node: Node | None) -> FileChoice | None:
    """Reads ``files:``, one word, or patterns of names to include and exclude."""
    if node is None:
        return None
    if isinstance(node, Table):
        fields = reader.fields(node, FILES_KEYS)
        lists = {key: reader.items(fields.get(key), key) for key in FILES_KEYS}
        return FileChoice("model", *(tuple(reader.text(each, key) for each in lists[key]) for key in FILES_KEYS))
    mode = next((mode for mode in FILE_MODES if mode == reader.text(node, "files")), None)
    if mode is None:
        what = "`files` is model, all or none, or `{include: [...], exclude: [...]}`"
        reader.add("unknown-files", what, node.mark, "write `files: model` or `files: all`")
        return None
    return FileChoice(mode)


def _kept(reader: NodeReader, node: Node | None) -> Iterator[tuple[Template, DType | None]]:
    """Reads ``keep:``: target names whose tensors keep their own type."""
    for item in reader.items(node, "keep"):
        template = reader.template(reader.text(item, "keep"), item.mark)
        if template is not None:
            yield template, None


def _dtypes(reader: NodeReader, node: Node | None) -> Iterator[tuple[Template, DType | None]]:
    """Reads ``dtypes:``: a type for some target names."""
    for key, value in reader.table(node, "`dtypes`").entries if node is not None else ():
        template, dtype = reader.template(key.text, key.inside), reader.said(value, "dtypes", float_dtype)
        if template is not None and dtype is not None:
            yield template, dtype


def _format(reader: NodeReader, node: Node | None) -> Format | None:
    if node is None:
        return None
    text = reader.text(node, "format")
    form = next((form for form in FORMATS if form == text), None)
    if form is None:
        reader.add("unknown-format", f"there is no format {text!r}", node.mark, _FORMATS_HINT)
    return form


def _root(reader: NodeReader, node: Node | None) -> str | None:
    """Reads ``root:``; an empty text is the top level."""
    if node is None:
        return None
    return "" if isinstance(node, Scalar) and node.quoted and not node.text else reader.text(node, "root")


def read_target(reader: NodeReader, node: Node) -> TargetSpec | None:
    """Reads ``target:``: a name, and the source of each role."""
    if isinstance(node, Scalar):
        return TargetSpec(reader.text(node, "target"), {}, node.mark)
    table = reader.table(node, "`target`")
    texts = {key.text: reader.text(value, key.text) for key, value in table.entries}
    if "name" not in texts:
        reader.add("no-target-name", "`target` has no name", table.mark, "add `name: hf/model`")
    return TargetSpec(texts.pop("name", ""), texts, table.mark)


def read_vocabulary(reader: NodeReader, node: Node) -> Vocabulary:
    """Reads ``vocabulary:``."""
    fields = reader.fields(reader.table(node, "`vocabulary`"), VOCABULARY_KEYS)
    numbers = {key: reader.count(fields[key], key) for key in ("rows", "multiple", "row", "seed") if key in fields}
    new = reader.text(fields["new"], "new") if "new" in fields else "mean"
    how = row_init(new)
    if how is None:
        reader.add("op-value", f"`new` cannot be {new!r}", fields["new"].mark, f"one of {', '.join(ROW_INITS)}")
    _idle_numbers(reader, fields, new, node.mark)
    return Vocabulary(
        numbers.get("rows"),
        max(numbers.get("multiple", 1), 1),
        how or "mean",
        numbers.get("row", 0),
        numbers.get("seed", 0),
        reader.flag(fields["trim"], "trim") if "trim" in fields else False,
        tuple(reader.text(item, "tokens") for item in reader.items(fields.get("tokens"), "tokens")),
        reader.text(fields["pad"], "pad") if "pad" in fields else "",
    )


def _idle_numbers(reader: NodeReader, fields: Mapping[str, Node], new: str, mark: Mark) -> None:
    """Adds a problem for each key of ``vocabulary`` that changes nothing beside the others."""
    for key, how in (("row", "copy"), ("seed", "normal")):
        if key in fields and new != how:
            what = f"`{key}` is for `new: {how}`, and does nothing with `new: {new}`"
            reader.add("no-effect", what, fields[key].mark, f"remove `{key}`, or say `new: {how}`")
    if "pad" in fields and "tokens" not in fields:
        hint = "add `tokens: [...]`, or remove `pad`"
        reader.add("no-effect", "`pad` names one of `tokens`, and there are none", fields["pad"].mark, hint)
    multiple = fields.get("multiple")
    rounded = isinstance(multiple, Scalar) and multiple.text not in ("0", "1")
    tokens = fields.get("tokens")
    if not ("rows" in fields or rounded or (isinstance(tokens, Items) and tokens.nodes)):
        what = "without `rows`, `tokens` or a `multiple` above 1 the vocabulary stays as it is"
        reader.add("no-effect", what, mark, "add one of them, or remove `vocabulary`")


def read_config_edits(reader: NodeReader, node: Node) -> ConfigEdits:
    """Reads ``config:``, what the result's config.json says."""
    fields = reader.fields(reader.table(node, "`config`"), CONFIG_KEYS)
    values = reader.table(fields["set"], "`set`").entries if "set" in fields else ()
    return ConfigEdits(
        reader.text(fields["take"], "take") if "take" in fields else "",
        tuple(reader.text(item, "remove") for item in reader.items(fields.get("remove"), "remove")),
        {key.text: json_value(value) for key, value in values},
        str(node.mark),
    )
