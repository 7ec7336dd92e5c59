"""What a target is made of, as a mapping writes it: ``source:name``, or an op over such terms."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardmerge.dtypes import float_dtype
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.setting_reader import read_setting, varies
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Term
from shardmerge.mapping.yaml_nodes import QUOTE_BRACES, Items, Mark, Node, Scalar, Table
from shardmerge.ops.contract import OpKind, Param

SOURCE_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def read_reference(reader: NodeReader, node: Scalar, known: frozenset[str] | None) -> Reference | None:
    """Reads ``source:template``."""
    source, colon, text = node.text.partition(":")
    if not colon or not SOURCE_NAME.fullmatch(source):
        hint = f"write `{next(iter(sorted(known)))}:{node.text}`" if known else "write `source:name`"
        reader.add("no-source", f"`{node.text}` does not name its source", node.mark, hint)
        return None
    if known is not None and source not in known:
        reader.add("unknown-source", f"there is no source `{source}`", node.mark, did_you_mean(source, known))
        return None
    template = reader.template(text, node.inside.right(len(source) + 1))
    return Reference(source, template, node.mark) if template else None


def read_term(reader: NodeReader, node: Node, known: frozenset[str] | None) -> Term | None:
    """Reads ``source:name``, or ``{op: ..., of: ...}``."""
    if isinstance(node, Table):
        return _op(reader, node, known)
    if isinstance(node, Items):
        reader.add("wrong-kind", "a candidate is one `source:name`, or an op", node.mark)
        return None
    reference = read_reference(reader, node, known)
    if reference is not None and reference.template.formulas:
        what = f"`{node.text}` would have to be solved for several names"
        hint = "write the formula on the side of the target"
        reader.add("bad-formula", what, node.mark, hint)
        return None
    return reference


def _op(reader: NodeReader, node: Table, known: frozenset[str] | None) -> OpTerm | None:
    named = {key.text: value for key, value in node.entries}
    word = named.get("op")
    if not isinstance(word, Scalar):  # `[src:{x}]` is valid YAML: a list that holds a table
        hint = QUOTE_BRACES if "op" not in named and len(named) == 1 else "write `{op: NAME, of: source:name}`"
        reader.add("wrong-kind", "a candidate is one `source:name`, or an op", node.mark, hint)
        return None
    from shardmerge.ops.registry import OPS  # all ops and what they compute with: only where one is named

    kind = OPS.get(word.text)
    if kind is None:
        hint = did_you_mean(word.text, OPS) or f"there are {', '.join(sorted(OPS))}"
        reader.add("unknown-op", f"there is no op `{word.text}`", word.mark, hint)
        return None
    params = {param.name: param for param in kind.params}
    fields = reader.fields(node, ("op", "of", "for", *kind.optional_terms, *kind.terms, *params))
    _idle_params(reader, kind, fields)
    inputs = _inputs(reader, kind, fields, node.mark, known)
    arguments = {
        name: argument
        for name, value in fields.items()
        if name in params and (argument := _argument(reader, params[name], value)) is not None
    }
    arguments |= {name: Argument("true", (), fields[name].mark) for name in kind.optional_terms if name in fields}
    for param in kind.params:
        if param.default is None and not param.optional and param.name not in fields:
            what = f"the op `{kind.name}` needs `{param.name}`: {param.about}"
            reader.add("missing-parameter", what, node.mark, f"add `{param.name}: ...`")
    return OpTerm(kind, inputs, arguments, node.mark) if inputs is not None else None


def _idle_params(reader: NodeReader, kind: OpKind, fields: Mapping[str, Node]) -> None:
    """Adds a problem for each parameter that does nothing with the value of another one."""
    for param in kind.params:
        if param.name in fields and param.only_with is not None:
            key, value = param.only_with
            other = fields.get(key)
            if not isinstance(other, Scalar) or other.text != value:
                what = f"`{param.name}` of `{kind.name}` is for `{key}: {value}`"
                reader.add("no-effect", what, fields[param.name].mark, f"remove it, or say `{key}: {value}`")


def _inputs(
    reader: NodeReader, kind: OpKind, fields: Mapping[str, Node], mark: Mark, known: frozenset[str] | None
) -> tuple[Term, ...] | None:
    nodes = [fields[name] for name in kind.optional_terms if name in fields]
    for name in kind.terms:
        if name in fields:
            nodes.append(fields[name])
        else:
            reader.add("missing-parameter", f"the op `{kind.name}` needs `{name}: source:name`", mark)
    of = fields.get("of")
    if of is None and kind.takes_of:
        reader.add("missing-parameter", f"the op `{kind.name}` needs `of: source:name`", mark)
    if isinstance(of, Items) and not kind.many:
        reader.add("wrong-kind", f"`of` of the op `{kind.name}` is one tensor", of.mark)
        return None
    if of is not None:
        nodes += of.nodes if isinstance(of, Items) else (of,)
    for table in (node for node in nodes if isinstance(node, Table)):
        for key in (key for key, _ in table.entries if key.text == "for"):
            reader.add(
                "no-effect",
                "`for` is allowed in the outermost op only",
                key.mark,
                "move `for` to the outermost op",
            )
    terms = [read_term(reader, node, known) for node in nodes]
    found = tuple(term for term in terms if term is not None)
    for reference in found if not kind.many else ():
        if isinstance(reference, Reference) and reference.template.collects:
            what = f"`{{{reference.template.collected}*}}` collects several tensors, and `{kind.name}` takes one"
            reader.add("collecting-one", what, reference.mark)
            return None
    return found if len(found) == len(terms) and (found or not kind.takes_of) else None


def _varying(reader: NodeReader, param: Param, node: Node) -> Argument | None:
    """Reads a number, or one a model, that differs from tensor to tensor."""
    single = param.kind == "number" or not isinstance(node, Items) or any(isinstance(one, Table) for one in node.nodes)
    nodes = (node,) if single or not isinstance(node, Items) else node.nodes
    settings = [read_setting(reader, one, param.name) for one in nodes]
    found = tuple(setting for setting in settings if setting is not None)
    formulas = tuple(formula for setting in found for formula in setting.formulas)
    return Argument(param.name, formulas, node.mark, found) if len(found) == len(settings) else None


def _differs(param: Param, node: Node) -> bool:
    if param.kind == "number":
        return varies(node)
    several = isinstance(node, Items) and any(varies(one) for one in node.nodes)
    return param.kind == "numbers" and (several or isinstance(node, Table))


def _argument(reader: NodeReader, param: Param, node: Node) -> Argument | None:
    if _differs(param, node):
        return _varying(reader, param, node)
    if param.kind in ("ints", "numbers"):
        items = node.nodes if isinstance(node, Items) else (node,)
        texts = [reader.text(item, param.name) for item in items]
        formulas = [reader.formula(text, item.mark) for text, item in zip(texts, items, strict=True)]
        found = tuple(formula for formula in formulas if formula is not None)
        text = f"[{', '.join(texts)}]" if isinstance(node, Items) else texts[0]
        return Argument(text, found, node.mark) if len(found) == len(formulas) else None
    text = reader.text(node, param.name)
    if param.kind in ("int", "number"):
        formula = reader.formula(text, node.mark)
        return Argument(text, (formula,), node.mark) if formula is not None else None
    if param.choices and text not in param.choices:
        reader.add("op-value", f"`{param.name}` cannot be {text!r}", node.mark, did_you_mean(text, param.choices))
        return None
    if param.kind == "dtype":
        reader.said(node, param.name, float_dtype)
    if param.kind == "flag":
        reader.flag(node, param.name)
    return Argument(text, (), node.mark)
