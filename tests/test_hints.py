"""Hints lead on: each is followed to the letter, and then it works, or another error says what else is wrong."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardmerge.errors import ShardmergeError
from tests.following import Call, Row, begin
from tests.hint_rows import ELSEWHERE, NOTHING_TO_DO, OUT_OF_REACH, ROWS
from tests.hints_of_the_code import Hint, all_hints
from tests.test_mistakes import world  # noqa: F401  # a fixture


@dataclass(frozen=True)
class Followed:
    """What became of a row: all errors of the first call, the one whose hint was followed, those of the second."""

    first: tuple[ShardmergeError, ...]
    met: ShardmergeError | None = None
    after: tuple[ShardmergeError, ...] = ()
    trouble: str = ""


def follow(row: Row, folder: Path, world: dict[str, Path]) -> Followed:  # noqa: F811
    call = begin(row, folder, world)
    with call.faults:
        return followed(row, call)


def followed(row: Row, call: Call) -> Followed:
    first = call.attempt()
    met = next((error for error in first if error.code == row.code and error.hint and row.words in error.hint), None)
    if met is None:
        return Followed(first, trouble=f"no {row.code} with a hint")
    call.hint = met.hint
    try:
        row.follow(call)
    except Exception as error:  # noqa: BLE001  # told by the row's own test
        return Followed(first, met, trouble=f"the hint cannot be followed: {error!r}")
    return Followed(first, met, call.attempt())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Path]) -> dict[str, Followed]:  # noqa: F811
    """All rows, followed once, each in a folder of its own."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and transformers say of tiny models
        for row in ROWS:
            folder = tmp_path_factory.mktemp("row")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                found[row.about] = follow(row, folder, world)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.about.replace(" ", "-"))
def test_a_hint_that_is_followed_leads_on(row: Row, outcomes: dict[str, Followed]) -> None:
    found = outcomes[row.about]
    assert not found.trouble, (found.trouble, [one.lines() for one in found.first])
    assert found.met is not None
    if not row.then:
        assert found.after == (), [one.lines() for one in found.after]
        return
    assert {one.code for one in found.after} == set(row.then.split()), [one.lines() for one in found.after]
    assert (row.code, found.met.what) not in {(one.code, one.what) for one in found.after}


def listed(hint: Hint, table: list[tuple[str, str, str]]) -> bool:
    return any(code in ("", hint.code) and re.search(words, hint.text) for code, words, _ in table)


def test_every_hint_with_an_action_is_followed(outcomes: dict[str, Followed]) -> None:
    """Every hint that the code can give was met by a row and followed, or the lists say why not."""
    met = {(one.met.code, one.met.hint) for one in outcomes.values() if one.met is not None}
    left = [
        hint
        for hint in all_hints()
        if not any(hint.gives(code, text) for code, text in met)
        and not any(listed(hint, table) for table in (NOTHING_TO_DO, ELSEWHERE, OUT_OF_REACH))
    ]
    assert not left, "\n".join(f"{hint.place} [{hint.code}] {hint.text}" for hint in left)


def test_what_the_lists_name_is_there() -> None:
    for code, words, _ in (*NOTHING_TO_DO, *ELSEWHERE, *OUT_OF_REACH):
        assert any(re.search(words, hint.text) and code in ("", hint.code) for hint in all_hints()), (code, words)
    for _, _, test in ELSEWHERE:
        file, _, name = test.partition("::")
        assert f"def {name}(" in Path(__file__).with_name(file).read_text("utf-8")


def test_every_row_is_another_mistake() -> None:
    assert len({row.about for row in ROWS}) == len(ROWS)


def test_the_page_states_the_counts() -> None:
    """In hundreds, and those without an action under ten, so that a hint more or less leaves the page true."""
    page = " ".join((Path(__file__).parent.parent / "docs/guarantees.md").read_text("utf-8").split())
    idle = sum(listed(hint, NOTHING_TO_DO) for hint in all_hints())
    assert f"The code has more than {hundreds(len(all_hints()))} hints. Fewer than ten of them have no action" in page
    assert 0 < idle < 10
    assert f"More than {hundreds(len(ROWS))} mistakes are made on real checkpoints" in page
    assert len(OUT_OF_REACH) == 4
    assert "Four of them ask for what no test has" in page


def hundreds(number: int) -> int:
    return (number - 1) // 100 * 100
