"""Renders docs/benchmarks.md from the result files: ``python -m benchmarks.report``. Pure text, no measuring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

# As json.loads gives it; `benchmarks.run` says what is in it.
Result: TypeAlias = Mapping[str, Any]

_MIB = 1 << 20
# Written by `benchmarks.memory_8b`, and of another shape than the cases.
MERGES = "memory-8b.json"
# Written by `benchmarks.scale`, likewise.
PLANNING = "planning.json"
_OURS = ("shardmerge", "shardmerge-no-sync")

_HEAD = """\
# Benchmarks

Written by `make bench`; every single run is in `benchmarks/results/*.json`. Take the ratios, not the absolute
figures: those belong to the machine below.

How it was measured:

- Whole processes, from outside: interpreter start and imports count. Wall clock, CPU (user + system) and peak resident
  memory are those of `wait4`. *Anonymous* is the part of it that is no mapped file and that a system short of memory
  cannot take back; it is sampled 50 times a second.
- All contenders of a case run in turn, round after round, in rotated order. Ratios are taken inside each round, and the
  table shows their median and, in brackets, the smallest and the largest.
- **Warm page cache**: one round before the measured ones is thrown away. What the contender before left unwritten is
  synced before the next one starts, and outputs are removed, outside of the clock.
- shardmerge syncs its result to the disk before it publishes it; DeepSpeed, `save_file` and a plain `cp` do not. So
  `shardmerge` is to be compared with `cp and sync`, and `shardmerge --no-sync` with all others.
- The floor is a copy of a file as large as the *output*. A conversion of fp32 to bf16 has to read twice as much.
"""

_NOT_MEASURED = """\
## What is not measured

