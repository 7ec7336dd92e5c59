"""The benchmarks measure what they say, their page is what the results say, and they run, at small sizes."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch writes the checkpoints")

from benchmarks import case_pages, floor, full_8b, goals, loops, lora, page_cache, report, sizes, views, windows
from benchmarks.cases import DEFAULT, case, resized, write_shards
from benchmarks.contender import Contender
from benchmarks.measuring import run_case
from benchmarks.memory_group import memory_group
from benchmarks.page_cache import forget
from benchmarks.plots import Bar, Line, bars, curves
from benchmarks.synthetic import LlamaShape, master_weights, write_zero
from shardmerge.bench.processes import measure
from shardmerge.storage.reading import file_system

MIB = 1 << 20
CLONING = {"xfs", "btrfs"}
TINY = LlamaShape(256, 2, 4, 2, 768, 1024)
NUMEL = sum(prod(shape) for shape in TINY.tensors().values())


@pytest.fixture(autouse=True)
def _others_keep_their_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are made cold one by one here, as for users who are not root."""
    monkeypatch.setattr(page_cache, "_DROP", Path("/no/such/file"))


# ---- the page


def test_the_page_and_its_plots_are_what_the_results_say() -> None:
    """`python -m benchmarks.report` writes them anew."""
    assert report.outdated() == []


def test_every_plot_of_the_page_is_there_and_is_xml() -> None:
    page = "".join((report.DOCS / name).read_text("utf-8") for name in (report.PAGE, report.ANSWERS))
    plots = sorted((report.DOCS / report.PLOTS).glob("*.svg"))
    assert plots
    for path in plots:
        assert f"](plots/{path.name})" in page
        ElementTree.parse(path)


def test_free_tables_and_plots_of_any_result_are_shown(tmp_path: Path) -> None:
    series = [{"label": "a < b", "points": [[1, 2.0], [2, 3.5]]}]
    found = {
        "title": "Casts",
        "about": "Pairs.",
        "machine": {"cpu": "X", "cores": 2},
        "tables": [
            {"title": "fp8", "about": "GB/s.", "columns": ["pair", "ours"], "rows": [["a|b", 7.1], ["c", None]]}
        ],
        "plots": [{"key": "line", "title": "T", "axes": ["x", "y"], "doubling": True, "series": series}],
    }
    (tmp_path / "casts.json").write_text(json.dumps(found))
    written = report.files(tmp_path)
    page = written[report.PAGE]
    for words in (
        "## Casts",
        "Pairs.",
        "### fp8",
        "| a\\|b | 7.1 |",
        "| c |  |",
        "(plots/casts-line.svg)",
        "X, 2 cores",
    ):
        assert words in page
    assert "a &lt; b" in written["plots/casts-line.svg"]


SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0, "low": 1.0, "high": 3.0}
SEEN = {"commit": "a" * 40, "date": "today", "machine": {"cpu": "X", "file_system": "xfs"}}
CAST = {
    "source": "F32",
    "target": "BF16",
    "block": "tile",
    "threads": 2,
    "shardmerge": SPREAD,
    "ratio": {"median": 0.9},
}
CLONE = {"wall": SPREAD, "cpu": SPREAD, "peak": {"median": 50 * MIB}}
OURS = ("shardmerge", "shardmerge-no-sync")
PLAN = {"wall": 3.21, "cpu": 3.0, "peak": 200 * MIB, "printed": 2_500_000, "tensors": 91_000}


