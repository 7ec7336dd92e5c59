"""Every error code that shardmerge can raise, read from its source.

A code is the first argument of an error class, or the argument ``code`` of a function that passes it on to one. It is a
literal, a choice between literals, a constant of the module, or a variable ``code`` that is given one of these; all
else is told as unresolved.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from shardmerge import errors

PACKAGE = Path(errors.__file__).parent
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.ShardmergeError) and kind is not errors.Problems
}


@dataclass
class Raised:
    """What the source raises.

    Attributes
    ----------
    classes
        The error classes by code.
    unresolved
        Calls whose code is none of the forms above.
    """

    classes: dict[str, set[type[errors.ShardmergeError]]] = field(default_factory=lambda: defaultdict(set))
    unresolved: list[str] = field(default_factory=list)


def raised() -> Raised:
    """Reads all modules."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    passing = {(path.parent, name): how for path, tree in trees.items() for name, how in _passing_on(tree)}
    found = Raised()
    for path, tree in trees.items():
        near = {name: how for (folder, name), how in passing.items() if folder == path.parent}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (_name(node) in CLASSES or _name(node) in near):
                _add(found, node, path, near)
            elif isinstance(node, ast.Assign):
                for code in _assigned(node, _module(path)):
                    found.classes[code] |= {CLASSES[_name(call)] for call in _of_variable(tree)}
    return found


def _assigned(node: ast.Assign, module: ModuleType) -> Iterator[str]:
    """Yields what a variable ``code`` is given, alone or as one of several."""
    for target in node.targets:
        several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
        for name, value in pairs:
            if isinstance(name, ast.Name) and name.id == "code":
                yield from _codes(value, module)


def _of_variable(tree: ast.Module) -> Iterator[ast.Call]:
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and _name(call) in CLASSES and ast.unparse(call.args[0]) == "code":
            yield call


def _passing_on(tree: ast.Module) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yields functions with a parameter ``code`` that make an error of it: its place, and the class."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [one.arg for one in function.args.args if one.arg not in ("self", "cls")]
        for call in ast.walk(function) if "code" in names else ():
            if isinstance(call, ast.Call) and _name(call) in CLASSES and ast.unparse(call.args[0]) == "code":
                yield function.name, (names.index("code"), _name(call))


def _add(found: Raised, call: ast.Call, path: Path, passing: dict[str, tuple[int, str]]) -> None:
    name = _name(call)
    place, kind = passing.get(name, (0, name))
    given = call.args[place] if place < len(call.args) else None
    codes = list(_codes(given, _module(path))) if given is not None else []
    if name in CLASSES and not codes and not _passed_on(given):
        found.unresolved.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)[:80]}")
    for code in codes:
        if name in CLASSES or "-" in code:  # a set has a method `add` too
            found.classes[code].add(CLASSES[kind])


def _codes(given: ast.expr, module: ModuleType) -> Iterator[str]:
    if isinstance(given, ast.IfExp):
        yield from _codes(given.body, module)
        yield from _codes(given.orelse, module)
    elif isinstance(given, ast.Constant) and isinstance(given.value, str) and CODE.fullmatch(given.value):
        yield given.value
    elif isinstance(given, ast.Name) and given.id.isupper():
        yield str(getattr(module, given.id))


def _passed_on(given: ast.expr | None) -> bool:
    """Another error's code, or the parameter of a function whose calls are read."""
    return given is None or (isinstance(given, ast.Attribute) and given.attr == "code") or ast.unparse(given) == "code"


def _module(path: Path) -> ModuleType:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return importlib.import_module(".".join(part for part in parts if part != "__init__"))


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
