"""Writes what is generated of the documentation: ``python -m docs.generate`` from the root.

Pages of ops, presets, error codes and adapters' fields, the lists of targets, layouts and architectures, the pictures
of layouts and at the head of guides, and the files that a page shows: what stands in the block after ``<!-- file:
examples/x.yaml -->`` is that file. It stands in the page itself, so that who reads the repository sees it too.

Everything in them is from the code: what an op says of itself, its example and what that makes, the presets' files.
A test checks that the committed pages are those.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.headline import HEADLINE, headline
from benchmarks.reading import read
from benchmarks.report import RESULTS
from docs.adapter_page import adapter_page
from docs.bit_flips import bit_flips
from docs.day_of_work import PICTURE, day_of_work, day_picture
from docs.error_outcomes import error_outcomes
from docs.error_page import error_page
from docs.flow_pictures import flow_pictures
from docs.fuzzing import differential, fuzzing
from docs.layout_picture import picture
from docs.layout_rows import layout_rows
from docs.malformed_files import malformed_files
from docs.markdown import table
from docs.mutants import mutants, mutants_page
from docs.op_pages import op_pages
from docs.power_cuts import kills, power_cuts, syncs
from docs.preset_pages import preset_pages
from docs.real_limits import real_limits
from docs.reliability_summary import summary
from docs.soak_tables import interrupts, part_flips, races, same_bytes, source_changes
from shardmerge.targets.registry import TARGETS
from shardmerge.targets.tables import every_table

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = ("ops", "presets")
# A file's name in a comment, and the block of code that shows it.
_SHOWN = re.compile(r"(<!-- file: (\S+) -->\n```\w+\n).*?(```\n)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Returns the text of every generated file, mkdocs.yml with its generated lines included."""
    pictures = {"guides/layouts.svg": picture(), PICTURE: day_picture(), **flow_pictures()}
    texts = {**pictures, **op_pages(), **preset_pages(), **adapter_page(), **error_page(), **mutants_page()}
    pages = {ROOT / "docs" / path: text for path, text in texts.items()}
    written = (path for path in (ROOT / "docs").rglob("*.md") if path.parent.name not in _FOLDERS)
    shown = {path: _with_files(path.read_text("utf-8")) for path in written if path not in pages}
    reference = ROOT / "docs" / "reference" / "mapping.md"
    guides = ROOT / "docs" / "guides"
    reliability = ROOT / "docs" / "reliability.md"
    guide, architectures = guides / "layouts.md", guides / "architectures.md"
    return {
        **pages,
        **shown,
        reference: _with_targets(shown[reference]),
        guide: _with_layouts(shown[guide]),
        reliability: _with_outcomes(shown[reliability]),
        architectures: _with_architectures(shown[architectures]),
        ROOT / "README.md": _with_headline((ROOT / "README.md").read_text("utf-8")),
    }


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


def _with_files(text: str) -> str:
    """A path is relative to ``docs`` or, where nothing is there, to the root."""
    return _SHOWN.sub(lambda match: f"{match[1]}{_file(match[2])}{match[3]}", text)


def _file(name: str) -> str:
    path = ROOT / "docs" / name
    return (path if path.is_file() else ROOT / name).read_text("utf-8")


def _with_targets(text: str) -> str:
    rows = [(f"`{target.name}`", target.about) for target in TARGETS.values()]
    lines = "\n".join(["", *table(("target", "what it makes"), rows), "", ""])
    return _between(text, "<!-- generated: targets -->\n", lines, "<!-- end of targets -->\n")


def _with_layouts(text: str) -> str:
    lines = "\n".join(["", *layout_rows(), "", ""])
    return _between(text, "<!-- generated: layouts -->\n", lines, "<!-- end of layouts -->\n")


def _with_architectures(text: str) -> str:
    order = {"text": 0, "vision": 1, "encoder": 2, "whole": 3}
    tables = sorted(every_table(), key=lambda one: (order[one.kind], one.title))
    rows = [(one.title, f"`{one.model_type}`", ", ".join(f"`{kind}`" for kind in one.classes)) for one in tables]
    lines = "\n".join(["", *table(("architecture", "model_type", "classes"), rows), "", ""])
    return _between(text, "<!-- generated: architectures -->\n", lines, "<!-- end of architectures -->\n")


def _with_outcomes(text: str) -> str:
    for name, lines in (
        ("summary", summary()),
        ("errors", error_outcomes()),
        ("limits", real_limits()),
        ("interrupts", interrupts()),
        ("malformed files", malformed_files()),
        ("fuzzing", fuzzing()),
        ("other readers", differential()),
        ("bit flips", bit_flips()),
        ("part flips", part_flips()),
        ("source changes", source_changes()),
        ("races", races()),
        ("same bytes", same_bytes()),
        ("kills", kills()),
        ("power cuts", power_cuts()),
        ("syncs", syncs()),
        ("day", day_of_work()),
        ("mutants", mutants()),
    ):
        inside = "\n".join(["", *lines, "", ""])
        text = _between(text, f"<!-- generated: {name} -->\n", inside, f"<!-- end of {name} -->\n")
    return text


def _with_headline(text: str) -> str:
    result = read(RESULTS)[HEADLINE]
    line = f"{headline(result)} [How it was measured](docs/benchmarks.md)\n"
    return _between(text, "<!-- generated: headline -->\n", f"\n{line}\n", "<!-- end of headline -->\n")


def _between(text: str, begin: str, inside: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + inside + end + after


if __name__ == "__main__":
    main()
