"""A target's own settings, read from the text that stands in the mapping."""

from __future__ import annotations

from collections.abc import Sequence

from shardmerge.errors import TargetError
from shardmerge.targets.expectation import Request
from shardmerge.tensors import Catalog, Extent

_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")


def choice(request: Request, key: str, allowed: Sequence[str]) -> str:
    """Returns an option that is one of a few words; the first where it is not given.

    Raises
    ------
    TargetError
        ``bad-option``.
    """
    value = request.options.get(key, allowed[0])
    if value not in allowed:
        raise bad_option(request, key, value, " or ".join(allowed))
    return value


def switch(request: Request, key: str, *, default: bool) -> bool:
    """Returns an option that is on or off.

    Raises
    ------
    TargetError
        ``bad-option``.
    """
    value = request.options.get(key)
    if value is None:
        return default
    if value.lower() not in (*_YES, *_NO):
        raise bad_option(request, key, value, "true or false")
    return value.lower() in _YES


def whole_number(request: Request, key: str, default: int, *, most: int) -> int:
    """Returns an option that counts something: 1 to ``most``.

    Raises
    ------
    TargetError
        ``bad-option``.
    """
    value = request.options.get(key)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 9 and 1 <= int(value) <= most):
        raise bad_option(request, key, value, f"a number from 1 to {most}")
    return int(value)


def positive_number(request: Request, key: str) -> float | None:
    """Returns an option that is a positive number, or ``None`` where it is not given.

    Raises
    ------
    TargetError
        ``bad-option``.
    """
    value = request.options.get(key)
    if value is None:
        return None
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise bad_option(request, key, value, "a positive number")
    return found


def config_of(request: Request, role: str, lack: str, config: str = "config.json") -> tuple[Catalog, Extent]:
    """Returns the source that plays a role, and its config.json.

    Parameters
    ----------
    request
        What the target is asked for.
    role
        The source of that name plays it where the mapping does not say.
    lack
        What is not known without it, for the message.
    config
        What is expected there, for the message.

    Raises
    ------
    TargetError
        ``missing-source``.
    """
    name = request.roles.get(role, role)
    catalog = request.catalogs.get(name)
    if catalog is not None and "config.json" in catalog.side_files:
        return catalog, catalog.side_files["config.json"]
    raise TargetError(
        "missing-source",
        f"no source {lack}, and `{name}` should",
        where=catalog.path if catalog else request.where,
        expected=f"a source named `{name}` with {config}",
    )


def bad_option(request: Request, key: str, value: str, expected: str) -> TargetError:
    """Returns the error about an option's value."""
    return TargetError(
        "bad-option",
        f"the target's option `{key}` cannot be used",
        where=request.where,
        found=repr(value)[:80],
        expected=expected,
    )
