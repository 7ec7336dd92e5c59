"""The places of the code that can be changed, in an order drawn at random that later edits of the code do not upset."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from parso.tree import BaseNode

from tests.mutants.kinds import Kinds

plugins.OPERATOR_PROVIDERS["shardmerge"] = Kinds()

ROOMS = ("storage", "execute", "publish", "sources")


@dataclass(frozen=True)
class Place:
    """A place and the change drawn for it.

    Attributes
    ----------
    module
        Its path from the root.
    key
        Module, function, kind of change, line of code and the how-manieth of these: the same after edits elsewhere.
    line, first
        Its line, and that where its statement begins.
    operator, occurrence
        The change, as Cosmic Ray counts.
    """

    module: str
    key: str
    line: int
    first: int
    operator: str
    occurrence: int

    @property
    def room(self) -> str:
        """The package that it is in."""
        return self.module.split("/")[1]

    def changed(self, root: Path) -> str:
        """Returns the module's text with the change."""
        operator = plugins.get_operator(self.operator)()
        text: str | None = MutationVisitor.mutate_code((root / self.module).read_text(), operator, self.occurrence)
        assert text is not None
        return text


def places(root: Path, room: str, seed: int) -> list[Place]:
    """Returns all places of a room, in the order in which they are tried."""
    found = [place for path in sorted((root / "shardmerge" / room).glob("*.py")) for place in _in(root, path, seed)]
    return sorted(found, key=lambda place: _drawn(seed, place.key))


def _drawn(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _in(root: Path, path: Path, seed: int) -> Iterator[Place]:
    """Yields the places of a module; where several changes of one kind are possible, one is drawn."""
    module, text = str(path.relative_to(root)), path.read_text()
    lines, tree, seen = text.splitlines(), get_ast(text), Counter[str]()
    for (start, kind), (changes, node) in sorted(_changes(tree).items(), key=lambda one: one[0]):
        said = f"{module} {_function(node)} {kind}: {lines[start[0] - 1].strip()}"
        seen[said] += 1
        key = f"{said} #{seen[said]}" if seen[said] > 1 else said
        drawn = changes[int.from_bytes(_drawn(seed, f"{key}:which")[:8], "big") % len(changes)]
        yield Place(module, key, start[0], _statement(node).start_pos[0], *drawn)


def _changes(tree: Any) -> Mapping[tuple[Any, str], tuple[list[tuple[str, int]], Any]]:
    """Returns by position and kind the operators that change it, and the node."""
    found: dict[tuple[Any, str], tuple[list[tuple[str, int]], Any]] = defaultdict(lambda: ([], None))
    nodes = list(ast_nodes(tree))
    for name in plugins.operator_names():
        operator: type[Operator] = plugins.get_operator(name)
        if operator.arguments():
            continue
        # "ReplaceComparisonOperator_Lt_Gt" and "..._Lt_Eq" are changes of one place.
        kind = name.partition("/")[2].rpartition("_")[0] or name.partition("/")[2]
        spots = ((node, start) for node in nodes for start, _ in operator().mutation_positions(node))
        for occurrence, (node, start) in enumerate(spots):
            at = _leaf(node, start)
            if not _is_left_out(at, kind):
                changes, _ = found[start, kind]
                found[start, kind] = [*changes, (name, occurrence)], at
    return found


def _leaf(node: Any, start: Any) -> Any:
    if not isinstance(node, BaseNode) or node.type in ("simple_stmt", "decorator"):
        return node
    return node.get_leaf_for_position(start, include_prefixes=True)


def _is_left_out(node: Any, kind: str) -> bool:
    """Tells whether nobody can see the change, or what is changed is a text for people.

    Types are for mypy. A class that is frozen or has slots, and ``strict=True`` of ``zip``, keep writers of the code
    from mistakes. A cache saves time.
    """
    if node.type == "decorator":
        return "cache" in node.get_code()
    if kind.startswith("ReplaceBinaryOperator") and _is_star(node):
        return True
    above = list(_above(node))
    if any(one.type in ("decorator", "fstring", "import_from") or _is_words(one, above) for one in above):
        return True
    if kind == "ReplaceWord" and any(_is_type(one) for one in above):
        return True
    return any(_is_annotation(one, above) or _of_type_checking(one) for one in above)


def _is_star(node: Any) -> bool:
    before = node.get_previous_sibling()
    return before is None or node.parent.type == "parameters" or before.get_code().strip() in ("(", ",", "{", "[", "=")


def _is_words(node: Any, inside: list[Any]) -> bool:
    """Tells whether the way up goes through the message of an error, or what it says was found and expected."""
    if node.type == "argument" and node.children[0].get_code().strip() in ("found", "expected", "strict"):
        return True
    if node.type != "arglist" or not node.parent.get_previous_sibling():
        return False
    called, message = node.parent.get_previous_sibling().get_code().strip(), node.children[2:3]
    return called.endswith("Error") and any(one in inside for one in message)


def _above(node: Any) -> Iterator[Any]:
    while node is not None:
        yield node
        node = node.parent


def _is_annotation(node: Any, inside: list[Any]) -> bool:
    """Tells whether the way up to ``node`` goes through the type it states of a parameter, a result or a name."""
    if node.type == "funcdef":
        return node.annotation is not None and node.annotation in inside
    if node.type in ("annassign", "tfpdef"):
        return node.children[2 if node.type == "tfpdef" else 1] in inside
    return False


def _is_type(node: Any) -> bool:
    code = node.get_code()
    if node.type in ("atom_expr", "power"):
        return code.lstrip().startswith(("Literal[", "cast("))
    return node.type == "expr_stmt" and (": TypeAlias" in code or code.lstrip().startswith("__all__"))


def _of_type_checking(node: Any) -> bool:
    return node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING"


def _statement(node: Any) -> Any:
    """Returns the statement or the head of the block that ``node`` is in."""
    found = node
    for one in _above(node):
        if one.type in ("suite", "file_input"):
            return found
        found = one
    return found


def _function(node: Any) -> str:
    names = [one.name.value for one in _above(node) if one.type in ("funcdef", "classdef")]
    return ".".join(reversed(names)) or "module"
