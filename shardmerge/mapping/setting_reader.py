"""Reads numbers that differ from tensor to tensor: see ``settings``."""

from __future__ import annotations

from shardmerge.formulas import Formula
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.settings import Varying, VaryingCase
from shardmerge.mapping.yaml_nodes import Items, Node, Table


def read_setting(reader: NodeReader, node: Node, what: str) -> Varying | None:
    """Reads a number, a list of points, or a list of cases; None with a problem for anything else."""
    tables = node.nodes if isinstance(node, Items) else (node,)
    if isinstance(node, Table) or any(isinstance(one, Table) for one in tables):
        cases = [_case(reader, one, what) for one in tables]
        found = [case for case in cases if case is not None]
        return Varying(tuple(found)) if found and len(found) == len(cases) else None
    points = _points(reader, node, what)
    return Varying((VaryingCase("", points, node.mark),)) if points else None


def varies(node: Node) -> bool:
    """Tells whether a node says more than one number for all tensors."""
    return isinstance(node, Items | Table)


def _case(reader: NodeReader, node: Node, what: str) -> VaryingCase | None:
    if not isinstance(node, Table):
        hint = "write `- value: NUMBER` for all other tensors"
        reader.add("wrong-kind", f"`{what}` mixes numbers and filters", node.mark, hint)
        return None
    fields = reader.fields(node, ("filter", "value"))
    if "value" not in fields:
        reader.add("missing-parameter", f"a case of `{what}` needs `value`", node.mark, "add `value: NUMBER`")
        return None
    points = _points(reader, fields["value"], "value")
    text = reader.text(fields["filter"], "filter") if "filter" in fields else ""
    return VaryingCase("" if text == "*" else text, points, node.mark) if points else None


def _points(reader: NodeReader, node: Node, what: str) -> tuple[Formula, ...]:
    nodes = node.nodes if isinstance(node, Items) else (node,)
    if not nodes:
        reader.add("wrong-kind", f"`{what}` has no points", node.mark, "write at least one number")
    texts = [reader.text(one, what) for one in nodes]
    formulas = [reader.formula(text, one.mark) for text, one in zip(texts, nodes, strict=True)]
    found = tuple(formula for formula in formulas if formula is not None)
    return found if len(found) == len(formulas) else ()
