"""What `tensors:`, `drop:` and `target:` say, in a mapping.yaml and in a preset alike."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.yaml_nodes import QUOTE_BRACES, Items, Mark, Node, Scalar, Table

SOURCE_NAME = re.compile("[a-z][a-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Reference:
    """Tensors of a source: ``trained:llm.{rest...}``."""

    source: str
    template: Template
    mark: Mark

    def __str__(self) -> str:
        return f"{self.source}:{self.template}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Target tensors and where they come from: the first candidate that really has a tensor wins."""

    target: Template
    candidates: tuple[Reference, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Drop:
    """Source tensors that go nowhere, said so by name."""

    source: str
    template: Template
    mark: Mark

    def __str__(self) -> str:
        return f"{self.source}:{self.template}"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """The kind of directory to make, and which source plays which role in it."""

    name: str
    roles: Mapping[str, str]
    mark: Mark


class Findings:
    """The errors of a file, gathered so that all of them are shown at once."""

    def __init__(self) -> None:
        self.errors: list[ShardmergeError] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keeps what its block raises and goes on behind it."""
        try:
            yield
        except ShardmergeError as error:
            self.errors.extend(error.each())

    def raise_all(self) -> None:
        """Raises what was gathered, if anything was."""
        raise_all(self.errors)


# --- nodes ---


def fields(node: Node, known: Collection[str], what: str, findings: Findings) -> dict[str, Node]:
    """Returns the values of a table by key, and notes the keys that are not ``known``."""
    table = as_table(node, what)
    for key, _ in table.entries:
        if key.text not in known:
            findings.errors.append(_unknown_key(key, known, what))
    return {key.text: value for key, value in table.entries if key.text in known}


def _unknown_key(key: Scalar, known: Collection[str], what: str) -> MappingError:
    hint = did_you_mean(key.text, known)
    return MappingError("unknown-key", f"{what} has no key `{key.text}`", where=str(key.mark), hint=hint)


def required_field(found: Mapping[str, Node], key: str, what: str, node: Node) -> Node:
    """Returns the value of a key that must be there.

    Raises
    ------
    MappingError
        ``missing-key``.
    """
    if key not in found:
        raise MappingError("missing-key", f"{what} needs the key `{key}`", where=str(node.mark))
    return found[key]


def as_table(node: Node, what: str) -> Table:
    """Returns the node if it is a table; raises ``wrong-kind`` otherwise."""
    if isinstance(node, Table):
        return node
    raise MappingError("wrong-kind", f"{what} must be a table of `key: value` lines", where=str(node.mark))


def as_items(node: Node, what: str) -> Items:
    """Returns the node if it is a list; raises ``wrong-kind`` otherwise."""
    if isinstance(node, Items):
        return node
    raise MappingError("wrong-kind", f"{what} must be a list of `- item` lines", where=str(node.mark))


def as_text(node: Node, what: str) -> Scalar:
    """Returns the node if it is text that says something; raises ``wrong-kind`` or ``missing-value`` otherwise."""
    if not isinstance(node, Scalar):
        # `[src:{x}]` reads as a list that holds a table: the braces want quotes.
        raise MappingError("wrong-kind", f"{what} must be text", where=str(node.mark), hint=QUOTE_BRACES)
    if node.empty:
        raise MappingError("missing-value", f"{what} is empty", where=str(node.mark))
    return node


def as_flag(node: Node, what: str) -> bool:
    """Returns what a bare ``true`` or ``false`` says; raises ``wrong-kind`` for anything else."""
    scalar = as_text(node, what)
    if scalar.quoted or scalar.text.lower() not in {"true", "false"}:
        found = scalar.text[:40]
        raise MappingError(
            "wrong-kind", f"{what} must be `true` or `false`", where=str(scalar.mark), found=found
        )
    return scalar.text.lower() == "true"


# --- tensors, drop, target ---


def parse_rules(node: Node, sources: Collection[str], findings: Findings) -> tuple[Rule, ...]:
    """Returns the rules of a `tensors:` table, and notes what is wrong with any of them."""
    rules = []
    for key, value in as_table(node, "`tensors`").entries:
        with findings.collecting():
            rules.append(_rule(key, value, sources))
    return tuple(rules)


def _rule(key: Scalar, value: Node, sources: Collection[str]) -> Rule:
    if isinstance(value, Table):
        raise _not_a_reference(value)
    target = _template(key.text, key.inside)
    nodes = value.nodes if isinstance(value, Items) else (value,)
    if not nodes:
        raise MappingError("missing-value", f"`{target}` has no source", where=str(value.mark))
    findings = Findings()
    candidates = []
    for node in nodes:
        with findings.collecting():
            candidates.append(_candidate(node, target, sources))
    findings.raise_all()
    return Rule(target, tuple(candidates), key.mark)


def _not_a_reference(table: Table) -> MappingError:
    op = next((value for key, value in table.entries if key.text == "op"), None)
    if op is None:
        what = "a source is written `source:name`, or as a list of those"
        return MappingError("wrong-kind", what, where=str(table.mark), hint=QUOTE_BRACES)
    name = f" `{op.text}`" if isinstance(op, Scalar) else ""
    what = f"the op{name} is not read yet: this version gives tensors new names and dtypes only"
    return MappingError("op-not-yet", what, where=str(table.mark))


def _candidate(node: Node, target: Template, sources: Collection[str]) -> Reference:
    reference = _reference(as_text(node, "a source of a tensor"), sources)
    _same_captures(target, reference)
    return reference


def _same_captures(target: Template, reference: Reference) -> None:
    """Checks that names of both sides stand for each other one to one."""
    theirs, ours = reference.template.captures, target.captures
    for name in ours:
        if name not in theirs:
            what = f"`{{{name}}}` of the target `{target}` gets no value from `{reference}`"
            hint = f"use the capture `{name}` in the source too, or write the target name out"
            raise MappingError("unbound-capture", what, where=str(reference.mark), hint=hint)
    for name in theirs:
        if name not in ours:
            what = f"`{{{name}}}` of `{reference}` is not used by the target `{target}`: names would collide"
            hint = f"use the capture `{name}` in the target too"
            raise MappingError("unused-capture", what, where=str(reference.mark), hint=hint)


def _reference(scalar: Scalar, sources: Collection[str]) -> Reference:
    source, colon, name = scalar.text.partition(":")
    if not colon or not name:
        only = next(iter(sources), "source")
        raise MappingError(
            "bad-reference",
            f"`{scalar.text[:200]}` names no source: a reference is written `source:name`",
            where=str(scalar.mark),
            hint=f"`{only}:{scalar.text[:200].rstrip(':')}`",
        )
    if source not in sources:
        what = f"there is no source `{source[:80]}`"
        hint = did_you_mean(source, sources)
        raise MappingError("unknown-source", what, where=str(scalar.mark), hint=hint)
    return Reference(source, _template(name, scalar.inside.right(len(source) + 1)), scalar.mark)


def _template(text: str, mark: Mark) -> Template:
    template = Template.parse(text, mark)
    if template.collects:
        what = f"`{template}` collects many tensors into one, which is not read yet"
        raise MappingError("collect-not-yet", what, where=str(mark))
    return template


def parse_drops(node: Node, sources: Collection[str], findings: Findings) -> tuple[Drop, ...]:
    """Returns the templates of a `drop:` list, and notes what is wrong with any of them."""
    drops = []
    for item in as_items(node, "`drop`").nodes:
        with findings.collecting():
            reference = _reference(as_text(item, "an item of `drop`"), sources)
            drops.append(Drop(reference.source, reference.template, reference.mark))
    return tuple(drops)


def parse_target(node: Node, sources: Collection[str], findings: Findings) -> TargetSpec:
    """Returns what a `target:` table says, or bare text that names the target only."""
    if isinstance(node, Scalar):
        return TargetSpec(as_text(node, "`target`").text, {}, node.mark)
    table = as_table(node, "`target`")
    values = {key.text: value for key, value in table.entries}
    name = as_text(required_field(values, "name", "`target`", node), "the target's name").text
    roles = {}
    for role, value in values.items():
        if role != "name":
            with findings.collecting():
                roles[role] = _role(role, as_text(value, f"the role `{role}`"), sources)
    return TargetSpec(name, roles, node.mark)


def _role(role: str, value: Scalar, sources: Collection[str]) -> str:
    if value.text in sources:
        return value.text
    what = f"the role `{role}` is given to `{value.text[:80]}`, which is not a source"
    hint = did_you_mean(value.text, sources)
    raise MappingError("unknown-source", what, where=str(value.mark), hint=hint)
