"""What a run that failed or was stopped may leave beside its output path: finished parts, to go on with."""

from __future__ import annotations

from pathlib import Path


def assert_nothing_done(out: Path) -> None:
    """Nothing is at an output path, and nothing of it beside: no part was finished."""
    assert not out.exists()
    assert stagings(out) == []


def assert_well_left(out: Path) -> None:
    """Nothing is at an output path, and beside it at most one staging directory without any unfinished file."""
    assert not out.exists()
    for root in stagings(out):
        names = {path.name for path in root.iterdir()}
        assert names <= {"begun.json", "parts", "model"}, names
        parts = [path.name for path in root.glob("parts/*")]
        assert all(name.endswith(".json") for name in parts), parts
    assert len(stagings(out)) <= 1, stagings(out)


def stagings(out: Path) -> list[Path]:
    """Whatever lies beside an output path, has its name, and more."""
    return list(out.parent.glob(f"{out.name}.*"))


def files(folder: Path) -> dict[str, bytes]:
    """All files below a directory, by their names in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
