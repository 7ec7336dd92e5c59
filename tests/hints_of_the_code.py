"""Every hint that the code can give, read from the code itself.

A hint is what is given as ``hint`` or ``remedy`` of an error, assigned to one's ``hint``, or printed after ``hint: ``.
Functions that make hints are followed to what they return, names to what they are given.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

PACKAGE = Path(__file__).parent.parent / "shardmerge"

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_GIVEN_AS = ("hint", "remedy")
_PRINTED = "hint: "
_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Hint:
    """A hint of the code.

    Attributes
    ----------
    place
        Module and line, for people.
    code
        Of the error; empty where it is not a literal.
    text
        As written, every part that is computed as ``{}``.
    """

    place: str
    code: str
    text: str

    def gives(self, code: str, hint: str) -> bool:
        """Tells whether an error with this code and hint may be of this line."""
        pattern = ".*".join(re.escape(part) for part in self.text.split("{}"))
        return (not self.code or self.code == code) and re.fullmatch(pattern, hint, re.DOTALL) is not None


@dataclass(frozen=True)
class _Scope:
    """Where an expression stands: its module, by name, and the function around it."""

    trees: Mapping[str, ast.Module]
    module: str
    function: _Function | None = None
    depth: int = 0

    @property
    def tree(self) -> ast.Module:
        return self.trees[self.module]

    def parameters(self) -> set[str]:
        if self.function is None:
            return set()
        return {one.arg for one in (*self.function.args.args, *self.function.args.kwonlyargs)}

    def assigned(self, name: str, line: int) -> list[ast.expr]:
        """What a name is given in the innermost block around a line that gives it something, or else in the module."""
        for block in (*self._blocks(line), self.tree.body):
            found = [value for node in block for value in _values(node, name)]
            if found:
                return found
        return []

    def _blocks(self, line: int) -> list[list[ast.stmt]]:
        """The lists of statements of the function around a line, the innermost first."""
        inside = ast.walk(self.function) if self.function else ()
        every = [getattr(node, part, None) for node in inside for part in ("body", "orelse", "finalbody")]
        around = [
            block for block in every
            if isinstance(block, list) and block and block[0].lineno <= line <= (block[-1].end_lineno or 0)
        ]  # fmt: skip
        return around[::-1]

    def imported(self, name: str) -> _Scope | None:
        """The module of the package that a name comes from."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
                module = (node.module or "").removeprefix("shardmerge.")
                return replace(self, module=module, function=None) if module in self.trees else None
        return None

    def called(self, name: str) -> Iterator[_Scope]:
        """The functions of a name, in this module or where it is imported from."""
        for node in ast.walk(self.tree):
            if isinstance(node, _Function) and node.name == name:
                yield replace(self, function=node, depth=self.depth + 1)


def _values(statement: ast.stmt, name: str) -> Iterator[ast.expr]:
    """What a statement gives a name: in an assignment, also of several names, or inside of an expression."""
    for node in ast.walk(statement):
        if isinstance(node, ast.NamedExpr) and node.target.id == name:
            yield node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id == name:
                yield node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
                yield from (value for one, value in pairs if isinstance(one, ast.Name) and one.id == name)


@cache
def all_hints() -> tuple[Hint, ...]:
    """Returns all of them, each text of a code once, in the order of the files."""
    trees = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    found: dict[tuple[str, str], Hint] = {}
    for module in trees:
        for hint in _of_module(_Scope(trees, module)):
            found.setdefault((hint.code, hint.text), hint)
    return tuple(found.values())


def _of_module(scope: _Scope) -> Iterator[Hint]:
    makers = _makers(scope.tree) | {
        name: place
        for node in ast.walk(scope.tree)
        if isinstance(node, ast.ImportFrom)
        for name, place in _makers(*_classes_of(node, scope.trees)).items()
    }
    for function in ast.walk(scope.tree):
        if not isinstance(function, _Function):
            continue
        inside = replace(scope, function=function)
        for code, value in _given(function, makers):
            for text in _texts(value, inside):
                yield Hint(f"{scope.module.replace('.', '/')}.py:{value.lineno}", _code(code, inside), text)


def _makers(*trees: ast.AST) -> dict[str, int]:
    """Functions and methods that are given a hint, with its place among their arguments."""
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, _Function))
    arguments = {node.name: [one.arg for one in node.args.args if one.arg != "self"] for node in functions}
    return {name: names.index("hint") for name, names in arguments.items() if "hint" in names}


def _classes_of(node: ast.ImportFrom, trees: Mapping[str, ast.Module]) -> Iterator[ast.ClassDef]:
    """The classes of the package that an import names: their methods are called where they are used."""
    tree = trees.get((node.module or "").removeprefix("shardmerge."))
    names = {one.name for one in node.names}
    return (one for one in (tree.body if tree else ()) if isinstance(one, ast.ClassDef) and one.name in names)


