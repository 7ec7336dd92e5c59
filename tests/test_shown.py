"""Values of foreign files in messages: as repr shows them, and bounded in work whatever they hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardmerge.shown import shown


@pytest.mark.parametrize(
    "value",
    [None, True, 7, 1.5, "text", b"bytes", [1, "a"], (1, 2), {"a": [1, {"b": None}]}, [], {}, "it's"],
)
def test_plain_values_read_as_python_writes_them(value: object) -> None:
    assert shown(value) == repr(value)


def test_long_values_are_cut() -> None:
    assert shown("x" * 1000, 20) == "'" + "x" * 16 + "..."
    assert len(shown(list(range(1000)), 50)) == 50


def test_a_number_that_python_does_not_print() -> None:
    assert shown(1 << 100_000) == "an integer of 100001 bits"


def test_other_objects_are_named_and_not_asked() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise AssertionError

    assert shown([Hostile()]) == "[<Hostile>]"


class Counted(dict[object, object]):
    """A dictionary that counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Iterator[object]:
        Counted.walks += 1
        return super().__iter__()


def test_shared_values_are_walked_no_further_than_the_text_has_room() -> None:
    """Sixty dictionaries, each holding the next one twice, have 2 to the 60 leaves."""
    value: object = 0
    for _ in range(60):
        value = Counted({"a": value, "b": value})
    assert len(shown(value, 100)) == 100
    assert Counted.walks < 100
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * 9 + "..." + "]" * 9
