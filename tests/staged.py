"""What a run that failed or was stopped may leave beside its output path: finished parts, to go on with."""

from __future__ import annotations

from pathlib import Path


def assert_nothing_done(out: Path) -> None:
    """Nothing is at an output path, and nothing of it beside: no part was finished."""
    assert not out.exists()
    assert stagings(out) == []


def assert_to_be_gone_on_with(out: Path) -> Path:
    """Nothing is at an output path; beside it is one staging directory with finished parts alone. Returns that."""
    assert not out.exists()
    (root,) = stagings(out)
    assert {path.name for path in root.iterdir()} == {"begun.json", "parts", "model"}
    receipts = list((root / "parts").iterdir())
    assert receipts
    assert all(path.suffix == ".json" for path in receipts)
    return root


def stagings(out: Path) -> list[Path]:
    """Whatever lies beside an output path and has its name, and more."""
    return [path for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.")]
