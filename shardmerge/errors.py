"""One tree of errors.

The library raises these and never prints; the command line renders them and turns the class into an exit code.

    ShardmergeError
    ├── RefusedError         exit 1   the input is understood and cannot be used
    │   ├── CheckpointError           a file is damaged, hostile, incomplete, or of a kind not read yet
    │   │   └── UnreadableError       a file is gone, or the system refused: nothing is known of its content
    │   ├── MappingError              the mapping does not say something that can be done
    │   ├── TargetError               the finished directory would not be what its config promises
    │   └── OutputError               the output path cannot be written as asked
    ├── UsageError           exit 2   the call itself is off (an option, a missing path)
    ├── VerificationError    exit 3   a finished directory is not what it should be
    ├── ResourceError        exit 4   not enough disk or memory, said before starting where it can be known
    ├── InterruptedRunError  exit 5   stopped by a signal; nothing was published, the same command goes on
    ├── PublishedError       exit 6   published, and what came after failed: a sync, a signal, tidying up
    └── Problems             the exit code of its first error: all problems of one stage at once
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

# Characters of a line that is printed; what an error quotes of a file has no bound of its own.
LONGEST_LINE = 2000
# Where a hint goes on in a line of its own, as written here: nothing that is quoted begins a line.
_NEXT_LINE = "\n    "


def plain(text: str) -> str:
    r"""Returns a text that may quote a file as it can go to a terminal or a log.

    Control characters, among them escapes and line breaks, and marks that turn the direction of writing are shown as
    ``\x1b``; of a line that is too long the middle is left out.
    """
    if len(text) <= LONGEST_LINE and text.isprintable():
        return text
    return _NEXT_LINE.join(map(_cut, text.split(_NEXT_LINE)))


def _cut(line: str) -> str:
    near = line if len(line) <= 2 * LONGEST_LINE else line[:LONGEST_LINE] + line[-LONGEST_LINE:]
    shown, half = escaped(near), LONGEST_LINE // 2 - 16
    return shown if len(shown) <= LONGEST_LINE else f"{shown[:half]} ... ({len(line)}) ... {shown[-half:]}"


def escaped(text: str) -> str:
    r"""Returns a text with what would steer a terminal shown as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)  # a codec would be imported


class ShardmergeError(Exception):
    """An error a user can act on.

    Parameters
    ----------
    code
        Stable identifier in kebab case, e.g. ``truncated-file``. Tests and scripts pin this, prose may improve.
    what
        One sentence: what is wrong.
    where
        The file, with ``byte N`` or ``:line:col`` where there is one, or the tensor's name.
    found, expected
        The two sides of a failed comparison, as text; empty where there is none.
    hint
        What to do next: a command to run or a line to paste.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, code: str, what: str, *, where: str = "", found: str = "", expected: str = "", hint: str = ""
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Returns the error as lines of plain text (``plain``), the summary first."""
        fields = (("at", self.where), ("found", self.found), ("expected", self.expected), ("hint", self.hint))
        return [f"{plain(self.what)} [{self.code}]", *(f"  {label}: {plain(text)}" for label, text in fields if text)]

    def each(self) -> tuple[ShardmergeError, ...]:
        """Returns the single errors this one stands for: itself, or all of a ``Problems``."""
        return (self,)

    def fields(self) -> dict[str, str]:
        """Returns the error's own texts by name, as ``--json`` prints them."""
        return {name: str(getattr(self, name)) for name in ("code", "what", "where", "found", "expected", "hint")}


class RefusedError(ShardmergeError):
    """The input is understood and refused (exit 1)."""


class CheckpointError(RefusedError):
    """A checkpoint is damaged, hostile, incomplete, or of a kind that is not read yet."""


class UnreadableError(CheckpointError):
    """A file that is gone, or that the system did not let be read, which says nothing about what is in it."""


class MappingError(RefusedError):
    """A mapping.yaml, preset or template that cannot be carried out."""


class TargetError(RefusedError):
    """The output would not be what its config implies: names, shapes, counts, ids."""


class OutputError(RefusedError):
    """The output path exists, is one of the sources, or cannot be written."""


class UsageError(ShardmergeError):
    """The call is off: an unknown name, a path that does not exist (exit 2)."""

    exit_code: ClassVar[int] = 2


class VerificationError(ShardmergeError):
    """A finished directory differs from its receipt, its sources or a reference (exit 3)."""

    exit_code: ClassVar[int] = 3


class ResourceError(ShardmergeError):
    """Disk or memory is not enough (exit 4)."""

    exit_code: ClassVar[int] = 4


class InterruptedRunError(ShardmergeError):
    """A signal stopped the run before it was published (exit 5)."""

    exit_code: ClassVar[int] = 5


class PublishedError(ShardmergeError):
    """The result is published and whole; something after that failed (exit 6)."""

    exit_code: ClassVar[int] = 6


class Problems(ShardmergeError):
    """Several errors of one stage, reported together."""

    def __init__(self, errors: Iterable[ShardmergeError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.code, first.what, where=first.where, hint=first.hint)
        self.exit_code = first.exit_code  # type: ignore[misc]  # the composite takes its first error's code

    def lines(self) -> list[str]:
        """Returns every error's lines, one after the other."""
        return [line for error in self.errors for line in error.lines()]

    def each(self) -> tuple[ShardmergeError, ...]:
        """Returns all errors of the stage."""
        return self.errors


def raise_all(errors: Iterable[ShardmergeError]) -> None:
    """Raises nothing for no error, the error itself for one, ``Problems`` for several."""
    found = tuple(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        raise Problems(found)
