"""Rows."""
from tests.following import Row
ROWS: list[Row] = []
NOTHING_TO_DO: list[tuple[str, str, str]] = []
