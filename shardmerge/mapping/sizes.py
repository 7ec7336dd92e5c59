"""Sizes as people write them: ``5GB``."""

from __future__ import annotations

import re

from shardmerge.errors import UsageError

_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(?P<unit>[a-zA-Z]*)")
_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str, *, binary: bool = False) -> int:
    """Returns bytes.

    Parameters
    ----------
    text
        ``5GB``, ``500MB``, ``1.5 GB`` or plain bytes.
    binary
        Whether ``MiB`` and the like are taken too. They are for memory; for files they are refused, since hub and
        DeepSpeed count decimally and older transformers took ``GiB`` for something else.

    Raises
    ------
    UsageError
        ``bad-size``.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match["unit"].upper() if match else ""
    factor = _DECIMAL.get(unit) or (_BINARY.get(unit) if binary else None)
    if match is None or factor is None or float(match["number"]) * factor < 1:
        decimal = f"{match['number']}{unit.replace('I', '')}" if match else ""
        hint = f"write `{decimal}`: file sizes are decimal, as on the hub" if unit in _BINARY else ""
        raise UsageError("bad-size", f"{text!r} is not a size", expected="a number with KB, MB, GB or TB", hint=hint)
    return int(float(match["number"]) * factor)