def _given(function: _Function, makers: Mapping[str, int]) -> Iterator[tuple[ast.expr | None, ast.expr]]:
    """The code, where there is one, and the hint of every error that a function makes."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(
            isinstance(one, ast.Attribute) and one.attr == "hint" for one in node.targets
        ):
            yield None, node.value
        if not isinstance(node, ast.Call):
            continue
        first = node.args[0] if node.args else None
        for keyword in node.keywords:
            if keyword.arg in _GIVEN_AS:
                yield first, keyword.value
        name = _name(node)
        if name in makers and len(node.args) > makers[name]:
            yield first, node.args[makers[name]]
        if name == "Component" and len(node.args) > 2:
            yield None, node.args[2]
        if isinstance(first, ast.Constant) and str(first.value).startswith(_PRINTED):
            yield None, ast.copy_location(ast.Constant(str(first.value).removeprefix(_PRINTED)), first)


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _code(value: ast.expr | None, scope: _Scope) -> str:
    found = _texts(value, scope) if isinstance(value, ast.Constant | ast.Name) else []
    return found[0] if len(found) == 1 and _CODE.fullmatch(found[0]) else ""


def _texts(value: ast.expr, scope: _Scope) -> list[str]:
    """The texts that an expression may come to; none for a hint that is passed on and followed where it is made."""
    if isinstance(value, ast.Constant):
        return [value.value] if isinstance(value.value, str) and value.value else []
    read = _READERS.get(type(value))
    return read(value, scope) if read else ["{}"]


def _either(value: ast.IfExp, scope: _Scope) -> list[str]:
    return [*_texts(value.body, scope), *_texts(value.orelse, scope)]


def _any_of(value: ast.BoolOp, scope: _Scope) -> list[str]:
    return [text for one in value.values for text in _texts(one, scope)]


def _added(value: ast.BinOp, scope: _Scope) -> list[str]:
    if not isinstance(value.op, ast.Add):
        return ["{}"]
    ends = _texts(value.right, scope) or ["{}"]
    return [a + b for a in _texts(value.left, scope) or ["{}"] for b in ends]


def _of_attribute(value: ast.Attribute, scope: _Scope) -> list[str]:
    if value.attr in _GIVEN_AS:
        return []
    return [text for one in scope.called(value.attr) for text in _returned(one)] or ["{}"]


def _joined(value: ast.JoinedStr, scope: _Scope) -> list[str]:
    """Parts that are written out elsewhere, a constant or a condition, are put in."""
    texts = [""]
    for part in value.values:
        inner = ["{}"]
        if isinstance(part, ast.Constant):
            inner = [str(part.value)]
        elif (
            isinstance(part, ast.FormattedValue)
            and isinstance(part.value, ast.Name)
            and part.value.id.strip("_").isupper()
        ):
            inner = _of_name(part.value, scope)
        texts = [before + after for before in texts for after in inner]
    return texts


def _of_name(name: ast.Name, scope: _Scope) -> list[str]:
    if name.id in scope.parameters():
        return [] if name.id in _GIVEN_AS else ["{}"]  # a hint that is a parameter is followed where it is given
    values = scope.assigned(name.id, name.lineno)
    if not values and (other := scope.imported(name.id)) is not None:
        return _of_name(name, other)
    return [text for value in values for text in _texts(value, scope)] or ["{}"]


def _of_call(call: ast.Call, scope: _Scope) -> list[str]:
    """What the package's own functions return; ``"...".format(...)`` is its text."""
    if isinstance(call.func, ast.Attribute) and call.func.attr in ("format", "join"):
        return _of_text_call(call, scope)
    name = _name(call)
    if name == "next" and len(call.args) == 2:
        return [text for one in call.args for text in _texts(one, scope)]
    own = list(scope.called(name))
    if not own and (other := scope.imported(name)) is not None:
        own = list(replace(other, depth=scope.depth).called(name))
    if not own and isinstance(call.func, ast.Attribute):
        own = list(_methods(call.func, scope))
    texts = [text for one in own if one.depth < 4 for text in _returned(one)]
    return texts or ["{}"]


def _methods(method: ast.Attribute, scope: _Scope) -> Iterator[_Scope]:
    """The method of a parameter, where its class is one of the package."""
    arguments = scope.function.args.args if scope.function is not None else []
    kinds = {one.arg: one.annotation.id for one in arguments if isinstance(one.annotation, ast.Name)}
    kind = kinds.get(method.value.id, "") if isinstance(method.value, ast.Name) else ""
    other = scope.imported(kind)
    for node in other.tree.body if other is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == kind:
            found = (one for one in node.body if isinstance(one, _Function) and one.name == method.attr)
            yield from (replace(other, function=one, depth=scope.depth + 1) for one in found if other is not None)


def _of_text_call(call: ast.Call, scope: _Scope) -> list[str]:
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr == "format":
        return _texts(call.func.value, scope)
    parts = call.args[0]
    if isinstance(parts, ast.Tuple):
        known = [one for one in parts.elts if not isinstance(one, ast.Starred)]
        return ["{}".join(_texts(one, scope)[0] for one in known)]
    return [f"{text}{{}}" for text in _texts(parts, scope)]


def _returned(scope: _Scope) -> list[str]:
    assert scope.function is not None
    values = [node.value for node in ast.walk(scope.function) if isinstance(node, ast.Return) and node.value]
    return list(dict.fromkeys(text for value in values for text in _texts(value, scope)))


_READERS: Mapping[type[ast.expr], Callable[..., list[str]]] = {
    ast.JoinedStr: _joined,
    ast.IfExp: _either,
    ast.BoolOp: _any_of,
    ast.BinOp: _added,
    ast.Subscript: lambda value, scope: _texts(value.value, scope),
    ast.Attribute: _of_attribute,
    ast.Name: _of_name,
    ast.NamedExpr: lambda value, scope: _texts(value.value, scope),
    ast.GeneratorExp: lambda value, scope: _texts(value.elt, scope),
    ast.Call: _of_call,
}
