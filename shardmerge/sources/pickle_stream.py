"""A pickle that is read as it passes, frame by frame, and of which not all is kept.

Who knows what a stretch of the pickle comes to may skip it: what would have been memoized there is numbered and not
kept. Should the pickle refer to it, that stretch is read once more. The pickles of CPython's pickler, protocols 4 and
5, come in frames of 64 KiB, and no opcode lies across two of them; older protocols have none, and short opcodes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from shardmerge.sources.pickle_errors import damaged, hostile
from shardmerge.sources.pickle_machine import OPCODES, Machine
from shardmerge.sources.pickle_values import PickleValue, kind
from shardmerge.storage.reading import SourceFile

# A frame is 64 KiB and an opcode; a larger one holds one text or one value of bytes, which is not kept for long.
_WINDOW, _LARGEST_FRAME = 4 << 20, 64 << 20
# What an opcode outside of a frame takes at most, and a stretch that is skipped.
_UNFRAMED = LONGEST_STRETCH = 4096


class StreamMachine(Machine):
    """Steps through the pickle that a file begins with, window by window.

    Attributes
    ----------
    base
        Where the window begins in the file, in bytes.
    edge
        From where in the window on ``go_on`` comes first: the end of a frame, or close to that of the window.
    """

    __slots__ = ("_file", "_seen_at", "_seen_memo", "base", "edge")

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.read(0, min(file.size, _WINDOW)), 0, legacy=False)
        self.base = 0
        self._file = file
        self._allow(file.size)
        self._seen_memo, self._seen_at = array("q"), array("q")  # of each stretch: its first memo, and its place
        self.edge = 0

    # Windows

    def _read_on(self, needed: int) -> None:
        """Lets the window hold so many bytes from here on, where the file has them."""
        end = self.base + len(self.data)
        more = min(max(needed, _WINDOW), self._file.size - end)
        if self.pos + needed > len(self.data) and more > 0:
            self.data = self.data[self.pos :] + self._file.read(end, more)
            self.base += self.pos
            self.pos = self.op = 0

    def frame(self) -> None:
        """FRAME; all of it is in the window then."""
        length = self._u64()
        if self._framed or length > min(_LARGEST_FRAME, self._file.size - self.base - self.pos):
            raise damaged("a frame nests in another or is longer than the pickle", f"{length} bytes")
        self._read_on(length)
        self._framed = True
        self._limit = self.edge = self.pos + length

    def go_on(self) -> None:
        """Leaves a frame, or reads on."""
        if self.pos > self._limit:
            raise damaged("an opcode reaches over the end of its frame or of the pickle")
        self._read_on(2 * _UNFRAMED)
        if self.pos >= len(self.data):
            raise damaged("the pickle is cut short", f"{self.base + self.pos} bytes and no STOP")
        more = self.base + len(self.data) < self._file.size
        self._framed, self._limit = False, len(self.data)
        self.edge = self._limit - (_UNFRAMED if more else 0)

    def protocol(self) -> None:
        """PROTO, the first opcode and no other."""
        if self.base + self.op or not 2 <= self.data[self.pos] <= 5:
            raise damaged("not a pickle of protocol 2 to 5", f"PROTO {self.data[self.pos]}")
        self.pos += 1

    # Memo

    def skip(self, memos: int, end: int) -> None:
        """Skips a stretch, of at most ``LONGEST_STRETCH`` bytes, that would have memoized so many values."""
        self._seen_memo.append(len(self._memo) + self._skipped)
        self._seen_at.append(self.base + self.pos)
        self._skipped += memos
        self.pos = end

    def get1(self) -> None:
        """BINGET."""
        self._stack.append(self.recall(self.data[self.pos]))
        self.pos += 1

    def get4(self) -> None:
        """LONG_BINGET."""
        self._stack.append(self.recall(self._u32()))

    def recall(self, number: int) -> PickleValue:
        """Returns what was memoized under a number, if need be by reading it once more; KeyError if nothing was."""
        if number in self._memo:
            return self._memo[number]
        at = bisect_right(self._seen_memo, number) - 1
        if at < 0:
            raise KeyError(number)
        start = self._seen_at[at]
        data = self._file.read(start, min(LONGEST_STRETCH, self._file.size - start))
        return _Again(data, self, self._seen_memo[at]).find(number)


class _Again(Machine):
    """Reads a stretch once more, for the sake of one value in it."""

    __slots__ = ()

    def __init__(self, data: bytes, owner: StreamMachine, first: int) -> None:
        super().__init__(data, 0, legacy=False)
        self._memo = _Beside(owner, first)
        self._skipped = first

    def find(self, number: int) -> PickleValue:
        """Returns the value with a number, which must be one that nothing can change any more."""
        while number not in self._memo:
            opcode = self.data[self.pos]
            self.pos += 1
            OPCODES[opcode](self)
        value = self._memo[number]
        if not isinstance(value, (tuple, str)):
            raise hostile("the pickle refers to a part of an object that is read in passing", kind(value))
        return value


class _Beside(dict[int, PickleValue]):
    """A memo that asks another one for what was memoized before."""

    def __init__(self, owner: StreamMachine, first: int) -> None:
        super().__init__()
        self._owner, self._first = owner, first

    def __missing__(self, number: int) -> PickleValue:
        if number >= self._first:  # of the stretch itself, and not there yet
            raise KeyError(number)
        return self._owner.recall(number)


_OWN: dict[int, Callable[[Any], None]] = {
    0x80: StreamMachine.protocol, 0x95: StreamMachine.frame, 0x68: StreamMachine.get1, 0x6A: StreamMachine.get4,
}  # fmt: skip
STEPS = tuple(_OWN.get(opcode, step) for opcode, step in enumerate(OPCODES))
