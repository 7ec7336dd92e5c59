"""The pages as a browser gets them: what a page shows in the repository stands on the site too, and as code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, DESK, PHONE, Tab, browser
from tests.test_docs import DOCS, PAGES, ROOT, identify

_BLOCK = re.compile(r"^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Page(HTMLParser):
    """The text of a page's article, and that of its blocks of code."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.code = 0
        self.words: list[str] = []
        self.blocks: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside += tag == "article"
        if tag == "pre":
            self.code += 1
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "article"
        self.code -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if self.code:
            self.blocks[-1] += data
        elif self.inside:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, under which --strict counts no warning: a broken link would pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def rendered(site: Path, page: Path) -> Page:
    place = page.relative_to(DOCS).with_suffix("")
    name = place.parent if place.name == "index" else place
    parser = Page()
    parser.feed((site / name / "index.html").read_text("utf-8"))
    return parser


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_every_block_of_code_is_on_the_page_and_no_markup_is(page: Path, site: Path) -> None:
    text = page.read_text("utf-8")
    found = rendered(site, page)
    shown = {" ".join(block.split()) for block in found.blocks}
    for block in _BLOCK.findall(text):
        assert " ".join(block.split()) in shown
    prose = " ".join(found.words)
    assert prose.strip()
    assert not re.search(r"```|--8<|<!--|\]\(", prose)


def test_files_are_shown() -> None:
    """The blocks that are files are those files, to the letter; there are dozens."""
    blocks = [case for page in PAGES for case in _FILE.findall(page.read_text("utf-8"))]
    assert len(blocks) > 30
    for name, block in blocks:
        path = DOCS / name
        assert block == (path if path.is_file() else ROOT / name).read_text("utf-8"), name


def test_every_guide_begins_with_its_picture() -> None:
    for guide in (DOCS / "guides").glob("*.md"):
        head = guide.read_text("utf-8").split("\n", 4)
        assert head[2].endswith(f"](../pictures/{guide.stem}.svg)"), guide.name
        assert (DOCS / "pictures" / f"{guide.stem}.svg").is_file()


def test_every_picture_has_a_dark_scheme() -> None:
    drawn = [path for path in DOCS.rglob("*.svg") if path.name != "logo.svg"]
    assert len(drawn) > 30
    for path in drawn:
        assert "prefers-color-scheme: dark" in path.read_text("utf-8"), path.name


# What overflows, by how much: blocks of code on a desk, and the page itself.
_TOO_WIDE = """[...document.querySelectorAll("pre > code")].filter(one => one.scrollWidth > one.clientWidth + 1).length
    + Math.max(document.documentElement.scrollWidth - innerWidth, 0)"""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name in ("docs", "guides", "reference")], ids=identify
)
def test_pages_fit_a_desk_and_a_phone(page: Path, site: Path, tab: Tab) -> None:
    place = page.relative_to(DOCS).with_suffix("")
    built = site / (place.parent if place.name == "index" else place) / "index.html"
    tab.view(DESK)
    tab.open(built)
    assert tab.ask(_TOO_WIDE) == 0
    tab.view(PHONE)
    tab.open(built)
    assert tab.ask("document.documentElement.scrollWidth") <= PHONE[0]
    pictures = "[...document.images].filter(one => !one.naturalWidth).map(one => one.src)"
    assert tab.ask(pictures) == []


def test_the_site_follows_the_readers_scheme_when_it_changes(site: Path, tab: Tab) -> None:
    """The theme stores the scheme of the first visit, unless its palette begins with one that follows the system."""
    grounds = []
    for dark in (False, True):
        tab.view(DESK, dark=dark)
        tab.open(site / "index.html")
        grounds.append(tab.ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
