"""Where a pickle is read: never past its frame, nor past the most bytes that a checkpoint's pickle has."""

from __future__ import annotations

import struct

from shardmerge.sources.pickle_errors import damaged, hostile

# 50,000 tensors take 4.5 MB of pickle, so this leaves room for a million tensors.
MOST_PICKLE_BYTES = 256 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A place in the bytes of a pickle; ``op`` is that of the opcode at hand."""

    __slots__ = ("_framed", "_limit", "_start", "data", "op", "pos")

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.pos = self.op = self._start = start
        self._limit = min(len(data), start + MOST_PICKLE_BYTES)
        self._framed = False

    def protocol(self) -> None:
        """PROTO, the first opcode and no other."""
        version = self.data[self.pos]
        if self.op != self._start or not 2 <= version <= 5:
            raise damaged("not a pickle of protocol 2 to 5", f"PROTO {version}")
        self.pos += 1

    def frame(self) -> None:
        """PEP 3154: frames neither nest nor end inside an opcode. pickle.py and CPython 3.13.15 agree."""
        length = self._u64()
        if self._framed or length > self._limit - self.pos:
            raise damaged("a frame nests in another or is longer than the pickle", f"{length} bytes")
        self._framed = True
        self._limit = self.pos + length

    def _leave_frame(self) -> None:
        whole = min(len(self.data), self._start + MOST_PICKLE_BYTES)
        if self.pos > self._limit:
            raise damaged("an opcode reaches over the end of its frame or of the pickle")
        if not self._framed and whole < len(self.data):
            raise hostile("a pickle larger than any checkpoint's", expected=f"at most {MOST_PICKLE_BYTES}")
        if self.pos >= whole:
            raise damaged("the pickle is cut short", f"{self.pos - self._start} bytes and no STOP")
        self._framed = False
        self._limit = whole

    def _take(self, length: int) -> bytes:
        start, end = self.pos, self.pos + length
        if end > self._limit:
            raise damaged("a length is larger than what is left", f"{length}", f"at most {self._limit - start}")
        self.pos = end
        return self.data[start:end]

    def _u8(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def _u32(self) -> int:
        self.pos += 4
        number: int = _U32.unpack_from(self.data, self.pos - 4)[0]
        return number

    def _u64(self) -> int:
        self.pos += 8
        number: int = _U64.unpack_from(self.data, self.pos - 8)[0]
        return number

    def _check_end(self) -> None:
        """Checks that the frame ends with the pickle."""
        if self._framed and self.pos != self._limit:
            raise damaged("the pickle does not end where its frame does")
