"""How new rows of a vocabulary may be made: ``new:`` of ``vocabulary:`` and of the op ``new_rows``."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

RowInit: TypeAlias = Literal["mean", "zeros", "copy", "normal"]
ROW_INITS: tuple[RowInit, ...] = get_args(RowInit)


def row_init(text: str) -> RowInit | None:
    """Returns the way that a word names, None for a word that names none."""
    return next((init for init in ROW_INITS if init == text), None)
