"""Writes the pages of ops and presets, and their places in mkdocs.yml: ``python -m docs.generate`` from the root.

Everything in them is from the code: what an op says of itself, its example and what that makes, the presets' files.
A test checks that the committed pages are those.
"""

from __future__ import annotations

from pathlib import Path

from docs.layout_picture import picture
from docs.op_pages import op_pages
from docs.preset_pages import file_name, preset_pages
from shardmerge.mapping.preset_files import list_presets
from shardmerge.ops.registry import OPS

ROOT = Path(__file__).resolve().parent.parent
_BEGIN, _END = "      # generated: {0}\n", "      # end of {0}\n"
_FOLDERS = ("ops", "presets")


def generated() -> dict[Path, str]:
    """Returns the text of every generated file, mkdocs.yml with its generated lines included."""
    texts = {"guides/layouts.svg": picture(), **op_pages(), **preset_pages()}
    pages = {ROOT / "docs" / path: text for path, text in texts.items()}
    return {**pages, ROOT / "mkdocs.yml": _configuration((ROOT / "mkdocs.yml").read_text("utf-8"))}


def outdated() -> list[Path]:
    """Returns what would be written, changed or removed."""
    wanted = generated()
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    return changed + _left_over(wanted)


def main() -> None:
    """Writes what is outdated."""
    wanted = generated()
    for path in _left_over(wanted):
        path.unlink()
    for path, text in wanted.items():
        if not path.is_file() or path.read_text("utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
            print(path.relative_to(ROOT))


def _left_over(wanted: dict[Path, str]) -> list[Path]:
    return [path for name in _FOLDERS for path in (ROOT / "docs" / name).glob("*.md") if path not in wanted]


def _configuration(text: str) -> str:
    lists = {
        "ops": ["ops/index.md", *(f"ops/{name}.md" for name in OPS)],
        "presets": ["presets/index.md", *(f"presets/{file_name(name)}" for name in list_presets())],
    }
    for name, paths in lists.items():
        before, _, rest = text.partition(_BEGIN.format(name))
        _, _, after = rest.partition(_END.format(name))
        lines = "".join(f"      - {path}\n" for path in paths)
        text = before + _BEGIN.format(name) + lines + _END.format(name) + after
    return text


if __name__ == "__main__":
    main()
