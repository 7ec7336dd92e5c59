"""Nodes of a YAML file as values of the right kind, and all that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shardmerge.errors import MappingError, ShardmergeError, UsageError
from shardmerge.formulas import Formula
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.yaml_nodes import Items, Mark, Node, Scalar, Table

_Value = TypeVar("_Value")


@dataclass(slots=True)
class NodeReader:
    """Turns nodes into values and collects what is wrong with them."""

    file: str
    problems: list[ShardmergeError] = field(default_factory=list)

    def add(self, code: str, what: str, mark: Mark, hint: str = "") -> None:
        """Remembers a problem."""
        self.problems.append(MappingError(code, what, where=str(mark), hint=hint))

    def table(self, node: Node, what: str) -> Table:
        """Returns the node as a mapping, an empty one if it is something else."""
        if isinstance(node, Table):
            return node
        self.add("wrong-kind", f"{what} is a set of `key: value` lines", node.mark)
        return Table((), node.mark)

    def fields(self, table: Table, known: tuple[str, ...]) -> dict[str, Node]:
        """Returns the values by key; unknown keys are problems."""
        for key, _ in table.entries:
            if key.text not in known:
                self.add("unknown-key", f"unknown key `{key.text}`", key.mark, did_you_mean(key.text, known))
        return {key.text: node for key, node in table.entries if key.text in known}

    def text(self, node: Node, what: str) -> str:
        """Returns the node's text, or ``""`` with a problem."""
        if isinstance(node, Scalar) and not node.empty:
            return node.text
        self.add("wrong-kind", f"`{what}` is a piece of text", node.mark)
        return ""

    def flag(self, node: Node, what: str) -> bool:
        """Returns true or false; YAML 1.1's yes and no are not taken."""
        if isinstance(node, Scalar) and not node.quoted and node.text in ("true", "false"):
            return node.text == "true"
        self.add("wrong-kind", f"`{what}` is true or false", node.mark)
        return False

    def version(self, node: Node | None, key: str, mark: Mark) -> None:
        """Checks ``shardmerge: 1``."""
        if node is None:
            self.add("no-version", f"the first line says `{key}: 1`", mark, f"add `{key}: 1`")
        elif not isinstance(node, Scalar) or node.text != "1":
            self.add("unknown-version", f"this shardmerge reads `{key}: 1`", node.mark, f"write `{key}: 1`")

    def items(self, node: Node | None, what: str) -> tuple[Node, ...]:
        """Returns the nodes of a list, none with a problem if it is something else."""
        if node is None:
            return ()
        if not isinstance(node, Items):
            self.add("wrong-kind", f"`{what}` is a list", node.mark, f"write `{what}: [...]`")
            return ()
        return node.nodes

    def said(self, node: Node | None, what: str, read: Callable[[str], _Value]) -> _Value | None:
        """Returns what ``read`` makes of the text; its error gets the place in the file."""
        if node is None:
            return None
        try:
            return read(self.text(node, what))
        except UsageError as error:
            self.problems.append(
                MappingError(error.code, error.what, where=str(node.mark), expected=error.expected, hint=error.hint)
            )
            return None

    def count(self, node: Node, what: str) -> int:
        """Returns a whole number, 0 with a problem for anything else."""
        text = self.text(node, what)
        if text.isascii() and text.isdigit() and len(text) < 12:
            return int(text)
        self.add("wrong-kind", f"`{what}` is a whole number", node.mark)
        return 0

    def template(self, text: str, mark: Mark) -> Template | None:
        """Returns the template that a text says."""
        try:
            template = Template.parse(text, mark)
        except MappingError as error:
            self.problems.append(error)
            return None
        return template

    def formula(self, text: str, mark: Mark) -> Formula | None:
        """Returns the formula that a text says, None without a word for an empty one."""
        if not text:
            return None
        try:
            return Formula.parse(text, str(mark))
        except MappingError as error:
            self.problems.append(error)
            return None
