"""The rules of a mapping: ``tensors:``, ``rest:`` and ``drop:``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shardmerge.formulas import Formula
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.spec import Drop, OpTerm, Reference, Rule, Term, references
from shardmerge.mapping.term_reader import read_reference, read_term
from shardmerge.mapping.yaml_nodes import Items, Node, Scalar, Table


def read_rules(
    reader: NodeReader, node: Node | None, known: frozenset[str] | None, what: str = "tensors"
) -> tuple[Rule, ...]:
    """Reads ``tensors:``; ``known`` are the sources a reference may name, None for any."""
    entries = reader.table(node, f"`{what}`").entries if node is not None else ()
    found = (_rule(reader, key, value, known) for key, value in entries)
    return tuple(rule for rule in found if rule is not None)


def read_rest(reader: NodeReader, node: Node | None, known: frozenset[str] | None) -> tuple[Rule, ...]:
    """Reads ``rest:``, rules for what those of ``tensors:`` leave."""
    return tuple(replace(rule, rest=True) for rule in read_rules(reader, node, known, "rest"))


def _rule(reader: NodeReader, key: Scalar, node: Node, known: frozenset[str] | None) -> Rule | None:
    target = reader.template(key.text, key.inside)
    nodes = node.nodes if isinstance(node, Items) else (node,)
    terms = [read_term(reader, item, known) for item in nodes]
    if not nodes:
        hint = f'write `"{min(known) if known else "SOURCE"}:{key.text}"`'
        reader.add("no-candidates", f"`{key.text}` names no source tensor", key.mark, hint)
    candidates = tuple(term for term in terms if term is not None)
    if target is None or len(candidates) != len(terms) or not candidates:
        return None
    if target.collects:
        reader.add(
            "collecting-target", f"`{key.text}` collects several tensors, which only an operand of an op can", key.mark
        )
        return None
    ranges = _ranges(reader, nodes)
    for name in set(ranges) - set(target.captures) - {one for formula in target.formulas for one in formula.names}:
        what = f"`for` counts {{{name}}}, which `{key.text}` does not have"
        reader.add("no-effect", what, key.mark, f"write {{{name}}} into the target's name, or remove it from `for`")
    for candidate in candidates:
        _check_captures(reader, target, candidate, ranges)
    return Rule(target, candidates, key.mark, ranges)


def _ranges(reader: NodeReader, nodes: Sequence[Node]) -> dict[str, Formula]:
    """Reads ``for: {r: 8}`` of a rule's candidates, which have to agree."""
    found: dict[str, Formula] = {}
    tables = (node for node in nodes if isinstance(node, Table))
    for counts in (value for table in tables for key, value in table.entries if key.text == "for"):
        for key, value in reader.table(counts, "`for`").entries:
            formula = reader.formula(reader.text(value, key.text), value.mark)
            if formula is not None and found.setdefault(key.text, formula).text != formula.text:
                what = f"the candidates count {{{key.text}}} to {found[key.text].text} and to {formula.text}"
                reader.add("op-value", what, value.mark, "write the same number in both")
    return found


def _check_captures(reader: NodeReader, target: Template, term: Term, ranges: Mapping[str, Formula]) -> None:
    """Both sides bind the same captures: else one name would have two sources, or a capture no value."""
    ours = set(target.captures) - (set(ranges) if isinstance(term, OpTerm) else set())
    counted = set(ranges) | {name for formula in target.formulas for name in formula.names}
    for reference in references(term):
        template = reference.template
        theirs = set(template.captures) - {template.collected}
        missing = ours - theirs if isinstance(term, Reference) else set()
        extra = {name for name in theirs - ours - counted if not name.startswith("_")}
        for name in sorted(missing | extra):
            side = "the source name" if name in ours else "the target name"
            reader.add(
                "unbound-capture",
                f"{{{name}}} is missing in {side}: `{target}` from `{reference.source}:{template}`",
                reference.mark,
                "use the same captures on both sides; call it {_x} if it has one value only, or drop the rest",
            )
        if template.collects and isinstance(term, Reference):
            what = f"`{{{template.collected}*}}` collects tensors for an op, e.g. concat or stack"
            reader.add("collecting-one", what, reference.mark)
    lacking = [sorted(ours - set(reference.template.captures)) for reference in references(term)]
    fewest = min(lacking, key=len, default=sorted(ours))
    if isinstance(term, OpTerm) and fewest:
        name = fewest[0]
        what = f"no name in the op has all captures of `{target}`: {{{name}}} is missing"
        reader.add("unbound-capture", what, term.mark, f"`for: {{{name}: 8}}` counts it from 0 to 7")


def read_drops(
    reader: NodeReader, node: Node, known: frozenset[str] | None, *, optional: bool = False
) -> tuple[Drop, ...]:
    """Reads ``drop:``, a list of references."""
    if not isinstance(node, Items):
        reader.add("wrong-kind", "`drop` is a list of `- source:name` lines", node.mark)
        return ()
    return tuple(_drops(reader, node, known, optional=optional))


def _drops(reader: NodeReader, items: Items, known: frozenset[str] | None, *, optional: bool) -> Iterator[Drop]:
    for node in items.nodes:
        if not isinstance(node, Scalar):
            reader.add("wrong-kind", "a drop is one `source:name`", node.mark)
            continue
        reference = read_reference(reader, node, known)
        if reference is not None:
            yield Drop(reference.source, reference.template, reference.mark, optional)
