"""Every hint that the code can give, read from the code itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "shardmerge"

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
# Errors that take the hint of another one along: it is followed where it is made.
_PASSED_ON = {"error.hint", "first.hint"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


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
        As written, every part that is computed as ``{}``; ``{}`` alone where all of it is.
    """

    place: str
    code: str
    text: str

    def gives(self, code: str, hint: str) -> bool:
        """Tells whether an error with this code and hint may be of this line."""
        pattern = ".*".join(re.escape(part) for part in self.text.split("{}"))
        return (not self.code or self.code == code) and re.fullmatch(pattern, hint, re.DOTALL) is not None


@cache
def all_hints() -> tuple[Hint, ...]:
    """Returns all of them, each text of a code once, in the order of the files."""
    found: dict[tuple[str, str], Hint] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for hint in _of_module(ast.parse(path.read_text("utf-8")), str(path.relative_to(PACKAGE))):
            found.setdefault((hint.code, hint.text), hint)
    return tuple(found.values())


def _of_module(module: ast.Module, name: str) -> Iterator[Hint]:
    makers = {
        node.name: [argument.arg for argument in node.args.args if argument.arg != "self"].index("hint")
        for node in ast.walk(module)
        if isinstance(node, _Function) and "hint" in [argument.arg for argument in node.args.args]
    }
    for function in ast.walk(module):
        if isinstance(function, _Function):
            yield from _of_function(function, name, makers)


def _of_function(function: _Function, module: str, makers: Mapping[str, int]) -> Iterator[Hint]:
    named = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        value = next((keyword.value for keyword in node.keywords if keyword.arg == "hint"), None)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if value is None and called in makers and len(node.args) > makers[called]:
            value = node.args[makers[called]]
        if value is None or ast.unparse(value) in _PASSED_ON:
            continue
        if isinstance(value, ast.Name) and value.id in named:
            continue  # a parameter: followed where it is given
        first = node.args[0] if node.args else None
        literal = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
        code = literal if _CODE.fullmatch(literal) else ""
        for text in _texts(value, function):
            yield Hint(f"{module}:{value.lineno}", code, text)


def _texts(value: ast.expr, function: _Function) -> list[str]:
    """The texts that an expression may come to: both sides of a condition, either of an ``or``, what a name is given."""
    match value:
        case ast.Constant():
            return [value.value] if isinstance(value.value, str) and value.value else []
        case ast.JoinedStr():
            return ["".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in value.values)]
        case ast.IfExp():
            return [*_texts(value.body, function), *_texts(value.orelse, function)]
        case ast.BoolOp():
            return [text for one in value.values for text in _texts(one, function)]
        case ast.BinOp(op=ast.Add()):
            right = _texts(value.right, function) or ["{}"]
            return [a + b for a in _texts(value.left, function) or ["{}"] for b in right]
        case ast.Name():
            return _given_to(value.id, function) or ["{}"]
    return ["{}"]


def _given_to(name: str, function: _Function) -> list[str]:
    found = []
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            found += _texts(node.value, function)
    return found