@pytest.mark.parametrize(
    ("stem", "result", "words"),
    [
        ("casts", {**SEEN, "rounds": 3, "rows": [CAST], "crc32": {"zlib": SPREAD}}, "| F32 to BF16 | 2.0 (**0.90**) |"),
        (
            "clone-xfs",
            {
                **SEEN,
                "kind": "xfs",
                "size": 1 << 33,
                "rounds": 5,
                "contenders": {
                    **{key: {**CLONE, "clone_seconds": SPREAD, "bytes_cloned": SPREAD} for key in OURS},
                    "cp": CLONE,
                },
                "wall_ratios": {key: {"median": 0.04, "min": 0.03, "max": 0.05} for key in OURS},
                "new_space_share": {**dict.fromkeys(OURS, 0.004), "cp": 1.0},
            },
            "0.040 (0.030 to 0.050) | 2.00 | 50 | 2.0000 | 0 | 0.4 %",
        ),
        ("planning", {"runs": {"names": {"about": "671B", "files": 163, **SEEN, "plan": PLAN}}}, "| 91,000 | 3.21 |"),
    ],
)
def test_results_of_other_shapes_are_shown(stem: str, result: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / f"{stem}.json").write_text(json.dumps(result))
    page = report.files(tmp_path)[report.PAGE]
    assert words in page
    assert f"`{stem}`, today, commit aaaaaaaaaaaa." in page
    assert {row[0] for row in goals.rows({stem: result})} == {f"`{stem}`"}


def test_what_digests_cost_is_shown(tmp_path: Path) -> None:
    ratios = {"wall": {"median": 1.7, "min": 1.6, "max": 1.8}, "cpu": SPREAD}
    runs = {f"shardmerge{way}": {"wall": SPREAD} for way in ("", " --sha256")}
    cases = {"x": {"title": "a job", "runs": runs, "ratios": {"shardmerge": ratios}}}
    result = {**SEEN, "rounds": 5, "cases": cases}
    (tmp_path / "digests.json").write_text(json.dumps(result))
    page = report.files(tmp_path)[report.PAGE]
    assert "| a job | shardmerge | 2.00 (1.00 to 3.00) | 2.00 (1.00 to 3.00) | 1.70 (1.60 to 1.80) |" in page


def measured_entry(key: str, walls: list[float], peak: int) -> dict[str, object]:
    return {"key": key, "runs": [{"wall": wall, "peak": peak} for wall in walls], "peak": {"max": peak}}


@pytest.mark.parametrize(
    ("wall", "peak", "expected"),
    [
        (1.1, 60, ["reached"] * 3),
        (1.2, 60, ["**not reached**"] * 2 + ["reached"]),
        (1.1, 65, ["reached"] * 2 + ["**not reached**"]),
    ],
)
def test_bars_are_judged_by_ratios_of_rounds(wall: float, peak: int, expected: list[str]) -> None:
    """The second round was ten times slower for everyone, which says nothing."""
    ours = [measured_entry(key, [wall, 10 * wall, wall], peak * MIB) for key in ("shardmerge", "shardmerge-no-sync")]
    floors = [measured_entry(key, [1.0, 10.0, 1.0], MIB) for key in ("floor", "floor-sync")]
    rows = list(goals.rows({"zero2-4g": {"contenders": ours + floors}}))
    assert [row[3] for row in rows] == expected
    assert [row[2] for row in rows] == [f"{wall:.2f} x", f"{wall:.2f} x", f"{peak:.1f} MiB"]


def test_peers_are_judged_by_how_much_more_they_take() -> None:
    peers = [measured_entry(key, [6.5, 6.5], 2000 * MIB) for key in ("zero_to_fp32", "zero_to_torch")]
    entries = [measured_entry("shardmerge-no-sync", [1.0, 1.0], 50 * MIB), measured_entry("floor", [1, 1], 0), *peers]
    rows = {row[1]: row[2:] for row in goals.rows({"zero2-2g": {"contenders": entries}})}
    assert {words: found for words, found in rows.items() if "zero_to" in words} == {
        "at least 6 x faster than zero_to_fp32, --no-sync": ["6.5 x", "reached"],
        "at least 8 x faster than zero_to_fp32-cast, --no-sync": ["not measured", "**not reached**"],
        "at least 5 x faster than zero_to_torch, --no-sync": ["6.5 x", "reached"],
        "at most 1/50 of the memory of zero_to_torch": ["1/40", "**not reached**"],
    }


