"""Errors on their way from one process to another: as rows of plain values, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from shardmerge import errors
from shardmerge.errors import Problems, ShardmergeError
from shardmerge.system_errors import no_memory

# One error. Of ours its class and its texts, of the system its number and its texts, of any other one a text.
FailureRow: TypeAlias = Mapping[str, "str | int"]


def rows_of(error: BaseException) -> list[FailureRow]:
    """Returns an error as values that JSON can hold; a ``Problems`` has a row for each."""
    if isinstance(error, MemoryError):
        error = no_memory()
    if isinstance(error, ShardmergeError):
        return [{"kind": type(one).__name__, **one.fields()} for one in error.each()]
    if isinstance(error, OSError):
        return [{"errno": error.errno or 0, "what": error.strerror or str(error), "where": str(error.filename or "")}]
    return [{"bug": f"{type(error).__name__}: {error}"}]


def error_from(rows: Sequence[FailureRow]) -> BaseException:
    """Returns the error that the rows were made of; a bug as a ``RuntimeError``."""
    ours = list(_ours(rows))
    if ours:
        return ours[0] if len(ours) == 1 else Problems(ours)
    if "errno" in rows[0]:
        return OSError(rows[0]["errno"], rows[0]["what"], rows[0]["where"])
    return RuntimeError(rows[0]["bug"])


def _ours(rows: Sequence[FailureRow]) -> Iterator[ShardmergeError]:
    for row in rows:
        kind = getattr(errors, str(row.get("kind", "")), None)
        if kind is not None:
            texts = {name: row[name] for name in ("where", "found", "expected", "hint")}
            yield kind(row["code"], row["what"], **texts)
