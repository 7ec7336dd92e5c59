"""Kinds of changes that Cosmic Ray does not have: a statement or an argument is removed, a word becomes another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Newline
from parso.tree import NodeOrLeaf

# Names, codes, keys and suffixes; what has a space is a text for people.
_WORD = re.compile(r"""b?(["'])([\w.-]+)\1""")


class RemoveStatement(Operator):
    """Replaces a call, a ``raise``, a ``return``, and what is put into an attribute or an item by ``pass``."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[Any, Any]]:
        if _is_removable(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> NodeOrLeaf:
        node.children[0] = parso.parse(f"{node.get_first_leaf().prefix}pass")
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example("def f():\n    g(1)\n", "def f():\n    pass\n"), Example("a.b = 1\n", "pass\n")


def _is_removable(node: Any) -> bool:
    if node.type != "simple_stmt" or not isinstance(node.children[-1], Newline):
        return False
    what = node.children[0]
    if what.type == "expr_stmt":  # a plain name that gets no value fails anywhere below
        target, assigns = what.children[0], what.children[1]
        return target.type == "atom_expr" or (assigns.type == "operator" and assigns.value != "=")
    called = what.type in ("atom_expr", "power") and what.children[-1].get_code().endswith(")")
    return called or what.type in ("raise_stmt", "return_stmt")


class RemoveArgument(Operator):
    """Removes an argument that is given by its name, so that the default holds."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[Any, Any]]:
        for argument in _named(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> NodeOrLeaf:
        argument = list(_named(node))[index]
        inside = argument.parent
        if inside is node:  # the only one: "(", argument, ")"
            node.children.remove(argument)
            return node
        at = inside.children.index(argument)
        last = at == len(inside.children) - 1
        del inside.children[at - 1 if last else at : at + 1 if last else at + 2]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return Example("f(a, b=1)", "f(a)"), Example("f(b=1)", "f()"), Example("f(b=1, c=2)", "f( c=2)")


def _named(node: Any) -> Iterator[Any]:
    if node.type != "trailer" or node.children[0].value != "(" or len(node.children) != 3:
        return
    inside = node.children[1]
    for one in inside.children if inside.type == "arglist" else [inside]:
        if one.type == "argument" and one.children[1] == "=":
            yield one


class ReplaceWord(Operator):
    """Replaces a text of one word: an error code, a key, a file's suffix."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[Any, Any]]:
        if node.type == "string" and _WORD.fullmatch(node.value):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> NodeOrLeaf:
        node.value = _WORD.sub(lambda found: f"{found[0][:-1]}X{found[1]}", node.value)
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example('a["size"]', 'a["sizeX"]'),)


_KINDS = {kind.__name__: kind for kind in (RemoveStatement, RemoveArgument, ReplaceWord)}


class Kinds:
    """What Cosmic Ray asks of a provider of operators."""

    def __iter__(self) -> Iterator[str]:
        return iter(_KINDS)

    def __getitem__(self, name: str) -> type[Operator]:
        return _KINDS[name]
