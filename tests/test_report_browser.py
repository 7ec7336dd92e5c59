"""The report in a real browser: it works, fits a phone, can be read in both schemes, and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from tests.browser import CHROMIUM, DESK, PHONE, Tab, browser
from tests.conftest import shardmerge
from tests.report_pages import reported
from tests.test_report import HOSTILE, edited, grown, hostile

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

SIZES = {"desk": DESK, "phone": PHONE}
ROWS = (
    "[...document.querySelectorAll('#tensors tbody tr')].filter(row => row.offsetParent || row.getClientRects().length)"
)
NAMES = f"{ROWS}.map(row => row.cells[0].textContent)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reported(tmp_path_factory.mktemp("browser")).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    return folder / "out.report.html"


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that took long enough for curves."""
    folder = tmp_path_factory.mktemp("curves")
    save_file({f"w{i}": torch.randn(1 << 22) for i in range(24)}, folder / "in.safetensors")
    shardmerge("convert", folder / "in.safetensors", folder / "out", "--dtype", "bfloat16", "--workers", 1, "--report")
    return folder / "out.report.html"


def test_every_tensor_has_a_row(tab: Tab, page: Path, folder: Path) -> None:
    tab.view(DESK)
    tab.open(page)
    names = json.loads((folder / "out" / "shardmerge.json").read_text())["tensors"]
    assert sorted(tab.ask(NAMES)) == sorted(names)
    assert tab.errors == []


def test_the_address_searches(tab: Tab, page: Path) -> None:
    tab.view(DESK)
    tab.open(page, "#q=lm_head")
    assert tab.ask(NAMES) == ["language_model.lm_head.weight"]
    assert tab.ask("document.getElementById('search').value") == "lm_head"
    assert tab.ask("document.getElementById('count').textContent") == "1 of 80 rows"


def test_typing_searches_all_of_a_row(tab: Tab, page: Path) -> None:
    tab.view(DESK)
    tab.open(page)
    tab.ask("document.getElementById('search').focus()")
    tab.type("vision: layers.1 bias")
    found = tab.ask(NAMES)
    assert found
    assert all(name.startswith("vision_tower") and ".layers.1." in name and name.endswith("bias") for name in found)
    assert tab.ask("decodeURIComponent(location.hash)") == "#q=vision: layers.1 bias"


def test_a_click_sorts_by_bytes(tab: Tab, page: Path) -> None:
    tab.view(DESK)
    tab.open(page)
    click = "document.querySelectorAll('#tensors thead button')[3].click()"
    sizes = f"{ROWS}.map(row => row.cells[3].textContent)"
    units = {"B": 1.0, "KB": 1e3, "MB": 1e6}

    def shown() -> list[float]:
        return [float(text.split()[0]) * units[text.split()[1]] for text in tab.ask(sizes)]

    tab.ask(click)
    assert shown() == sorted(shown())
    tab.ask(click)
    assert shown() == sorted(shown(), reverse=True)
    assert shown()[0] > shown()[-1]


def test_patterns_are_found_by_any_number(tab: Tab, folder: Path, tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.experts.{e}.w1.weight": (8, 8) for i in range(40) for e in range(30)}
    path = sm.report(edited(folder, tmp_path / "out", grown({**shapes, "lm_head.weight": (8, 8)})))
    tab.view(DESK)
    tab.open(path, "#q=layers.17.experts")
    assert tab.ask(NAMES) == ["model.layers.{0-39}.experts.{0-29}.w1.weight (1,200 tensors)"]
    tab.open(path, "#q=lm_head")
    assert tab.ask(NAMES) == ["lm_head.weight"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window(tab: Tab, page: Path, curves: Path, size: str, dark: bool) -> None:
    tab.view(SIZES[size], dark=dark)
    for path in (page, curves):
        tab.open(path)
        tab.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert tab.ask("[innerWidth, document.documentElement.scrollWidth]") == [SIZES[size][0]] * 2
        shown = tab.ask(
            "[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).map(s => s.classList[1])"
        )
        assert set(shown) == {"wide" if size == "desk" else "narrow"}
        assert tab.errors == []


OVERLAPS = """(() => {
  const texts = [...document.querySelectorAll('svg.narrow.flow text, svg.wide.flow text')]
    .filter((one) => one.getClientRects().length).map((one) => [one.textContent, one.getBoundingClientRect()]);
  return texts.flatMap(([name, a], place) => texts.slice(place + 1)
    .filter(([, b]) => a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
    .map(([other]) => [name, other]));
})()"""


@pytest.mark.parametrize("size", SIZES)
def test_no_names_in_the_flow_lie_over_each_other(tab: Tab, page: Path, size: str) -> None:
    tab.view(SIZES[size])
    tab.open(page)
    assert tab.ask(OVERLAPS) == []


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      const c = v / 255; return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; });
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
  };
  const found = [];
  for (const e of document.querySelectorAll('h1, h2, p, th, td, dt, dd, a, button, summary, code, li, text')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const a = light(e.tagName === 'text' ? style.fill : style.color), b = light(ground(e));
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName, e.textContent.slice(0, 30)]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(tab: Tab, page: Path, dark: bool) -> None:
    """Level AA of WCAG 2.2, 1.4.3: 4.5 to 1."""
    tab.view(DESK, dark=dark)
    tab.open(page)
    assert tab.ask(CONTRAST)[0][0] >= 4.5, tab.ask(CONTRAST)


