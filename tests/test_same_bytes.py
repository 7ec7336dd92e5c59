"""One result, made in other ways: a sample of ``python -m tests.same_bytes``."""

from __future__ import annotations

from pathlib import Path

from tests.same_bytes import Scene, compared


def test_two_other_ways(tmp_path: Path) -> None:
    """One in shares, one after kills, with other workers, memory, directory and environment."""
    found: list[tuple[set[str], list[str]]] = []
    compared(Scene(tmp_path), "safetensors", [0, 1], lambda seed, way, files: found.append((set(way.seen()), files)))
    assert [files for _, files in found] == [[], []]
    assert found[0][0] | found[1][0] >= {"--part", "killed and resumed", "another directory", "mmap"}
