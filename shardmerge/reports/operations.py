"""What was done to a tensor, told from the labels of its ops: a receipt has no more of them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_CAST = re.compile(r"cast (\w+) to (\w+)")
_NEW_ROWS = re.compile(r"(\d+) new rows \((.*)\)")
_OF_TWO_WORDS = "split|merge|permute|unpermute|arithmetic|stock|fusion|equal"
_WORD = re.compile(rf"[a-z_]+(?: (?:{_OF_TWO_WORDS}))?")
# Ops that only say where bytes lie, as their labels begin.
MOVES = frozenset(
    {
        "chunk", "concat", "grouped merge", "grouped split", "permute", "reshape", "rotary permute", "rotary unpermute",
        "slice", "split", "squeeze", "stack", "transpose", "unsqueeze", "unstack",
    }
)  # fmt: skip

# What happened to a tensor, from least to most, with what it means.
KINDS = {
    "cloned": "shares blocks with its source file: nothing was read or written",
    "copied": "has the bytes of its source",
    "rearranged": "has elements of its sources in another order or tensor: split, joined, permuted",
    "cast": "was rounded to another type",
    "computed": "was calculated from one or more tensors",
    "resized": "has more rows than its source: the vocabulary grew",
    "filled": "has no source: constants",
}


def kind_of(ops: Sequence[str], shape: Sequence[int], *, sources: bool, cloned: bool) -> str:
    """Returns one of ``KINDS`` for a tensor with these ops, made of source tensors or of none."""
    words = [word(op) for op in ops]
    if not sources:
        return "filled"
    if _grown(ops, shape):
        return "resized"
    if any(one not in MOVES and one != "cast" for one in words):
        return "computed"
    if "cast" in words:
        return "cast"
    return "cloned" if cloned else "rearranged" if ops else "copied"


def steps(ops: Sequence[str], shape: Sequence[int], *, exact: bool) -> list[str]:
    """Returns what was done as a reader would say it, each step once.

    Parameters
    ----------
    ops, shape
        Of the tensor, the op applied first first.
    exact
        With parameters: ``298 → 320 rows (mean)``; without them it is what tensors have in common: ``new rows (mean)``.
    """
    return list(dict.fromkeys(_steps(ops, shape, exact=exact)))


def _steps(ops: Sequence[str], shape: Sequence[int], *, exact: bool) -> Iterator[str]:
    """A resize is one step: its rows were made in F64, rounded, and joined with the old ones."""
    grown = _grown(ops, shape)
    if grown:
        rows = shape[0]
        yield f"{rows - int(grown[1])} → {rows} rows ({grown[2]})" if exact else f"new rows ({grown[2]})"
    for op in ops:
        cast = _CAST.fullmatch(op)
        if not (grown and (_NEW_ROWS.fullmatch(op) or op.startswith(("concat", "cast F64")))):
            yield f"cast {cast[1]} → {cast[2]}" if cast else op if exact else word(op)


def _grown(ops: Sequence[str], shape: Sequence[int]) -> re.Match[str] | None:
    """Returns the op that made new rows, where they were joined with old ones."""
    made = next((found for op in ops if (found := _NEW_ROWS.fullmatch(op))), None)
    return made if made and "concat dim 0" in ops and shape[0] > int(made[1]) else None


def word(label: str) -> str:
    """Returns the name of an op, of its label."""
    found = _WORD.match(label)
    return found[0] if found else label