GROUND = "getComputedStyle(document.documentElement).backgroundColor"


def test_the_button_changes_the_scheme(tab: Tab, page: Path) -> None:
    tab.view(DESK)
    tab.open(page)
    light = tab.ask(GROUND)
    tab.ask("document.getElementById('theme').click()")
    dark = tab.ask(GROUND)
    tab.ask("document.getElementById('theme').click()")
    assert tab.ask(GROUND) == light != dark
    tab.ask("localStorage.clear()")
    tab.view(DESK, dark=True)
    tab.open(page)
    assert tab.ask(GROUND) == dark


def test_the_pointer_reads_the_curves(tab: Tab, curves: Path) -> None:
    tab.view(DESK)
    tab.open(curves)
    box = "(b => [b.x, b.y, b.width])(document.querySelector('svg.chart.wide').getBoundingClientRect())"
    tab.ask("document.querySelector('svg.chart').scrollIntoView()")
    x, y, width = tab.ask(box)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + width - 15, y=y + 90)
    assert "0.20 GB done" in tab.ask("document.getElementById('readout').textContent")


def test_it_asks_the_network_for_nothing(tab: Tab, page: Path, curves: Path) -> None:
    tab.view(DESK)
    for path in (page, curves):
        tab.open(path)
        assert tab.requests == [path.as_uri()]


def test_its_policy_forbids_the_network(tab: Tab, page: Path, tmp_path: Path) -> None:
    """What somebody adds to a page cannot load or send anything."""
    text = page.read_text("utf-8")
    added = "<script>fetch('http://192.0.2.1/x').catch(() => 0)</script><img src='http://192.0.2.1/y.png'></body>"
    (tmp_path / "added.html").write_text(text.replace("</body>", added), "utf-8")
    tab.view(DESK)
    tab.open(tmp_path / "added.html")
    assert sum("Content Security Policy" in error for error in tab.errors) >= 2


def test_hostile_text_runs_nothing(tab: Tab, folder: Path, tmp_path: Path) -> None:
    path = sm.report(edited(folder, tmp_path / "out", hostile))
    tab.view(DESK)
    tab.open(path)
    assert tab.ask("document.documentElement.dataset.hacked") is None
    assert tab.ask("document.querySelectorAll('img, script:not([id]):not(:last-of-type)').length") == 0
    assert set(HOSTILE[:4]) <= set(tab.ask(NAMES))
    assert tab.errors == []
    assert tab.ask("[innerWidth, document.documentElement.scrollWidth]") == [DESK[0]] * 2


def test_without_javascript_it_reads_as_well(tab: Tab, page: Path) -> None:
    tab.view(DESK)
    tab.scripts(allowed=False)
    try:
        tab.open(page)
        document = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
        rows = tab.call("DOM.querySelectorAll", nodeId=document, selector="#tensors tbody tr")["nodeIds"]
        search = tab.call("DOM.querySelector", nodeId=document, selector="#find[hidden]")["nodeId"]
        flow = tab.call("DOM.querySelector", nodeId=document, selector="svg.flow.wide path")["nodeId"]
    finally:
        tab.scripts(allowed=True)
    assert len(rows) == 80
    assert search
    assert flow


def test_the_page_has_names_for_screen_readers(tab: Tab, page: Path) -> None:
    """As the browser tells them to a screen reader."""
    tab.view(DESK)
    tab.open(page)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    pictures = [name for role, name in named if role in ("image", "img")]
    assert pictures
    assert all(name.startswith(("Flow of bytes.", "Throughput and memory")) for name in pictures)
    assert all(name for role, name in named if role in ("button", "searchbox", "textbox", "table", "link", "heading"))
    assert {"Tensors of the result", "Sources"} <= {name for role, name in named if role == "table"}
    levels = tab.ask("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(later - level <= 1 for level, later in pairwise(levels))