def test_what_is_outdated_or_left_over_is_found_and_written(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    (docs / "plots").mkdir(parents=True)
    (docs / "plots" / "gone.svg").write_text("")
    assert {path.name for path in report.outdated(results, docs)} == {report.ANSWERS, report.PAGE, "gone.svg"}
    report.write(results, docs)
    assert report.outdated(results, docs) == []
    assert not (docs / "plots" / "gone.svg").exists()


def test_a_bar_is_as_long_as_its_value() -> None:
    drawing = ElementTree.fromstring(bars("T", "GB/s", [Bar("a", 4.0, "ours"), Bar("b", 1.0, "peer")]))
    widths = [float(rect.get("width", "0")) for rect in drawing.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.2)


def test_lines_stay_in_their_frame() -> None:
    for doubling, last in ((False, 32), (True, 32), (True, 1)):
        points = [(0.25, 60.0), (0.5, 61.0), (last, 61.5)]
        drawing = ElementTree.fromstring(curves("T", ("x", "y"), [Line("l", points)], doubling=doubling))
        lines = drawing.iter("{http://www.w3.org/2000/svg}polyline")
        pairs = [[float(part) for part in pair.split(",")] for pair in next(lines).get("points", "").split()]
        assert [x for x, _ in pairs] == sorted({x for x, _ in pairs})
        assert pairs[-1][0] == 740 or not doubling
        assert all(60 <= x <= 740 and 54 <= y <= 294 for x, y in pairs)


# ---- the floor


@pytest.mark.parametrize(("stage", "world"), [(2, 2), (3, 8)])
def test_the_floor_reads_the_master_weights_and_nothing_else(stage: int, world: int, tmp_path: Path) -> None:
    write_zero(tmp_path, TINY.tensors(), stage=stage, world=world, fill=True)
    ranges = floor.needed([tmp_path])
    assert sum(extent.nbytes for extent in ranges) == 4 * NUMEL
    assert len({extent.file for extent in ranges}) == world
    done = measure(["sh", "-c", "".join(map(floor.reading, ranges))])
    assert done.code == 0, done.stderr
    if done.io:
        assert 4 * NUMEL <= done.io["rchar"] < 4 * NUMEL + MIB


def test_master_weights_are_those_of_the_partitions(tmp_path: Path) -> None:
    """Read by torch across the border of two ranks."""
    import torch

    tag = write_zero(tmp_path, TINY.tensors(), stage=2, world=2, fill=True)
    files = sorted(tag.glob("*optim_states.pt"))
    states = [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]
    flat = torch.cat([state["single_partition_of_fp32_groups"][0] for state in states]).numpy()
    start = len(flat) // 2 - 50
    assert np.array_equal(master_weights(tag, 2, NUMEL, start, 100), flat[start : start + 100])
    assert flat.std() > 0.01


# ---- cases


@pytest.mark.parametrize("key", sorted({key.rpartition("-")[0] for key in DEFAULT}))
def test_cases_run_at_small_sizes(key: str, tmp_path: Path) -> None:
    """shardmerge and the floor; the peers are not what is tested here."""
    small = resized(key, "8MiB")
    result = run_case(case(small), tmp_path, 1, cold="rename" in key, peers=False)
    entries = {entry["key"]: entry for entry in result["contenders"]}
    moved = case(small).casts or file_system(tmp_path) not in CLONING  # clones are neither read nor written
    assert {"shardmerge", "shardmerge-no-sync", "floor", "floor-sync"} <= entries.keys()
    assert ("cp" in entries) == case(small).casts
    assert result["cache"].startswith("cold" if "rename" in key else "warm")
    for entry in entries.values():
        assert entry["wall"]["median"] > 0
        assert entry["written"]["median"] >= result["output_bytes"]
        if entry["rchar"] and moved:
            assert entry["wchar"]["median"] >= result["output_bytes"]
    mine = entries["shardmerge"]
    if moved:
        assert mine["bytes_read"]["median"] >= result["needed_bytes"]
    if mine["cgroup"]:
        assert mine["cgroup"]["median"] > mine["anonymous"]["median"]
    stem = result["case"]["key"]
    shown = {**result, "commit": "0" * 40, "changed_since": False, "date": "today"}
    page = "\n".join(case_pages.case_page(stem, shown))
    assert "shardmerge --no-sync" in page
    for text in case_pages.case_plots(stem, shown).values():
        ElementTree.fromstring(text)


def test_a_peer_that_fails_or_is_not_to_be_had_is_said(tmp_path: Path) -> None:
    def fails(source: Path) -> list[Contender]:
        command = ["sh", "-c", "echo no luck >&2; exit 3"]
        return [Contender("broken", "Broken 1.0", "peer", lambda out: command, "broken IN OUT")]

    def absent(source: Path) -> list[Contender]:
        raise subprocess.CalledProcessError(1, "pip")

    chosen = replace(case("rename-8m"), peers={"broken": fails, "absent": absent})
    result = run_case(chosen, tmp_path, 1)
    assert {entry["kind"] for entry in result["contenders"]} == {"ours", "floor"}
    gone, broken = result["missing"]
    assert gone.startswith("absent: could not be made ready")
    assert broken == "Broken 1.0: exit code 3, no luck"


@pytest.mark.parametrize("key", ["zero9-1g", "zero2", "zero2-1t", ""])
def test_unknown_cases_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="there are zero2-SIZE"):
        case(key)


