"""What an interpreter and a notebook show of the public values: few lines, small HTML, in a real browser and kernel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.tensors import Catalog, FileStamp, TensorEntry

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

HOSTILE = ["<script>document.title='run'</script>", 'a"b', "it's", "x&y", "esc\x1b[31m", "line\nbreak", "<img src=x>"]
PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:8px;background:{background}">{body}
<script>document.body.dataset.width = document.documentElement.scrollWidth</script>"""


def made(names: list[str], warnings: tuple[str, ...] = ()) -> Catalog:
    """A catalog with tensors of some names; there are no files."""
    entries = {name: TensorEntry(name, DTYPES["BF16"], (64, 32 + len(name)), (), "here") for name in names}
    tied = {f"{name}.tied": name for name in names[:20]}
    return Catalog("/models/<b>", "a <kind>", entries, tied, (FileStamp("/models/a", 10, 1),), warnings=warnings)


HUGE = made([f"{hostile}.{i}.{'x' * (i % 90)}" for i in range(400) for hostile in HOSTILE], tuple(HOSTILE * 50))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Every public value, of a model in the shape of an 8B."""
    scale = pytest.importorskip("benchmarks.synthetic", reason="torch writes the checkpoints")
    folder = tmp_path_factory.mktemp("shown")
    shapes = scale.LlamaShape(64, 32, 4, 2, 128, 256).tensors()
    for name in ("one", "two"):
        scale.write_safetensors(folder / f"{name}.safetensors", shapes, fill=True)
    (folder / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {one: one.safetensors, two: two.safetensors}\noutput: {path: out}\ntensors:\n"
        '  "model.layers.{rest...}": one:model.layers.{rest...}\n  "{a}.weight": two:{a}.weight\n'
        '  "model.{a}.weight": two:model.{a}.weight\n'
        'drop: ["two:model.layers.{rest...}", "one:model.{a}.weight", "one:{a}.weight"]\n'
    )
    result = shardmerge.run(folder / "mapping.yaml", dtype="float16")
    catalog = shardmerge.inspect(folder / "one.safetensors")
    return {
        "plan": result.plan,
        "result": result,
        "catalog": catalog,
        "checkpoint": shardmerge.open_checkpoint(folder / "mapping.yaml"),
        "preset": next(one for one in shardmerge.presets() if one.name == "xtuner/llava-to-hf"),
        "verdict": shardmerge.verify(result.path),
        "tensor": shardmerge.open_checkpoint(folder / "mapping.yaml")["lm_head.weight"],
        "entry": catalog["lm_head.weight"],
        "comparison": shardmerge.diff(result.path, folder / "one.safetensors"),
        "huge": HUGE,
    }


VALUES = ["plan", "result", "catalog", "checkpoint", "preset", "verdict", "comparison", "tensor", "entry", "huge"]
CARDS = [name for name in VALUES if name not in ("tensor", "entry")]


@pytest.mark.parametrize("name", VALUES)
def test_at_most_ten_short_lines(shown: dict[str, object], name: str) -> None:
    lines = repr(shown[name]).splitlines()
    assert 0 < len(lines) <= 10
    assert max(map(len, lines)) <= 110
    assert all(line.isprintable() for line in lines)


def test_what_the_lines_say(shown: dict[str, object]) -> None:
    plan = repr(shown["plan"]).splitlines()
    assert plan[0] == "Plan of state-dict: 291 tensors, 1.22 M parameters, 2.43 MB in 1 file"
    assert plan[1].strip().startswith("by source: 2.37 MB one, computed, 65.66 KB two, computed")
    assert any(re.match(r"  model\.layers\.0-31  288 tensors, 1\.18 M, 2\.37 MB", line) for line in plan)
    assert plan[-1] == f"  id: {shown['plan'].id[:16]}"  # type: ignore[attr-defined]
    assert "path: " in repr(shown["result"])
    assert repr(shown["tensor"]) == "LazyTensor('lm_head.weight', BF16 [256, 64], 'two:lm_head.weight')"
    assert repr(shown["entry"]) == "TensorEntry('lm_head.weight', BF16 [256, 64], 'safetensors', 1 piece)"
    assert repr(shown["verdict"]).startswith("Verified: 291 tensors, 2.43 MB\n  ok: 1 shard(s)")
    assert "warning: <script>" in repr(HUGE)


class Balanced(HTMLParser):
    """Checks that every element is closed where it must be, and keeps what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", CARDS)
