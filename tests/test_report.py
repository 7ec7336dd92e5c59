"""The report says what is in the files, and is made without changing them. The files are read by safetensors."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shardmerge as sm
from benchmarks.synthetic import LlamaShape
from docs.tiny import INPUTS, run_rules
from shardmerge.ops.contract import Move, Op
from shardmerge.ops.registry import OPS
from shardmerge.plan.tables import human_bytes
from shardmerge.reports.flow import described, streams
from shardmerge.reports.groups import part_namer
from shardmerge.reports.operations import MOVES, word
from shardmerge.reports.provenance import Origin, read_provenance
from shardmerge.reports.timeline import MOST_POINTS, Timeline
from shardmerge.tensors import TensorEntry, composed
from tests.conftest import shardmerge
from tests.receipts import receipt_of, write_receipt
from tests.report_pages import ReportPage, reported
from tests.scene import tree

MB = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA in ``out``, and the report of the run beside it."""
    return reported(tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="module")
def page(folder: Path) -> ReportPage:
    return ReportPage(folder / "out.report.html")


# --- what it says ---


def test_the_table_is_what_safetensors_reads(folder: Path, page: ReportPage) -> None:
    shown = {name: (dtype, shape, size, crc) for name, dtype, shape, size, _, _, crc, _ in page.tensors}
    found = {}
    with safe_open(folder / "out" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            tensor, part = file.get_tensor(name), file.get_slice(name)
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b""
            size = human_bytes(tensor.numel() * tensor.element_size())
            found[name] = (part.get_dtype(), str(list(part.get_shape())), size, f"{zlib.crc32(data):08x}")
    assert shown == found


def test_the_flow_counts_every_byte_once_and_knows_the_source(folder: Path) -> None:
    """The encoder was frozen, so its values are those of the base model, and all else was trained."""
    tensors = load_file(folder / "out" / "model.safetensors")
    sizes: dict[tuple[str, str], float] = defaultdict(float)
    for (source, _, part), nbytes in streams(read_provenance(folder / "out").tensors).items():
        sizes[source, part] += nbytes
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        expected["vision" if part == "vision_tower" else "trained", part] += tensor.nbytes
    assert sizes == pytest.approx(expected)


def test_what_was_done_is_named(page: ReportPage) -> None:
    kinds = {row[0]: row[1:3] for row in page.tables["What was done to the tensors"]}
    assert set(kinds) == {"cast", "resized"}
    assert kinds["resized"][0] == "2"
    how = {row[0]: row[5] for row in page.tensors}
    assert how["language_model.lm_head.weight"] == "298 → 320 rows (mean), cast F32 → BF16"
    assert how["language_model.model.norm.weight"] == "cast F32 → BF16"
    assert "21 tensors of llm: shadowed" in page.text
    assert "25 tensors of vision: dropped" in page.text


def test_digests_and_sources_are_those_of_the_receipt(folder: Path, page: ReportPage) -> None:
    receipt = json.loads((folder / "out" / "shardmerge.json").read_text())
    digests = {row[1] for row in page.tables["Digests"]}
    prints = {source["fingerprint"] for source in receipt["sources"].values()}
    assert digests == {
        receipt["plan"],
        *prints,
        *receipt["side_files"].values(),
        *(shard["frame_sha256"] for shard in receipt["shards"].values()),
    }
    assert [row[2] for row in page.tables["Sources"]] == [source["path"] for source in receipt["sources"].values()]


def test_rules_are_those_of_the_plan(folder: Path, page: ReportPage) -> None:
    numbers = {row[0]: row[1] for row in page.tables["Rules of the mapping"]}
    planned = {tensor.name: tensor.rule for tensor in sm.plan(folder / "mapping.yaml").tensors()}
    assert {row[0]: numbers[row[7]] for row in page.tensors} == planned


def test_overflows_and_warnings_stand_first(tmp_path: Path) -> None:
    save_file({"w": torch.full((4, 4), 1e30), "module.x": torch.ones(2)}, tmp_path / "in.safetensors")
    shardmerge("convert", tmp_path / "in.safetensors", tmp_path / "out", "--dtype", "float16", "--no-sync", "--report")
    text = (tmp_path / "out.report.html").read_text()
    assert "16 values of <code>w</code> overflowed in the cast" in text
    assert text.index("overflowed") < text.index('id="summary"')


def test_clones_have_no_checksum(disk: Callable[[str], Path]) -> None:
    root = disk("xfs")
    save_file({f"w{i}": torch.randn(256, 256) for i in range(3)}, root / "in.safetensors")
    shardmerge("convert", root / "in.safetensors", root / "out", "--report")
    page = ReportPage(root / "out.report.html")
    assert [row[0] for row in page.tables["What was done to the tensors"]] == ["cloned"]
    assert {row[6] for row in page.tensors} == {"cloned: none"}


@pytest.mark.parametrize("name", INPUTS)
def test_moves_are_told_from_arithmetic(name: str, tmp_path: Path) -> None:
    """By the types of the ops, where the report has only their labels."""

    def ops(entry: TensorEntry) -> list[object]:
        held = composed(entry)
        return [] if held is None else [held.recipe, *(op for base in held.bases for op in ops(base))]

    run_rules(OPS[name].example, INPUTS[name], tmp_path)
    for tensor in sm.plan(tmp_path / "mapping.yaml").tensors():
        for op in ops(tensor.entry):
            assert isinstance(op, Op)
            assert (word(op.label) in MOVES) == isinstance(op, Move), op


# --- when, and where ---


def test_a_report_changes_no_byte_of_the_result(folder: Path) -> None:
    shardmerge("run", folder / "mapping.yaml", "--out", folder / "plain", "--no-sync", "-q")
    assert tree(folder / "plain") == tree(folder / "out")
    sm.verify(folder / "out")


def test_a_report_of_the_receipt_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    shardmerge("report", folder / "out", "--out", tmp_path / "a.html")
    sm.report(folder / "out", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    later, run = ReportPage(tmp_path / "a.html"), ReportPage(folder / "out.report.html")
    assert later.tables == run.tables
    assert "made from the receipt after the run" in later.text
    assert "made from the receipt after the run" not in run.text
    assert later.data["points"] == []


def test_the_timeline_is_that_of_the_run(page: ReportPage, folder: Path) -> None:
    points = page.data["points"]
    assert points == sorted(points)
    assert points[-1][1] == sum(tensor.nbytes for tensor in load_file(folder / "out" / "model.safetensors").values())
    assert all(8 * 2**20 < resident < 2**30 for _, _, resident in points)


def test_a_run_that_finds_its_result_has_no_timeline(folder: Path, tmp_path: Path) -> None:
    shardmerge("run", folder / "mapping.yaml", "--report", tmp_path / "again.html")
    assert ReportPage(tmp_path / "again.html").data["points"] == []


def test_json_names_the_report(folder: Path, tmp_path: Path) -> None:
    done = shardmerge("report", folder / "out", "--out", tmp_path / "r.html", "--json")
    assert json.loads(done.stdout)["path"] == str(tmp_path / "r.html")
    done = shardmerge("run", folder / "mapping.yaml", "--report", tmp_path / "r.html", "--json")
    assert json.loads(done.stdout)["report"] == str(tmp_path / "r.html")


def test_a_place_that_no_report_can_have_is_refused_before_the_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.html").write_text("mine")
    run = ("run", folder / "mapping.yaml", "--out", tmp_path / "out")
    assert "[output-exists]" in shardmerge(*run, "--report", tmp_path / "notes.html", code=1).stderr
    assert "[missing-path]" in shardmerge(*run, "--report", tmp_path / "no" / "r.html", code=2).stderr
    assert "[bad-report-path]" in shardmerge("run", "--report", folder / "mapping.yaml", code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.html"]
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_a_result_without_its_report_is_published(folder: Path, tmp_path: Path) -> None:
    done = shardmerge(
        "run", folder / "mapping.yaml", "--out", tmp_path / "out", "--report", "/proc/self/r.html", code=6
    )
    assert "[report-not-written]" in done.stderr
    sm.verify(tmp_path / "out")


def test_a_timeline_is_bounded_and_keeps_its_ends() -> None:
    now = [0.0]
    line = Timeline(clock=lambda: now[0], memory=lambda: 7)
    line.planned(100_000)
    now[0] = 5.0
    line.advance(30_000)  # what an earlier run had made
    for _ in range(70_000):
        now[0] += 0.1
        line.advance(1)
    for _ in range(50):
        now[0] += 0.1
        line.advance(0)
    line.ended()
    assert len(line.points) <= MOST_POINTS
    assert (line.points[0].seconds, line.points[-1].seconds) == (0.0, round(now[0], 3))
    assert line.points[-1].done == 100_000
    assert line.kept == 30_000
    assert [name for name, _ in line.phases] == ["planning", "writing", "publishing"]
    assert {begin for _, begin in line.phases} <= {point.seconds for point in line.points}
    steps = [later.seconds - point.seconds for point, later in zip(line.points, line.points[1:], strict=False)]
    assert max(steps) < 5 * now[0] / len(line.points)


# --- whatever the receipt holds ---


def edited(folder: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Returns a directory with nothing but a changed receipt."""
    receipt = receipt_of(folder / "out")
    change(receipt)
    to.mkdir(exist_ok=True)
    write_receipt(to, receipt)
    return to


def first(receipt: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a tensor."""
    found: dict[str, Any] = next(iter(receipt["tensors"].values()))
    return found


_LEAF = {"source": "a", "tensor": "b", "shape": [2], "origin": ""}
ROWS = {"op": "concat dim 0", "of": [{"op": "3 new rows (mean)", "of": [_LEAF]}]}

DAMAGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tensors": lambda receipt: receipt.pop("tensors"),
    "tensors that are a list": lambda receipt: receipt.update(tensors=[]),
    "a tensor that is a number": lambda receipt: receipt["tensors"].update(w=3),
    "a shape of words": lambda receipt: receipt["tensors"].update(w={"shape": ["a"]}),
    "no plan": lambda receipt: receipt.pop("plan"),
    "sources of text": lambda receipt: receipt.update(sources={"a": "b"}),
    "a size beyond all": lambda receipt: receipt["shards"].update(x={"nbytes": 10**400, "frame_sha256": ""}),
    "a shape beyond all": lambda receipt: receipt["tensors"].update(w=first(receipt) | {"shape": [2**62, 2**62]}),
    "a negative size": lambda receipt: receipt["tensors"].update(w=first(receipt) | {"nbytes": -1}),
    "rows of a scalar": lambda receipt: receipt["tensors"].update(w=first(receipt) | {"shape": [], "made": ROWS}),
    "another format": lambda receipt: receipt.update(format="x"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_receipt_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    edited(folder, tmp_path / "out", DAMAGED[name])
    assert "[damaged-receipt]" in shardmerge("report", tmp_path / "out", code=3).stderr
    assert not (tmp_path / "out.report.html").exists()


def test_nests_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shardmerge.json").write_text("[" * 100_000)
    assert "[damaged-receipt]" in shardmerge("report", tmp_path / "out", code=3).stderr


def test_what_shardmerge_did_not_make_is_refused(tmp_path: Path) -> None:
    assert "[no-receipt]" in shardmerge("report", tmp_path, code=2).stderr
    assert "[no-receipt]" in shardmerge("report", tmp_path / "nowhere", code=2).stderr


HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked=1</script>",
    '"><img src=x onerror=document.documentElement.dataset.hacked=1>',
    "a'b&amp;<!--",
    "]]>${title}$$\\u003c",
    "evil\u202etxt\x00\n\ud800",
)


def hostile(receipt: dict[str, Any]) -> None:
    """Puts hostile text wherever a receipt has text."""
    like = first(receipt)
    for text in HOSTILE:
        row = json.loads(json.dumps(like)) | {"rule": text, "dtype": text}
        row["made"] = {"op": text, "of": [{"source": text, "tensor": text, "shape": [2], "origin": text}]}
        receipt["tensors"][text] = row
        receipt["sources"][text] = {"path": text, "kind": text, "fingerprint": text, "notes": [text]}
        receipt["unused"].append({"source": text, "tensor": text, "reason": text})
        receipt["warnings"].append(text)
        receipt["side_files"][text] = text
    receipt["target"] = receipt["plan"] = HOSTILE[0]


def test_hostile_text_stays_text(folder: Path, tmp_path: Path) -> None:
    edited(folder, tmp_path / "out", hostile)
    path = sm.report(tmp_path / "out")
    text, page = path.read_text("utf-8"), ReportPage(path)
    plain = ReportPage(folder / "out.report.html")
    assert page.tags <= plain.tags | {"ul", "li"}
    assert text.count("<script") == 2
    assert not re.search("[\u202e\x00]", text)
    assert page.data["plan"] == HOSTILE[0]
    names = {row[0] for row in page.tensors}
    assert {*HOSTILE[:4], "evil\\u202etxt\\u0000\\u000a\\ud800"} <= names


def test_nothing_of_the_page_is_elsewhere(page: ReportPage) -> None:
    assert all(url == "data:," or url.startswith("#") for url in page.urls)
    assert not page.tags & {"img", "iframe", "object", "embed", "video", "audio", "base", "form"}


# --- sizes ---


def grown(shapes: dict[str, tuple[int, ...]]) -> Callable[[dict[str, Any]], None]:
    """Gives a receipt these tensors, each from one of the same name."""

    def change(receipt: dict[str, Any]) -> None:
        like = receipt["tensors"]["language_model.model.norm.weight"]
        receipt["tensors"] = {}
        for number, (name, shape) in enumerate(shapes.items()):
            leaf = {"source": "trained", "tensor": f"module.{name}", "dtype": "F32", "shape": shape, "origin": "here"}
            made = {"op": "cast F32 to BF16", "of": [leaf]}
            row = {"shape": shape, "nbytes": 2 * torch.Size(shape).numel(), "made": made, "crc32": f"{number:08x}"}
            receipt["tensors"][name] = like | row

    return change


def test_the_page_of_an_8b_is_small(folder: Path, tmp_path: Path) -> None:
    shapes = LlamaShape(4096, 32, 32, 8, 14336, 128256).tensors("language_model.")
    shapes |= {f"vision_tower.vision_model.encoder.layers.{i}.a_long_name.weight": (9, 9) for i in range(400)}
    path = sm.report(edited(folder, tmp_path / "out", grown(shapes)))
    assert len(shapes) > 690
    assert len(ReportPage(path).tensors) == len(shapes)
    assert path.stat().st_size < 0.6 * MB


def test_a_hundred_thousand_tensors_share_rows(folder: Path, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8)}
    for layer in range(61):
        for expert in range(550):
            for name in ("gate", "up", "down"):
                shapes[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = (8, 8)
    path = sm.report(edited(folder, tmp_path / "out", grown(shapes)))
    page = ReportPage(path)
    assert len(shapes) > 100_000
    names = {row[0] for row in page.tensors}
    assert "model.layers.{0-60}.mlp.experts.{0-549}.up_proj.weight (33,550 tensors)" in names
    assert len(page.tensors) == 4
    assert "Those that differ only in the numbers in their names share a row" in page.text
    assert path.stat().st_size < 0.1 * MB


def test_too_many_names_are_cut_and_the_page_says_so(folder: Path, tmp_path: Path) -> None:
    shapes = {f"w{number}x.weight": (2, 2) for number in range(5_000)}
    path = sm.report(edited(folder, tmp_path / "out", grown(shapes)))
    page = ReportPage(path)
    assert len(page.tensors) == 1_000
    assert "The first 1,000 of 5,000 rows are shown." in page.text
    assert path.stat().st_size < MB


# --- parts of a model ---


def origin(name: str, nbytes: int) -> Origin:
    return Origin(name, "U8", (nbytes,), nbytes, nbytes, "s", "r", (), "copied", "copied", "copied", "0", 0)


def test_a_model_is_cut_where_it_has_parts() -> None:
    llama = [
        origin(name, torch.Size(shape).numel()) for name, shape in LlamaShape(8, 2, 2, 2, 16, 32).tensors().items()
    ]
    part = part_namer(llama)
    assert {part(one.name) for one in llama} == {"lm_head", "model.embed_tokens", "model.layers", "model.norm"}
    llava = [origin(f"{name}.a.b", 9) for name in ("language_model", "vision_tower", "projector")]
    assert {part_namer(llava)(one.name) for one in llava} == {"language_model", "vision_tower", "projector"}
    assert part_namer([origin("w", 1)])("w") == "w"


def test_the_picture_has_words() -> None:
    text = described({("llm", "copied", "model"): 3000.0})
    assert text == "Flow of bytes. 3.00 KB from llm to model: copied."
