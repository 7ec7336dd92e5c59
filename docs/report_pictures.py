"""The report as a browser shows it, on a desk and on a phone: ``python -m docs.report_pictures``. Needs Chromium.

A run is made for it: a language model from a ZeRO-2 checkpoint, whose vocabulary grows, beside a vision tower that was
frozen. The picture is an SVG that holds the page in both schemes, and shows the one that the reader has.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from base64 import b64encode
from pathlib import Path

from PIL import Image

from benchmarks.synthetic import LlamaShape, write_safetensors, write_zero
from tests.browser import Tab, browser

PICTURE = Path(__file__).parent / "pictures" / "report-page.svg"
_DESK, _PHONE = (1180, 980), (390, 980)
_BETWEEN, _COLOURS = 30, 48

_MAPPING = """\
shardmerge: 1
sources:
  trained: work_dirs/global_step1
  vision: clip-vit-large/model.safetensors
output: {path: llava-llama3, dtype: bfloat16, shard_size: 400MB}
tensors:
  language_model.model.embed_tokens.weight:
    op: concat
    of: [trained:llm.model.embed_tokens.weight, {op: new_rows, of: trained:llm.model.embed_tokens.weight, rows: 64}]
  language_model.lm_head.weight:
    op: concat
    of: [trained:llm.lm_head.weight, {op: new_rows, of: trained:llm.lm_head.weight, rows: 64}]
  multi_modal_projector.{rest...}: trained:projector.{rest...}
  vision_tower.{rest...}: vision:{rest...}
  language_model.{rest...}: trained:llm.{rest...}
"""


def _run(folder: Path) -> Path:
    """Makes a model of 1.5 GB, and returns its report."""
    language = LlamaShape(2048, 8, 16, 4, 5632, 32000).tensors("llm.")
    projector = {"projector.linear_1.weight": (2048, 1024), "projector.linear_2.weight": (2048, 2048)}
    write_zero(folder / "work_dirs", language | projector, stage=2, world=4, fill=True)
    vision = {
        f"encoder.layers.{layer}.{name}.weight": shape
        for layer in range(24)
        for name, shape in (("self_attn.qkv", (3072, 1024)), ("self_attn.out", (1024, 1024)), ("mlp.fc1", (4096, 1024)))
    }
    (folder / "clip-vit-large").mkdir()
    write_safetensors(folder / "clip-vit-large" / "model.safetensors", vision, fill=True)
    (folder / "mapping.yaml").write_text(_MAPPING, "utf-8")
    command = [sys.executable, "-m", "shardmerge", "run", "mapping.yaml", "--report", "-q"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "llava-llama3.report.html"


def _shown(tab: Tab, page: Path, size: tuple[int, int], *, dark: bool) -> str:
    """Returns the page as a PNG of few colours, in base64."""
    place = page.with_suffix(".png")
    tab.view(size, dark=dark)
    tab.open(page)
    tab.picture(place)
    found = io.BytesIO()
    Image.open(place).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(found, "PNG", optimize=True)
    return b64encode(found.getvalue()).decode()


def _drawn(tab: Tab, page: Path) -> str:
    width, height = _DESK[0] + _BETWEEN + _PHONE[0], _DESK[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>A report in a browser, on a desk and on a phone</title>",
        "<style>.dark { display: none } rect { fill: none; stroke: #8a8f98 }",
        "@media (prefers-color-scheme: dark) { .dark { display: inline } .light { display: none } }</style>",
    ]
    for scheme in ("light", "dark"):
        for size, x in ((_DESK, 0), (_PHONE, _DESK[0] + _BETWEEN)):
            data = _shown(tab, page, size, dark=scheme == "dark")
            place = f'x="{x}" width="{size[0]}" height="{size[1]}"'
            lines.append(f'<image class="{scheme}" {place} href="data:image/png;base64,{data}"/>')
    for size, x in ((_DESK, 0), (_PHONE, _DESK[0] + _BETWEEN)):
        lines.append(f'<rect x="{x + 0.5}" y="0.5" width="{size[0] - 1}" height="{size[1] - 1}" rx="8"/>')
    return "\n".join([*lines, "</svg>\n"])


def main() -> None:
    """Writes the picture."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        page = _run(folder)
        with browser(folder / "profile") as tab:
            PICTURE.write_text(_drawn(tab, page), "utf-8")


if __name__ == "__main__":
    main()