- Cold page cache, spinning disks, network file systems, file systems that can clone (XFS, btrfs).
- More than two cores, and memory busy with other work.
- Real 8B weights from end to end: holes stand for them.
- fp16 and float8 outputs, torch `.pth` sources, several shards, `--download`.
- Older DeepSpeed, `ds_to_universal`, XTuner's own `pth_to_hf`.
- Energy, and anything on a GPU.
"""


def write(results: Path, page: Path) -> None:
    """Writes the page from all result files of a directory."""
    paths = (path for path in sorted(results.glob("*.json")) if path.name not in (MERGES, PLANNING))
    found = [json.loads(path.read_text("utf-8")) for path in paths]
    page.write_text(render(found, _runs(results / MERGES), _runs(results / PLANNING)), "utf-8")


def _runs(path: Path) -> Result:
    runs: Result = json.loads(path.read_text("utf-8"))["runs"] if path.is_file() else {}
    return runs


def render(results: Sequence[Result], merges: Result, plans: Result) -> str:
    """Returns the page as Markdown."""
    blocks = [_HEAD, *_machines(results), *_memory(results), *_merges(merges), *_plans(plans)]
    for result in results:
        blocks += _case(result)
    return "\n".join([*blocks, _NOT_MEASURED])


# ---- the machine


def _machines(results: Sequence[Result]) -> Iterator[str]:
    cards: dict[str, list[str]] = {}
    for result in results:
        cards.setdefault(_card(result), []).append(result["case"]["key"])
    for card, keys in cards.items():
        prefix = f"{', '.join(keys)}: " if len(cards) > 1 else ""
        yield f"Machine: {prefix}{card}\n"


def _card(result: Result) -> str:
    machine = result["machine"]
    note = f" {machine['note']}" if machine["note"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"{machine['file_system']}; Python {machine['python']}, numpy {machine['numpy']}, "
        f"ml_dtypes {machine['ml_dtypes']}, torch {machine['torch']}.{note}"
    )


# ---- memory over size


def _memory(results: Sequence[Result]) -> Iterator[str]:
    sized = [result for result in results if result["case"]["key"].startswith("zero2-")]
    if len(sized) < 2 or len({result["commit"] for result in sized}) > 1:  # other code, other memory
        return
    yield "## Memory does not grow with the checkpoint\n"
    yield "Peak resident memory in MiB, ZeRO-2 to bf16; in brackets the anonymous part.\n"
    yield _row(["", *(_weights(result) for result in sized)])
    yield _row(["---"] * (len(sized) + 1))
    for contender in sized[0]["contenders"]:
        if contender["kind"] != "floor":
            cells = [_peak(_contender(result, contender["key"])) for result in sized]
            yield _row([contender["title"], *cells])
    planned = [f"{_contender(result, 'shardmerge')['planned_peak']['max'] / _MIB:.0f}" for result in sized]
    yield _row(["what shardmerge's plan promised", *planned]) + "\n"


def _weights(result: Result) -> str:
    size = result["case"]["key"].removeprefix("zero2-").removesuffix("g")
    return f"{size} GiB of fp32"


def _peak(contender: Mapping[str, Any]) -> str:
    return f"{contender['peak']['max'] / _MIB:,.0f} ({contender['anonymous']['max'] / _MIB:,.0f})"


# ---- merges at 8B


def _plans(plans: Result) -> Iterator[str]:
    """What `benchmarks.scale` measured, each case once."""
    if not plans:
        return
    yield "## Plan the largest models\n"
    yield "Whole processes: `plan --json`, and `convert --dry-run --json`. The data are holes, all headers are true.\n"
    yield _row(["", "files", "tensors", "command", "wall s", "CPU s", "peak MiB"])
    yield _row(["---", "---:", "---:", "---", "---:", "---:", "---:"])
    for run in plans.values():
        for name in ("plan", "convert"):
            one = run[name]
            figures = [f"{one['wall']:.1f}", f"{one['cpu']:.1f}", f"{one['peak'] / _MIB:.0f}"]
            yield _row([run["about"], f"{run['files']:,}", f"{one['tensors']:,}", f"`{name}`", *figures])
    cards = {f"{_card(run)} Commit {run['commit'][:12]}, {run['date']}." for run in plans.values()}
    yield "\n" + "\n".join(sorted(cards)) + "\n"


def _merges(runs: Result) -> Iterator[str]:
    """What `benchmarks.memory_8b` measured, each kind once."""
    if not runs:
        return
    yield "## Memory of merges of a LLaMA-3-8B\n"
    yield "One run each, from holes (all values are zeros), synced. The default budget is 256 MiB.\n"
    yield _row(["", "layers", "written GB", "read GB", "wall s", "peak MiB", "what the plan promised"])
    yield _row(["---", "---:", "---:", "---:", "---:", "---:", "---:"])
    for run in runs.values():
        figures = [f"{run[key] / 1e9:.1f}" for key in ("total_size", "bytes_read")]
        peaks = [f"{run[key] / _MIB:.0f}" for key in ("peak", "planned_peak")]
        yield _row([run["about"], str(run["layers"]), *figures, f"{run['wall']:.0f}", *peaks])
    cards = {f"{_card(run)} Commit {run['commit'][:12]}, {run['date']}." for run in runs.values()}
    yield "\n" + "\n".join(sorted(cards)) + "\n"


# ---- a case


def _case(result: Result) -> Iterator[str]:
    case = result["case"]
    yield f"## {case['title']}\n"
    commit = result["commit"][:12] + (" with changes" if result["changed_since"] else "")
    yield f"{case['about']}\n\n{result['rounds']} rounds, {result['date']}, commit {commit}.\n"
    yield from _ratio_table(result)
    yield from _figure_table(result)
    yield "".join(f"- Checked: {check}.\n" for check in result["checks"])


def _ratio_table(result: Result) -> Iterator[str]:
    """Ours over theirs: below 1 is less than theirs, and what is above 1 stands in bold."""
    yield "shardmerge's figure divided by theirs; **bold** where shardmerge needs more.\n"
    yield _row(["beside", "wall", "wall, --no-sync", "CPU, --no-sync", "peak memory", "anonymous"])
    yield _row(["---", "---:", "---:", "---:", "---:", "---:"])
    for contender in result["contenders"]:
        if contender["kind"] == "ours":
            continue
        durable = _ratio(result, "shardmerge", contender["key"])
        quick = _ratio(result, "shardmerge-no-sync", contender["key"])
        memory = ["", ""] if contender["kind"] == "floor" else [_times(durable["peak"]), _times(durable["anonymous"])]
        yield _row([contender["title"], _times(durable["wall"]), _times(quick["wall"]), _times(quick["cpu"]), *memory])
    yield ""


def _figure_table(result: Result) -> Iterator[str]:
    yield _row(["", "wall s", "CPU s", "peak MiB", "anonymous MiB", "written MB"])
    yield _row(["---", "---:", "---:", "---:", "---:", "---:"])
    for contender in result["contenders"]:
        floor = contender["kind"] == "floor"
        yield _row(
            [
                contender["title"],
                _seconds(contender["wall"]),
                _seconds(contender["cpu"]),
                "" if floor else f"{contender['peak']['median'] / _MIB:,.0f}",
                "" if floor else f"{contender['anonymous']['median'] / _MIB:,.0f}",
                f"{contender['written']['median'] / 1e6:,.0f}",
            ]
        )
    yield ""
    promised = min(_contender(result, key)["planned_peak"]["min"] for key in _OURS)
    measured = max(_contender(result, key)["peak"]["max"] for key in _OURS)
    verdict = "**which is more than promised**" if measured > promised else "as promised"
    figures = f"promised at most {promised / _MIB:.1f} MiB; at most {measured / _MIB:.1f} were used"
    yield f"shardmerge's plan {figures}, {verdict}.\n"


def _contender(result: Result, key: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(entry for entry in result["contenders"] if entry["key"] == key)
    return found


def _ratio(result: Result, ours: str, over: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(r for r in result["ratios"] if (r["ours"], r["over"]) == (ours, over))
    return found


def _times(spread: Mapping[str, float]) -> str:
    if not spread:
        return ""
    middle = f"{spread['median']:.2f}"
    shown = f"**{middle}**" if spread["median"] > 1 else middle
    return f"{shown} ({spread['min']:.2f} to {spread['max']:.2f})"


def _seconds(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    write(root / "benchmarks" / "results", root / "docs" / "benchmarks.md")
