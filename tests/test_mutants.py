"""What is on record of mutation testing: every change that survived says why, and few did."""

from __future__ import annotations

import json
from typing import Any

import pytest

from docs.mutants import RESULTS, UNSEEN, bound

# Packages whose survivors were all looked at.
DONE = ("execute", "publish", "sources", "storage")


@pytest.mark.parametrize("package", DONE)
def test_every_survivor_has_a_reason(package: str) -> None:
    kept: dict[str, Any] = json.loads((RESULTS / f"{package}.json").read_text("utf-8"))
    survived = {key: one for key, one in kept["tried"].items() if one["outcome"] == "survived"}
    assert {one["outcome"] for one in kept["tried"].values()} <= {"killed", "timed out", "survived"}
    assert [key for key, one in survived.items() if not one.get("reason")] == []
    seen = [key for key, one in survived.items() if not one["reason"].startswith(UNSEEN)]
    assert len(seen) < 0.05 * len(kept["tried"])
    assert all(key.split()[0] in kept["places"] for key in kept["tried"])


@pytest.mark.parametrize("tried", [1, 10, 299])
def test_the_bound_is_that_of_clopper_and_pearson(tried: int) -> None:
    """Where none survived, and where one was killed, it has a closed form."""
    assert bound(0, tried) == pytest.approx(1 - 0.05 ** (1 / tried))
    assert bound(tried - 1, tried) == pytest.approx(0.95 ** (1 / tried)) or tried == 1
