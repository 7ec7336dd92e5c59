"""Pages as a browser shows them, on a desk and on a phone, in both schemes, as one SVG. Needs Chromium."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path

from PIL import Image

from tests.browser import Tab

Size = tuple[int, int]
DESK, PHONE = (1180, 980), (390, 980)
_BETWEEN, _COLOURS = 30, 48


def screens(tab: Tab, page: Path, title: str, sizes: tuple[Size, ...] = (DESK, PHONE)) -> str:
    """Returns an SVG that holds the page in both schemes, and shows the one that the reader has."""
    places = [(size, sum(width + _BETWEEN for width, _ in sizes[:number])) for number, size in enumerate(sizes)]
    width, height = places[-1][1] + sizes[-1][0], max(height for _, height in sizes)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{title}</title>",
        "<style>.dark { display: none } rect { fill: none; stroke: #8a8f98 }",
        "@media (prefers-color-scheme: dark) { .dark { display: inline } .light { display: none } }</style>",
    ]
    for scheme in ("light", "dark"):
        for size, x in places:
            data = _shown(tab, page, size, dark=scheme == "dark")
            place = f'x="{x}" width="{size[0]}" height="{size[1]}"'
            lines.append(f'<image class="{scheme}" {place} href="data:image/png;base64,{data}"/>')
    for size, x in places:
        lines.append(f'<rect x="{x + 0.5}" y="0.5" width="{size[0] - 1}" height="{size[1] - 1}" rx="8"/>')
    return "\n".join([*lines, "</svg>\n"])


def _shown(tab: Tab, page: Path, size: Size, *, dark: bool) -> str:
    """Returns the page as a PNG of few colours, in base64."""
    place = page.with_suffix(".png")
    tab.view(size, dark=dark)
    tab.open(page)
    tab.ask("new Promise(done => setTimeout(done, 500))")  # a script may choose the scheme after it is loaded
    tab.picture(place)
    found = io.BytesIO()
    Image.open(place).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(found, "PNG", optimize=True)
    place.unlink()
    return b64encode(found.getvalue()).decode()
