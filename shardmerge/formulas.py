"""Small formulas: ``heads * head_dim``, ``llm.config.num_key_value_heads or heads``, ``i + 16``; in the tables of
architectures also conditions: ``layer >= first_k_dense_replace``.

The grammar is a small part of Python's expressions: numbers, names with dots, ``+ - * / // %``, brackets, and ``or``
between a value that may be absent and what stands in for it. A condition may also compare, look into a list, and say
``not`` and ``and``. Python's own parser reads it; nothing is executed.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.errors import MappingError

Number = int | float
FormulaValue: TypeAlias = "Number | str | bool | tuple[int, ...] | None"
Lookup = Callable[[str], "FormulaValue"]

# Real ones have under a hundred characters; the parser's stack is not ours to test.
_LONGEST = 300
# A product of three sizes stays far below; 10**9 // 1 repeated must not grow without end.
_LARGEST = 1 << 62

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}

_COMPARISONS: dict[type[ast.cmpop], Callable[[object, object], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: isinstance(b, tuple) and a in b,
    ast.NotIn: lambda a, b: isinstance(b, tuple) and a not in b,
    ast.Lt: lambda a, b: _number(a) < _number(b),
    ast.LtE: lambda a, b: _number(a) <= _number(b),
    ast.Gt: lambda a, b: _number(a) > _number(b),
    ast.GtE: lambda a, b: _number(a) >= _number(b),
}

_GRAMMAR = "numbers, names, + - * / // %, ( ), and `or` for a value that may be absent"


@dataclass(frozen=True, slots=True)
class Formula:
    """A parsed expression.

    Attributes
    ----------
    text
        As written.
    names
        What it refers to, dots included, in order, each once.
    """

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    @classmethod
    def parse(cls, text: str, where: str = "", *, conditions: bool = False) -> Formula:
        """Returns the formula that a text says; braces around the whole are taken off.

        Parameters
        ----------
        text
            As written.
        where
            The place, for messages.
        conditions
            Whether it may compare, say ``not`` and ``and``, and hold text in quotes.

        Raises
        ------
        MappingError
            ``bad-formula``.
        """
        plain = text.strip()
        plain = plain[1:-1].strip() if plain.startswith("{") and plain.endswith("}") else plain
        tree = _parsed(plain) if len(plain) <= _LONGEST else None
        if tree is None or not _allowed(tree, conditions=conditions):
            raise MappingError("bad-formula", f"`{text[:80]}` is not a formula", where=where, expected=_GRAMMAR)
        return cls(text, tuple(dict.fromkeys(_names(tree))), tree)

    def value(self, lookup: Lookup) -> FormulaValue:
        """Returns its value; None where a name is not known.

        Parameters
        ----------
        lookup
            Gives the value of a name, or None.

        Raises
        ------
        MappingError
            ``bad-formula``: a division by zero, text where a number is needed, a number without end.
        """
        try:
            found = _value(self._tree, lookup)
        except (ZeroDivisionError, TypeError, OverflowError) as error:
            raise MappingError("bad-formula", f"`{self.text}` has no value: {error}") from error
        if isinstance(found, (int, float)) and not abs(found) <= _LARGEST:  # or it is NaN
            raise MappingError("bad-formula", f"`{self.text}` is too large, or no number")
        return found


def _parsed(text: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1if`: Python would print what it thinks of that
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _allowed(node: ast.expr, *, conditions: bool) -> bool:
    """Tells whether a tree is of the grammar, and nothing but."""
    inner: list[ast.expr]
    match node:
        case ast.Name() | ast.Constant(value=int() | float()):
            good, inner = True, []
        case ast.Constant(value=str()):
            good, inner = conditions, []
        case ast.Attribute(value=value):
            good, inner = isinstance(value, (ast.Name, ast.Attribute)), [value]
        case ast.UnaryOp(op=op, operand=operand):
            good, inner = isinstance(op, ast.USub) or (conditions and isinstance(op, ast.Not)), [operand]
        case ast.BinOp(left=left, op=sign, right=right):
            good, inner = type(sign) in _OPERATORS, [left, right]
        case ast.BoolOp(op=word, values=values):
            good, inner = isinstance(word, ast.Or) or conditions, values
        case ast.Compare(left=left, ops=[sign], comparators=[right]):
            good, inner = conditions and type(sign) in _COMPARISONS, [left, right]
        case _:
            good, inner = False, []
    return good and all(_allowed(one, conditions=conditions) for one in inner)


def _names(node: ast.expr) -> Iterator[str]:
    if isinstance(node, (ast.Name, ast.Attribute)):
        yield _dotted(node)
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from _names(child)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    assert isinstance(node, ast.Name)  # `_allowed` let nothing else through
    return node.id


def _value(node: ast.expr, lookup: Lookup) -> FormulaValue:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name() | ast.Attribute():
            return lookup(_dotted(node))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _value(operand, lookup)
            return None if inner is None else -_number(inner)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, lookup), _value(right, lookup)
            return None if a is None or b is None else _OPERATORS[type(op)](_number(a), _number(b))
        case ast.BoolOp(op=ast.Or(), values=values):
            return next((found for one in values if (found := _value(one, lookup)) is not None), None)
        case _:
            return _holds(node, lookup)


def _holds(node: ast.expr, lookup: Lookup) -> bool:
    """Returns whether a condition holds; a value holds that is neither 0, empty nor absent."""
    match node:
        case ast.UnaryOp(operand=operand):
            return not _value(operand, lookup)
        case ast.BoolOp(values=values):
            return all(_value(one, lookup) for one in values)
        case ast.Compare(left=left, ops=[sign], comparators=[right]):
            return _COMPARISONS[type(sign)](_value(left, lookup), _value(right, lookup))
        case _:
            raise TypeError("not a formula")


def _number(value: object) -> Number:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no number")
    if not abs(value) <= _LARGEST:  # NaN is not larger, and not smaller either
        raise OverflowError("a number without end")
    return value