def test_html_is_small_whole_and_escaped(shown: dict[str, object], name: str) -> None:
    html = shown[name]._repr_html_()  # type: ignore[attr-defined]
    assert len(html.encode()) < 30_000
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert page.tags <= {"style", "div", "span", "b", "i", "code", "details", "summary"}
    assert not re.search(r"https?:|url\(|@import|\son\w+=", html.replace("document.title", ""))


def test_html_says_what_is_left_out() -> None:
    page = Balanced()
    page.feed(HUGE._repr_html_())
    assert page.text.count("more") >= 2
    assert HOSTILE[0] in page.text


def test_html_has_components_and_sources(shown: dict[str, object]) -> None:
    page = Balanced()
    page.feed(shown["plan"]._repr_html_())  # type: ignore[attr-defined]
    for words in (
        "one, computed 2.37 MB, 97%",
        "layers.0-31",
        "{gate,up}_proj.weight",
        "64 \N{MULTIPLICATION SIGN} F16 [128, 64]",
    ):
        assert words in page.text, words


def test_nothing_is_imported_before_something_is_shown() -> None:
    program = (
        "import sys, shardmerge, shardmerge.api\n"
        "assert not [one for one in sys.modules if one.startswith('shardmerge.display')]\n"
        "assert repr(shardmerge.presets()[0]) and 'shardmerge.display' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- in a browser ---


def chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture
def photograph(tmp_path: Path) -> Callable[..., Image.Image]:
    def taken(html: str, *, dark: bool = False, script: bool = True, width: int = 900) -> Image.Image:
        page, picture = tmp_path / "page.html", tmp_path / "picture.png"
        page.write_text(PAGE.format(background="#111" if dark else "#fff", body=html), "utf-8")
        settings = f"preferredColorScheme={0 if dark else 1}" + ("" if script else ",scriptEnabled=false")
        size, shot = f"--window-size={width},700", f"--screenshot={picture}"
        chromium(f"--blink-settings={settings}", size, shot, page.as_uri())
        return Image.open(picture).convert("RGB")

    return taken


def luminance(colour: tuple[int, ...]) -> float:
    parts = (one / 255 for one in colour)
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(picture: Image.Image) -> float:
    """Returns the contrast of the strongest text with the card behind it, as WCAG counts it."""
    card = picture.crop((12, 12, picture.width - 40, 40))  # the title
    colours = sorted(card.getcolors(1 << 16), reverse=True)
    ground = luminance(colours[0][1])
    return max(
        (max(luminance(one), ground) + 0.05) / (min(luminance(one), ground) + 0.05) for _, one in colours
    )  # fmt: skip


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_readable_without_script(
    shown: dict[str, object], photograph: Callable[..., Image.Image], dark: bool
) -> None:
    html = shown["plan"]._repr_html_()  # type: ignore[attr-defined]
    picture = photograph(html, dark=dark)
    assert contrast(picture) > 10
    ground = luminance(picture.getpixel((30, 12)))  # type: ignore[arg-type]
    assert ground < 0.05 if dark else ground > 0.9
    assert picture.tobytes() == photograph(html, dark=dark, script=False).tobytes()


@needs_chromium
@pytest.mark.parametrize("name", ["plan", "huge"])
@pytest.mark.parametrize("width", [500, 1200])  # chromium has no narrower window
def test_a_browser_runs_nothing_and_needs_no_scrolling(
    shown: dict[str, object], tmp_path: Path, name: str, width: int
) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGE.format(background="#fff", body=shown[name]._repr_html_()), "utf-8")  # type: ignore[attr-defined]
    found = chromium(f"--window-size={width},700", "--dump-dom", page.as_uri())
    (widest,) = re.findall(r'data-width="(\d+)"', found)
    assert int(widest) <= width
    assert "<title>" not in found
    assert len(re.findall("<script", found)) == 1  # the page's own


# --- in a notebook ---


def test_a_notebook_shows_html_and_text(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    source = "import shardmerge\nnext(one for one in shardmerge.presets() if one.name == 'peft/merge')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    kernel = tmp_path / "kernels" / "here"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                    "display_name": "here", "language": "python"})
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path))
        patch.setenv("PYTHONPATH", str(Path(shardmerge.__file__).parent.parent))
        nbclient.NotebookClient(notebook, kernel_name="here", timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"].startswith("Preset peft/merge: ")
    assert output.data["text/html"].startswith("<style>.sm-card{")
