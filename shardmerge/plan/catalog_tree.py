"""The tensors of a checkpoint as a tree of name patterns, with counts, parameters and bytes for every subtree. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.mapping.near import printable
from shardmerge.plan.name_patterns import Kind, NamePattern, is_number, name_patterns, segment_text
from shardmerge.plan.tables import human_bytes
from shardmerge.tensors import Shape, TensorEntry

ShapeAndType: TypeAlias = tuple[Shape, DType]

# A name is never cut shorter than this, however narrow the terminal.
_SHORTEST = 24
_GAP = "  "


@dataclass(slots=True)
class _Node:
    """A subtree: what is below it, and what it holds in all."""

    children: dict[str, _Node] = field(default_factory=dict)
    patterns: list[NamePattern[ShapeAndType]] = field(default_factory=list)
    count: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, pattern: NamePattern[ShapeAndType]) -> None:
        shape, dtype = pattern.kind
        elements = pattern.count * prod(shape)
        self.count += pattern.count
        self.parameters += elements
        self.nbytes += elements * dtype.itemsize


def human_count(number: int) -> str:
    """Returns a number of parameters as the field writes it: ``8.03 B``, ``525 M``, ``131``."""
    size, units = float(number), iter(("", " K", " M", " B", " T"))
    unit = next(units)
    while size >= 999.5 and unit != " T":  # what rounds to four digits
        size, unit = size / 1000, next(units)
    return f"{size:#.3g}".rstrip(".") + unit if unit else str(number)


def tree_lines(tensors: Iterable[tuple[str, TensorEntry]], width: int = 0) -> Iterator[str]:
    """Yields the tree: a line for every pattern, below a line for what several have in common.

    Parameters
    ----------
    tensors
        By name.
    width
        Of the terminal, in columns: a name that leaves no room for numbers has a line of its own. 0 for as wide as
        it needs.
    """
    root = _Node()
    for pattern in name_patterns((name, (entry.shape, entry.dtype)) for name, entry in tensors):
        _place(root, pattern)
    yield from _aligned([row for label, node in root.children.items() for row in _rows(label, node, 0)], width)


def _place(root: _Node, pattern: NamePattern[ShapeAndType]) -> None:
    node = root
    for label in labels(pattern):
        node = node.children.setdefault(label, _Node())
        node.add(pattern)
    node.patterns.append(pattern)


def labels(pattern: NamePattern[Kind]) -> list[str]:
    """Returns the steps to a pattern: a number stays with the word before it, a parameter with its module."""
    found: list[str] = []
    for choices in pattern.segments:
        text = printable(segment_text(choices))
        if found and is_number(choices):
            found[-1] += f".{text}"
        else:
            found.append(text)
    return [*found[:-2], ".".join(found[-2:])]


# Name, number of tensors, type and shape, parameters, bytes, remark.
_Row: TypeAlias = tuple[str, str, str, str, str, str]


def _rows(label: str, node: _Node, depth: int) -> Iterator[_Row]:
    """Yields a node and what is below it; a node with one child alone is a part of that child's name."""
    while len(node.children) == 1 and not node.patterns:
        ((below, child),) = node.children.items()
        label, node = f"{label}.{below}", child
    for pattern in node.patterns:
        yield _row("  " * depth + label, pattern)
    if node.children:
        sizes = human_count(node.parameters), human_bytes(node.nbytes)
        yield "  " * depth + label, f"{node.count:,}", "tensors", *sizes, ""
        for name, child in node.children.items():
            yield from _rows(name, child, depth + 1)


def _row(label: str, pattern: NamePattern[ShapeAndType]) -> _Row:
    whole = _Node()
    whole.add(pattern)
    count = f"{pattern.count:,} x" if pattern.count > 1 else ""
    remark = f"others: {_kind(pattern.usual)}" if pattern.usual is not None else ""
    return label, count, _kind(pattern.kind), human_count(whole.parameters), human_bytes(whole.nbytes), remark


def _kind(kind: ShapeAndType) -> str:
    shape, dtype = kind
    return f"{list(shape)} {dtype}"


def _aligned(rows: Sequence[_Row], width: int) -> Iterator[str]:
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    if width:
        others = sum(widths[1:]) + 3 * len(_GAP) + 1
        widths[0] = min(widths[0], max(width - others, _SHORTEST))
    for label, count, kind, parameters, nbytes, remark in rows:
        name = f"{label:{widths[0]}}"
        if len(label) > widths[0]:
            yield shortened(label, width)
            name = " " * widths[0]
        what = f"{count:>{widths[1]}} {kind:{widths[2]}}"
        cells = (what, f"{parameters:>{widths[3]}}", f"{nbytes:>{widths[4]}}")
        yield _GAP.join((name, *cells)).rstrip()
        if remark:
            yield " " * (len(label) - len(label.lstrip()) + 2) + f"^ differs, {remark}"


def shortened(text: str, width: int) -> str:
    """Returns a text with ``...`` in its middle where it is longer than ``width``."""
    if len(text) <= width:
        return text
    behind = (width - 3) // 2
    return f"{text[: width - 3 - behind]}...{text[len(text) - behind :]}"
