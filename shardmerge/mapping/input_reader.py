"""What a mapping says of its sources: ``sources:``, ``adapters:`` and the numbers of ``let:``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.renaming import Renaming, reversible
from shardmerge.mapping.spec import (
    ADAPTER_KEYS,
    ADAPTER_SETTINGS,
    SOURCE_KEYS,
    AdapterSpec,
    Reference,
    SourceSpec,
    Variable,
)
from shardmerge.mapping.term_reader import SOURCE_NAME, read_reference
from shardmerge.mapping.yaml_nodes import Items, Mark, Node, Scalar


def read_sources(reader: NodeReader, node: Node | None, mark: Mark) -> dict[str, SourceSpec]:
    """Reads ``sources:``."""
    if node is None:
        reader.add("no-sources", "the mapping has no `sources:`", mark, "add `sources: {trained: PATH}`")
        return {}
    found = {}
    for key, value in reader.table(node, "`sources`").entries:
        if not SOURCE_NAME.fullmatch(key.text):
            reader.add(
                "bad-source-name", f"{key.text!r} cannot name a source", key.mark, f"call it `{_plain(key.text)}`"
            )
        found[key.text] = _source(reader, key, value)
    return found


def _source(reader: NodeReader, key: Scalar, node: Node) -> SourceSpec:
    if isinstance(node, Scalar):
        return SourceSpec(key.text, reader.text(node, key.text), mark=key.mark)
    fields = reader.fields(reader.table(node, f"`{key.text}`"), SOURCE_KEYS)
    if "path" not in fields:
        reader.add("no-path", f"the source `{key.text}` has no path", key.mark, "add `path: PATH`")
    view = reader.text(fields["view"], "view") if "view" in fields else ""
    if view not in ("", "fp32", "module"):
        reader.add(
            "unknown-view",
            f"there is no view {view!r}",
            fields["view"].mark,
            "write `view: module` or `view: fp32`",
        )
    return SourceSpec(
        key.text,
        reader.text(fields["path"], "path") if "path" in fields else "",
        reader.flag(fields["required"], "required") if "required" in fields else True,
        view,
        reader.text(fields["root"], "root") if "root" in fields else "",
        key.mark,
        tuple(reader.text(one, "strip") for one in _one_or_more(fields.get("strip"))),
    )


def _one_or_more(node: Node | None) -> tuple[Node, ...]:
    if node is None:
        return ()
    return node.nodes if isinstance(node, Items) else (node,)


def read_adapters(
    reader: NodeReader, node: Node, known: frozenset[str] | None, *, optional: bool = False
) -> tuple[AdapterSpec, ...]:
    """Reads ``adapters:``, a list of ``{from: source, onto: source}``."""
    found = (_adapter(reader, item, known, optional=optional) for item in reader.items(node, "adapters"))
    adapters = tuple(adapter for adapter in found if adapter is not None)
    seen: dict[tuple[str, ...], Mark] = {}
    for one in adapters:
        key = (one.source.source, one.source.template.text, one.onto.source, one.settings.get("name", ""))
        if key in seen:
            what = f"the adapter `{one.source.source}` is merged into `{one.onto.source}` twice"
            reader.add("adapter-twice", what, one.mark, f"remove one of the two; the other is at {seen[key]}")
        seen[key] = one.mark
    return adapters


def _adapter(reader: NodeReader, node: Node, known: frozenset[str] | None, *, optional: bool) -> AdapterSpec | None:
    fields = reader.fields(reader.table(node, "an adapter"), (*ADAPTER_KEYS, *ADAPTER_SETTINGS))
    for key in ("from", "onto"):
        if key not in fields:
            reader.add(
                "missing-parameter",
                f"an adapter needs `{key}: source`",
                node.mark,
                "write `{from: ADAPTER, onto: BASE}`",
            )
    if "from" not in fields or "onto" not in fields:
        return None
    source, onto = (_whole(reader, fields[key], key, known) for key in ("from", "onto"))
    if source is None or onto is None:
        return None
    said = {key: reader.text(fields[key], key) for key in ADAPTER_SETTINGS if key in fields}
    renames = tuple(_renamings(reader, fields["rename"])) if "rename" in fields else ()
    return AdapterSpec(source, onto, said, node.mark, optional, renames)


def _renamings(reader: NodeReader, node: Node) -> Iterator[Renaming]:
    """Yields the pairs of ``rename: {template: template}``, the adapter's names and the base's."""
    for key, value in reader.table(node, "`rename`").entries:
        old, new = reader.template(key.text, key.mark), reader.template(reader.text(value, key.text), value.mark)
        if old is None or new is None:
            continue
        if reversible(found := Renaming(old, new)):
            yield found
        else:
            what = f"`{old}` and `{new}` bind other names: one module would be two, or two would be one"
            reader.add("odd-rename", what, key.mark, 'write both sides alike: `{"model.{rest...}": "{rest...}"}`')


def _whole(reader: NodeReader, node: Node, what: str, known: frozenset[str] | None) -> Reference | None:
    """Reads a source's name, or ``source:template`` with one ``{rest...}``."""
    text = reader.text(node, what)
    if not text or not isinstance(node, Scalar):
        return None
    reference = read_reference(reader, node if ":" in text else Scalar(f"{text}:{{rest...}}", node.mark, False), known)
    if reference is not None and reference.template.captures != ("rest",):
        reader.add(
            "bad-capture",
            f"`{what}` has one capture, `{{rest...}}`",
            node.mark,
            f'write `{text.partition(":")[0]}` alone, or a prefix: `"{text.partition(":")[0]}:llm.{{rest...}}"`',
        )
        return None
    return reference


def read_variables(reader: NodeReader, node: Node) -> dict[str, Variable]:
    """Reads ``let:``, a set of names with formulas."""
    found = {}
    for key, value in reader.table(node, "`let`").entries:
        if not key.text.isidentifier():
            reader.add(
                "bad-name",
                f"{key.text!r} cannot name a number",
                key.mark,
                f"call it `{_plain(key.text).replace('-', '_')}`",
            )
            continue
        formula = reader.formula(reader.text(value, key.text), value.mark)
        if formula is not None:
            found[key.text] = Variable(formula, key.mark)
    return found


def _plain(text: str) -> str:
    """Returns a name near to one that cannot be."""
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).lstrip("0123456789_-") or "model"
