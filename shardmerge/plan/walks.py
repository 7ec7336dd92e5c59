"""Walks over elements as nests of loops: cut where an axis is cut, taken apart into rows, put together again. Pure.

A chain of moves is a walk: which element of the files stands at which place of the result. A transposed matrix is two
loops, whatever its size; so all here counts loops and never elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeAlias

from shardmerge.tensors import Shape
from shardmerge.tensors.strides import place, row_major

# How often, by how much a loop goes on in the result, and by how much on each axis of what is walked over.
Loop: TypeAlias = "tuple[int, int, tuple[int, ...]]"

# Most walks that one is taken apart into. A move and what it moves mostly share their axes, and then there are three at
# most; rows that are reshaped to others, transposed and reshaped again may be as many as there are elements.
MOST = 1 << 14


class TooScattered(Exception):
    """A walk is not taken apart: it would be too many."""


@dataclass(frozen=True, slots=True)
class Walk:
    """Elements in a nest of loops; steps are never negative, and no loop is done once only.

    Attributes
    ----------
    at
        Where the first of them stands in the result.
    index
        Which of the elements walked over that is, a number an axis.
    loops
        In any order: the elements are the same ones.
    """

    at: int
    index: tuple[int, ...]
    loops: tuple[Loop, ...]


def whole(numel: int) -> Walk:
    """Returns the walk over so many elements in their order, on the one axis that they lie on."""
    return Walk(0, (0,), ((numel, 1, (1,)),) if numel > 1 else ())


def last(walk: Walk, axis: int) -> int:
    """Returns how far a walk comes on an axis."""
    return walk.index[axis] + sum((n - 1) * steps[axis] for n, _, steps in walk.loops)


def cut(walk: Walk, axis: int, low: int, high: int) -> Iterator[Walk]:
    """Yields what of a walk lies in ``[low, high)`` on an axis, which keeps its numbers.

    The loop that goes furthest is cut where all of the others lie inside, and taken step by step where they do not.
    """
    first, end = walk.index[axis], last(walk, axis)
    if first >= high or end < low:
        return
    if first >= low and end < high:
        yield walk
        return
    which = max(range(len(walk.loops)), key=lambda i: walk.loops[i][2][axis])
    n, _, steps = walk.loops[which]
    step = steps[axis]
    others = end - first - (n - 1) * step
    begin, stop = max(-(-(low - first) // step), 0), min((high - 1 - others - first) // step + 1, n)
    touched, left = max(-(-(low - others - first) // step), 0), min(-(-(high - first) // step), n)
    if begin < stop:
        yield part(walk, which, begin, stop - begin)
        partly = chain(range(touched, begin), range(stop, left))
    else:
        partly = chain(range(touched, left))
    for i in partly:
        yield from cut(part(walk, which, i, 1), axis, low, high)


def part(walk: Walk, which: int, start: int, count: int) -> Walk:
    """Returns a walk with one of its loops done ``count`` times only, from its ``start`` on."""
    _, out, steps = walk.loops[which]
    loop = ((count, out, steps),) if count > 1 else ()
    index = tuple(first + start * step for first, step in zip(walk.index, steps, strict=True))
    return Walk(walk.at + start * out, index, (*walk.loops[:which], *loop, *walk.loops[which + 1 :]))


def moved(walk: Walk, by: Sequence[int]) -> Walk:
    """Returns a walk over the same elements where they have other numbers."""
    return Walk(walk.at, tuple(first + more for first, more in zip(walk.index, by, strict=True)), walk.loops)


def folded(walk: Walk, offset: int, strides: Sequence[int]) -> Walk:
    """Returns a walk over what the axes are strides of, which has one axis."""
    loops = tuple((n, out, (place(steps, strides),)) for n, out, steps in walk.loops)
    return Walk(walk.at, (offset + place(walk.index, strides),), loops)


def unfolded(walk: Walk, shape: Shape) -> Iterator[Walk]:
    """Yields a walk over elements in the row-major order of a shape as walks over its axes, none of which leaves a row.

    Raises
    ------
    TooScattered
        There are more than ``MOST``.
    """
    if not shape:
        yield Walk(walk.at, (), tuple((n, out, ()) for n, out, _ in walk.loops))
        return
    walks = [walk]
    for step in row_major(shape)[:-1]:
        walks = list(islice((one for each in walks for one in _rows(each, step)), MOST + 1))
        if len(walks) > MOST:
            raise TooScattered
    yield from walks


def _rows(walk: Walk, step: int) -> Iterator[Walk]:
    """Splits the last axis in two, rows of ``step`` elements and places in a row, so that no loop carries over."""
    todo = [walk]
    while todo:
        one = todo.pop()
        rests = [steps[-1] % step for _, _, steps in one.loops]
        first = one.index[-1] % step
        end = first + sum((loop[0] - 1) * rest for loop, rest in zip(one.loops, rests, strict=True))
        if end < step:
            loops = tuple((n, out, _split(steps, step)) for n, out, steps in one.loops)
            yield Walk(one.at, _split(one.index, step), loops)
        else:
            which = max(range(len(rests)), key=rests.__getitem__)
            others = end - first - (one.loops[which][0] - 1) * rests[which]
            todo += _within_rows(one, which, (first, rests[which], others), step)


def _within_rows(walk: Walk, which: int, line: tuple[int, int, int], step: int) -> Iterator[Walk]:
    """Cuts a loop that leaves its row: what fills rows from their beginning becomes a loop over rows, the rest is cut.

    ``line`` says where in a row the walk begins, by how much the loop goes on, and what the other loops add at most.
    """
    first, rest, others = line
    n, out, steps = walk.loops[which]
    count = step // rest  # a row
    if step % rest == 0 and n >= count and first + step - rest + others < step:
        row, done = part(walk, which, 0, count), n // count * count
        outer = ((n // count, count * out, tuple(count * one for one in steps)),) if done > count else ()
        yield Walk(row.at, row.index, (*row.loops, *outer))
    else:
        stay, leave = (max((step - 1 - more - first) // rest + 1, 0) for more in (others, 0))
        if stay:
            yield part(walk, which, 0, stay)
        done = min(leave, n)
        yield from (part(walk, which, i, 1) for i in range(stay, done))
    if done < n:
        yield part(walk, which, done, n - done)


def _split(index: tuple[int, ...], step: int) -> tuple[int, ...]:
    return (*index[:-1], *divmod(index[-1], step))
