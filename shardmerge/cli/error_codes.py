"""What each error code means, read from error_codes.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

_FILE = Path(__file__).with_name("error_codes.yaml")


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """An error code and its explanation.

    Attributes
    ----------
    code
        The code in kebab case, e.g. ``truncated-file``.
    group
        What it is about: ``checkpoint``, ``mapping``, ``target``, ``adapter``, ``output``, ``usage``, ``verification``
        or ``resource``.
    about
        What it means, and its usual cause.
    do
        What to do.
    """

    code: str
    group: str
    about: str
    do: str


def error_codes() -> dict[str, ErrorCode]:
    """Returns every error code with its explanation, group by group."""
    groups = yaml.load(_FILE.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {
        code: ErrorCode(code, group, **texts)
        for group, codes in groups.items()
        for code, texts in codes.items()
    }  # fmt: skip
