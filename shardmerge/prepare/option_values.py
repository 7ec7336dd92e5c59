"""What a caller may give as the value of an option, in Python as on the command line, and what it means."""

from __future__ import annotations

from collections.abc import Sequence

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import UsageError
from shardmerge.mapping.sizes import parse_size

MOST_WORKERS = 64


def element_type(value: object) -> DType | None:
    """Returns the float type meant by ``"bfloat16"``, ``"bf16"``, ``torch.bfloat16``, ``numpy.float16`` or a ``DType``.

    Raises
    ------
    UsageError
        ``unknown-dtype``.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return float_dtype(value)
    if type(value).__module__ == "torch":
        return float_dtype(str(value))
    return float_dtype(str(getattr(value, "name", None) or getattr(value, "__name__", value)))


def size(value: object, name: str, *, binary: bool = False) -> int | None:
    """Returns bytes: a positive number, or text as ``parse_size`` takes it.

    Raises
    ------
    UsageError
        ``bad-size``, ``bad-option``: neither a number nor text.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise refused(name, value, "a number of bytes, or text such as '5GB'")
    return parse_size(str(value), binary=binary)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``bad-option`` for what is none of the choices; None stands for the default."""
    if value is not None and value not in choices:
        raise refused(name, value, ", ".join(map(repr, choices)))


def check_flag(name: str, value: object) -> None:
    """Raises ``bad-option`` for what is no boolean: ``"no"`` would be true."""
    if not isinstance(value, bool):
        raise refused(name, value, "True or False")


def check_workers(value: object) -> None:
    """Raises ``bad-option`` for a number of CPUs that the command line refuses too."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and 1 <= int(str(value)) <= MOST_WORKERS):
        raise refused("workers", value, f"a whole number from 1 to {MOST_WORKERS}")


def refused(name: str, value: object, expected: str) -> UsageError:
    """Returns the error of an option with such a value."""
    return UsageError("bad-option", f"the option {name} does not take this value", found=repr(value), expected=expected)


def no_option(name: str, known: Sequence[str]) -> TypeError:
    """Returns the error of a keyword that is no option, with the nearest one."""
    from shardmerge.mapping.near import did_you_mean

    near = did_you_mean(name, known)
    return TypeError(f"there is no option {name!r}{f'; {near}' if near else ''}")