@pytest.mark.parametrize(
    ("key", "size", "expected"),
    [("zero2-1g", "512MiB", "zero2-512m"), ("hf-reshard", "2GiB", "hf-reshard-2g"), ("lora-0.5b", "1.5G", "lora-1.5g")],
)
def test_a_case_of_another_size(key: str, size: str, expected: str) -> None:
    assert resized(key, size) == expected


def test_peers_read_the_shards_that_are_written(tmp_path: Path) -> None:
    """torch's own consolidation finds in the header what it asks for, and safetensors reads what it makes."""
    from safetensors.torch import load_file

    write_shards(tmp_path / "model", TINY)
    script = report.ROOT / "benchmarks" / "peers" / "consolidate.py"
    subprocess.run([sys.executable, script, tmp_path / "model", tmp_path / "out"], check=True)
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    parts = [load_file(path) for path in sorted((tmp_path / "model").glob("*.safetensors"))]
    assert len(parts) == 4
    assert {name: list(shape) for name, shape in TINY.tensors().items()} == {
        name: list(tensor.shape) for name, tensor in merged.items()
    }
    for part in parts:
        assert all(merged[name].equal(tensor) for name, tensor in part.items())


# ---- on the record


def test_the_full_model_is_checked_and_measured(tmp_path: Path) -> None:
    runs, checks = full_8b.measure_all(TINY, tmp_path)
    assert runs[0]["title"] == "shardmerge"
    assert runs[0]["total_size"] == 2 * NUMEL
    assert any("bit by bit" in check for check in checks)
    found = full_8b.result(runs, checks, TINY, {"cpu": "X"})
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "full-8b.json").write_text(json.dumps(found))
    assert "plots/full-8b-memory.svg" in report.files(tmp_path / "results")


