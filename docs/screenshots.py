"""Pictures of the site and of a notebook in a browser: ``python -m docs.screenshots``. Needs Chromium."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from docs.recordings import PICTURES, ROOT, lay_out
from docs.screens import screens
from tests.browser import browser

_CELLS = (
    "import shardmerge\nshardmerge.inspect('iter_2.pth')",
    "plan = shardmerge.plan('mapping.yaml')\nplan",
    "checkpoint = shardmerge.open_checkpoint('mapping.yaml')\ncheckpoint['language_model.lm_head.weight'][:1, :6]",
)
# As JupyterLab sets a notebook, in both schemes.
_STYLE = """
body { margin: 24px auto; max-width: 900px; font: 14px system-ui, sans-serif; background: #fff; color: #212121 }
.cell { display: grid; grid-template-columns: 52px 1fr; gap: 4px 8px; margin-bottom: 18px }
.cell > span { color: #777; font: 12px monospace; padding-top: 8px }
pre { margin: 0; padding: 8px; font: 13px monospace; background: #f5f5f5; border: 1px solid #e0e0e0; overflow: auto }
.out { background: none; border: 0 }
@media (prefers-color-scheme: dark) {
  body { background: #111; color: #e0e0e0 } pre { background: #1e1e1e; border-color: #333 } .out { background: none }
}
"""


def notebook(folder: Path) -> Path:
    """Runs a notebook in a kernel, and returns the page of its cells with what they show."""
    lay_out(folder)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in _CELLS])
    NotebookClient(book, resources={"metadata": {"path": str(folder)}}).execute()
    parts = [f"<!doctype html><meta charset='utf-8'><title>notebook</title><style>{_STYLE}</style>"]
    for number, cell in enumerate(book.cells, 1):
        shown = cell.outputs[-1]["data"]
        said = shown.get("text/html") or f"<pre class='out'>{shown['text/plain']}</pre>"
        parts.append(
            f"<div class='cell'><span>[{number}]:</span><pre>{cell.source}</pre><span></span><div>{said}</div></div>"
        )
    page = folder / "notebook.html"
    page.write_text("\n".join(parts).replace(str(folder), "~/llava"), "utf-8")
    return page


def site(folder: Path) -> Path:
    """Builds the site for reading from files, and returns its folder."""
    settings = folder / "mkdocs.yml"
    settings.write_text(f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: {ROOT}/docs\nuse_directory_urls: false\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "-f",
        str(settings),
        "--site-dir",
        str(folder / "site"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder / "site"


def main() -> None:
    """Writes the pictures."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, browser(Path(name) / "profile") as tab:
        folder = Path(name)
        pages = site(folder)
        drawn = {
            "site-start": screens(tab, pages / "index.html", "The site, on a desk and on a phone"),
            "site-guide": screens(tab, pages / "guides" / "xtuner-llava.html", "A guide, on a desk and on a phone"),
            "notebook": screens(tab, notebook(folder / "book"), "A notebook", ((980, 760),)),
        }
    for key, text in drawn.items():
        (PICTURES / f"{key}.svg").write_text(text, "utf-8")
        print(f"docs/pictures/{key}.svg  {len(text):,} bytes")


if __name__ == "__main__":
    main()
