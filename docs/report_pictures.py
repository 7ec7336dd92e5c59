"""The report as a browser shows it, on a desk and on a phone: ``python -m docs.report_pictures``. Needs Chromium.

A run is made for it: a language model from a ZeRO-2 checkpoint, whose vocabulary grows, beside a vision tower that was
frozen. The picture is an SVG that holds the page in both schemes, and shows the one that the reader has.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.synthetic import LlamaShape, write_safetensors, write_zero
from docs.screens import screens
from tests.browser import browser

PICTURE = Path(__file__).parent / "pictures" / "report-page.svg"

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


def main() -> None:
    """Writes the picture."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        page = _run(folder)
        with browser(folder / "profile") as tab:
            PICTURE.write_text(screens(tab, page, "A report in a browser, on a desk and on a phone"), "utf-8")


if __name__ == "__main__":
    main()