def test_the_check_of_the_full_model_sees_a_wrong_bit(tmp_path: Path) -> None:
    tag = write_zero(tmp_path / "source", TINY.tensors(), stage=2, world=2, fill=True)
    command = [
        sys.executable,
        "-m",
        "shardmerge",
        "convert",
        tmp_path / "source",
        tmp_path / "out",
        "--dtype",
        "bfloat16",
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    full_8b._check(tag, TINY, tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    _, end = json.loads(data[8 : 8 + length])["lm_head.weight"]["data_offsets"]
    data[8 + length + end - 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RuntimeError, match="lm_head"):
        full_8b._check(tag, TINY, tmp_path / "out")


def test_sizes_are_measured_freely_and_under_the_limit(tmp_path: Path) -> None:
    runs = list(sizes.measure_size("copy", 200 * MIB, tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert runs[0]["limit"] == 0
    if file_system(tmp_path) not in CLONING:
        assert 0.7 * 200 * MIB < runs[0]["bytes_written"] < 1.3 * 200 * MIB
    if len(runs) == 2:
        assert runs[1]["cgroup"] <= sizes.LIMIT
    found = sizes.result(runs, {"cpu": "X"})
    assert len(found["tables"][0]["rows"]) == len(runs)


# ---- what measures


def test_a_group_counts_the_pages_that_were_written(tmp_path: Path) -> None:
    with memory_group() as group:
        if group is None:
            pytest.skip("NO MEMORY CGROUP CAN BE MADE HERE: the peak with page cache is not measured")
        measure(["sh", "-c", f"head -c {20 * MIB} /dev/zero > {tmp_path}/file"], group=group.procs)
        assert 20 * MIB <= group.peak() < 60 * MIB


def test_forgotten_files_are_read_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MIB))
    assert forget([tmp_path]).startswith("cold")
    done = measure(["cat", path])
    if done.io and file_system(tmp_path) != "tmpfs":
        assert done.io["read_bytes"] >= 7 * MIB


# ---- the bare loop


@pytest.mark.parametrize("way", loops.ways((1, 2, 3)), ids=lambda way: way.key)
def test_every_way_of_the_bare_loop_casts_as_torch_does(way: loops.Way, tmp_path: Path) -> None:
    """Ten MiB: no number of workers shares its tiles evenly. What a file each holds is in the order of the workers."""
    import torch

    values = np.random.default_rng(0).standard_normal(10 << 18, np.float32)
    values.tofile(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    took = loops.once(way, tmp_path / "source", out)
    assert took.wall > 0
    assert took.cpu > 0
    assert len(list(out.iterdir())) == (way.workers if way.own else 1)
    made = np.concatenate([np.fromfile(path, np.int16) for path in sorted(out.iterdir())])
    # Of tiles of 4 MiB two are whole.
    expected = torch.from_numpy(values[: len(values) * 4 // way.tile * way.tile // 4]).to(torch.bfloat16)
    assert np.array_equal(made, expected.view(torch.int16).numpy())


def test_a_process_of_the_bare_loop_that_fails_is_an_error(tmp_path: Path) -> None:
    """Each opens two files where there is one descriptor left; its parent makes the output with that one."""
    (tmp_path / "source").write_bytes(bytes(4 * MIB))
    (tmp_path / "out").mkdir()
    free = os.open(tmp_path, os.O_RDONLY)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(RuntimeError, match="a process failed"):
            loops.once(loops.Way(2, "processes"), tmp_path / "source", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_page_of_the_bare_loop_compares_within_rounds() -> None:
    """Windows take twice as long as reading in each round, and a second round twice as long as the first."""
    wall = {way: [2.0, 4.0] if way.mapped else [1.0, 2.0] for way in loops.ways((1, 2))}
    wall[loops.LENGTHS[-1]] = [3.0, 6.0]
    seconds = {way: [loops.Took(value, 10 * value) for value in values] for way, values in wall.items()}
    by_wall, by_cpu, windows, windows_cpu, lengths = loops.result(seconds, (1, 2), 2, {})["tables"]
    assert by_wall["columns"] == ["", "1", "2"]
    assert ["processes, a file a process, mapped", *["3.00 (2.00 to 4.00)"] * 2] in by_wall["rows"]
    assert ["processes, a file a process, mapped", *["30.00 (20.00 to 40.00)"] * 2] in by_cpu["rows"]
    assert len(by_wall["rows"]) == 8
    assert windows["rows"] == windows_cpu["rows"]
    assert windows["rows"][0] == ["threads, one file", *["2.00 (2.00 to 2.00)"] * 2]
    assert lengths["rows"][-1] == ["tiles of 2 MiB, written by 128 KiB", "4.50 (3.00 to 6.00)", "3.00 (3.00 to 3.00)"]


# ---- LoRA beside its product


def test_a_lora_and_what_it_cannot_do_without(tmp_path: Path) -> None:
    """The passes change no value, and every contender takes time; a layer is a file."""
    job = lora.Job.write(tmp_path, LlamaShape(64, 2, 4, 2, 128, 64), 4)
    assert len(job.shapes) == 14
    assert job.parameters == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert lora.passes(job, tmp_path / "copy")[0] > 0
    assert (tmp_path / "copy").read_bytes() == job.base.read_bytes()
    seconds = lora.measured(job, [1, 2], 1)
    assert {key: len(took) for key, took in seconds.items()} == {"product": 1, "passes": 1, "1": 1, "2": 1}
    assert min(min(one) for took in seconds.values() for one in took) > 0


def test_the_page_of_a_lora_compares_within_rounds(tmp_path: Path) -> None:
    job = lora.Job(tmp_path / "mapping.yaml", ((1000, 1000),), 8)
    floors = {"product": [(1.0, 1.0), (2.0, 2.0)], "passes": [(0.5, 0.5), (0.5, 0.5)]}
    found = lora.result(job, {**floors, "1": [(1.5, 1.4), (3.0, 2.9)], "16": [(0.2, 3.0), (0.4, 3.0)]}, {})
    assert found["tables"][0]["rows"][2] == [
        "shardmerge, 1 worker",
        "2.25 (1.50 to 3.00)",
        "2.15 (1.40 to 2.90)",
        "1.50 (1.50 to 1.50)",
        "1.10 (1.00 to 1.20)",
    ]
    shown = {row[1]: row[2:] for row in goals.rows({"lora": found})}
    assert shown == {
        "LoRA by one worker, at most 2 x its product in float64": ["1.50 x", "reached"],
        "by 16 workers at least 6 x faster": ["7.5 x", "reached"],
    }


@pytest.mark.parametrize("case", windows.CASES)
def test_processes_and_threads_of_the_windows_do_the_same_job(case: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    windows.write_source(tmp_path / "source", 1)
    (tmp_path / "out").mkdir()
    run = windows.Run("cast", case, "mmap")
    assert measure(run.command(tmp_path / "source", tmp_path / "out")).code == 0
    before, after = (
        {name: value for path in (tmp_path / folder).rglob("*.safetensors") for name, value in load_file(path).items()}
        for folder in ("source", "out")
    )
    assert len(before) == 2
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert len(list((tmp_path / "out").iterdir())) == windows.CASES[case][0]


def test_a_process_of_the_windows_that_fails_fails_the_run(tmp_path: Path) -> None:
    windows.write_source(tmp_path / "source", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002").write_text("in the way")
    run = windows.Run("copy", "two processes of one thread", "pread")
    assert measure(run.command(tmp_path / "source", tmp_path / "out")).code == 1


def test_the_page_of_the_windows_compares_within_rounds() -> None:
    found = {
        run: [
            {"wall": n * (1.0 if run.io == "pread" else 1.5), "cpu": n * (2.0 if run.io == "pread" else 1.0)}
            for n in (1, 3)
        ]
        for run in windows.RUNS
    }
    rows = windows.result(found, 1, {})["tables"][0]["rows"]
    assert len(rows) == 8
    figures = ["2.00 (1.00 to 3.00)", "1.50 (1.50 to 1.50)", "4.00 (2.00 to 6.00)", "0.50 (0.50 to 0.50)"]
    assert rows[-1] == ["copy, two processes of two threads", *figures]


def test_views_are_measured_and_what_is_refused_is_shown(tmp_path: Path) -> None:
    """10 TiB: what the reference maps could be written, so Linux wants that much memory to be there."""
    found = views.measured(tmp_path, 2, {"1 MiB": MIB, "10 TiB": 10 << 40})
    small, large = views.result(found, {})["tables"][0]["rows"]
    assert all(re.fullmatch(r"[\d.e-]+ \([\d.e-]+ to [\d.e-]+\)", cell) for cell in (*small[1:], *large[1:3]))
    assert large[3:] == ["refused", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare-ties"])
def test_a_merge_is_written_for_both(method: str, tmp_path: Path) -> None:
    """mergekit's own configuration, and the mapping that init makes of it."""
    chosen = case(f"merge-{method}-1m")
    chosen.prepare(tmp_path / "in")
    assert all((tmp_path / "in" / name / "model.safetensors").is_file() for name in chosen.sources)
    run = subprocess.run(chosen.ours(tmp_path / "in")[1].command(tmp_path / "out"), check=False, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
