"""The pictures of terminals show what the commands print: each is recorded again, and compared without its numbers."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from docs.recordings import PICTURES, SCENES, Scene, lay_out, record
from docs.terminal import picture, recording


def words(svg: str) -> list[str]:
    """Returns the lines of the last screen, numbers as N and without the plan's id, which has the times of its files.

    Rates and times change their units with the day.
    """
    last = svg[svg.rindex("<g") :]
    lines = ["".join(re.findall(r">([^<]*)</tspan>", line)) for line in re.findall(r"<text y=.*?</text>", last)]
    lines = [re.sub(r"^plan [0-9a-f]{16}$", "plan ID", line) for line in lines]
    return [re.sub(r"\b(KB|MB|GB|B)/s", "B/s", re.sub(r"\d[\d.,]*", "N", unescape(line))) for line in lines]


@pytest.mark.parametrize("name", SCENES)
def test_a_picture_shows_what_is_printed(name: str, tmp_path: Path) -> None:
    scene: Scene = SCENES[name]
    lay_out(tmp_path)
    frames = record(scene, tmp_path).frames
    drawn = (recording if scene.moves else picture)(frames, scene.columns, scene.title)
    shown = (PICTURES / f"{name}.svg").read_text("utf-8")
    assert words(drawn) == words(shown)
    assert len(words(shown)) > 3
    assert all(sum(len(text) for text, _, _ in line) <= scene.columns for line in frames[-1].screen)


def test_a_recording_moves_and_ends_with_its_last_screen() -> None:
    """Without animation, and for who wants no motion, the last screen is seen."""
    svg = (PICTURES / "run.svg").read_text("utf-8")
    assert svg.count("@keyframes") == svg.count('<g class="frame') > 3
    assert ".frame:last-of-type{visibility:visible}" in svg
    assert "prefers-reduced-motion" in svg
    assert len(svg) < 100_000
