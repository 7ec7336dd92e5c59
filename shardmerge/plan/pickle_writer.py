"""A pickle written opcode by opcode: nothing here can run or pickle anything else. Opcodes as in ``pickletools``."""

from __future__ import annotations

import struct


def text_code(text: str) -> bytes:
    """BINUNICODE; like pickle, it carries even the surrogates that a file name may have brought in."""
    raw = text.encode("utf-8", "surrogatepass")
    return b"X%s%s" % (struct.pack("<I", len(raw)), raw)


class PickleWriter:
    """A pickle of protocol 2 in the making."""

    __slots__ = ("_kept", "_known", "_out", "write")

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._known: dict[bytes, int] = {}
        self._kept = 0
        self.write = self._out.extend

    def keep(self) -> None:
        """Puts the top of the stack in the memo (BINPUT, LONG_BINPUT)."""
        self.write(b"q%c" % self._kept if self._kept < 256 else b"r%s" % struct.pack("<I", self._kept))
        self._kept += 1

    def once(self, code: bytes) -> None:
        """Writes an object the first time, and after that a reference to it (BINGET, LONG_BINGET)."""
        index = self._known.get(code)
        if index is None:
            self._known[code] = self._kept
            self.write(code)
            self.keep()
        else:
            self.write(b"h%c" % index if index < 256 else b"j%s" % struct.pack("<I", index))

    def text(self, text: str) -> None:
        """Writes a string."""
        self.write(text_code(text))
        self.keep()

    def number(self, number: int) -> None:
        """Writes a whole number (BININT1, BININT2, BININT, LONG1)."""
        if 0 <= number < 1 << 8:
            self.write(b"K%c" % number)
        elif 0 <= number < 1 << 16:
            self.write(struct.pack("<cH", b"M", number))
        elif -1 << 31 <= number < 1 << 31:
            self.write(struct.pack("<ci", b"J", number))
        else:
            width = number.bit_length() // 8 + 1
            self.write(b"\x8a%c%s" % (width, number.to_bytes(width, "little", signed=True)))

    def numbers(self, numbers: tuple[int, ...]) -> None:
        """Writes a tuple of numbers (EMPTY_TUPLE, TUPLE1 to TUPLE3, MARK and TUPLE)."""
        if not numbers:
            self.write(b")")
            return
        self.write(b"(" if len(numbers) > 3 else b"")
        for number in numbers:
            self.number(number)
        self.write(b"\x85\x86\x87"[len(numbers) - 1 : len(numbers)] if len(numbers) <= 3 else b"t")
        self.keep()

    def finish(self) -> bytes:
        """Returns the whole pickle."""
        self.write(b".")
        return bytes(self._out)
