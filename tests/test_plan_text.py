"""A plan as text: all of it, one JSON document, in lines that are read as they come; what is no plan is refused."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import shardmerge as sm
from shardmerge import api
from shardmerge.compose import cast_to, compose
from shardmerge.dtypes import DTYPES
from shardmerge.ops.contract import Op
from shardmerge.ops.registry import OPS
from shardmerge.plan import writing
from shardmerge.plan.reading import PlanText
from shardmerge.plan.shard import PlannedTensor
from shardmerge.plan.value import Plan, Unused
from shardmerge.plan.writing import plan_lines
from shardmerge.tensors import Extent, FileStamp, Piece, SideFile, TensorEntry
from tests import golden_plans
from tests.conftest import shardmerge
from tests.plans_in_use import PLANS, PRESETS
from tests.small_plans import Store, as_json, planned, signed, text
from tests.test_op_laws import CASES, WAYS, build, put
from tests.test_op_laws import Store as OpStore
from tests.test_ops_written import drawn
from tests.test_plan_marks import joins, menu, numbered


def same_in_all(found: Plan, plan: Plan) -> None:
    """Fails with the fields that differ; what says nothing about the files of now is compared, too."""
    assert [f.name for f in fields(Plan) if f.compare and getattr(found, f.name) != getattr(plan, f.name)] == []
    assert found == plan
    assert found.id == plan.id
    assert found.files() == plan.files()
    assert found.parts() == plan.parts()
    assert replace(found, checks=("so that the id is made anew",)).id == plan.id


def check_text(plan: Plan, out: str = "") -> None:
    """All laws of the text of one plan."""
    lines = list(plan_lines(plan, out))
    written = "".join(lines)
    same_in_all(PlanText(lines, "plan.json").plan(), plan)
    assert "".join(plan_lines(PlanText(lines, "plan.json").plan(), out)) == written
    value = as_json(written)
    assert written == "".join(written.splitlines(keepends=True)) == "".join(lines)
    assert len(lines) == len(written.splitlines())  # a row has a line, and a line a row
    assert value["plan"] == plan.id
    assert [shard["name"] for shard in value["shards"]] == [shard.name for shard in plan.shards]
    rows = [row["name"] for shard in value["shards"] for row in shard["tensors"]]
    assert rows == [tensor.name for tensor in plan.tensors()]
    own = [json.loads(line.rstrip(",\n")) for line in lines if line.startswith('{"name": ') and '"made": ' in line]
    assert [row["name"] for row in own] == rows
    read = PlanText(lines, "plan.json")
    assert (read.id, read.target, read.out) == (plan.id, plan.target, out)
    assert read.sizes == tuple(shard.nbytes for shard in plan.shards)
    wanted = list(range(len(plan.shards)))[::2]
    assert list(read.parts(wanted)) == [plan.parts()[number] for number in wanted]
    assert tuple(PlanText(lines, "plan.json").parts(range(len(plan.shards)))) == plan.parts()


# ---- what is in use


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_comes_back(name: str, tmp_path: Path) -> None:
    """Of every preset on real checkpoints, and of every kind of checkpoint of tests/golden."""
    prepared = PLANS[name](tmp_path)
    check_text(prepared.plan, str(prepared.out or ""))


@pytest.mark.parametrize("name", golden_plans.MAPPINGS)
def test_text_and_id_are_what_they_were(name: str, tmp_path: Path) -> None:
    """See ``golden_plans`` for what to do where they are not."""
    assert golden_plans.text_of(name, tmp_path) == (golden_plans.FOLDER / f"{name}.txt").read_text()


def test_no_preset_is_left_out() -> None:
    from shardmerge.mapping.preset_files import list_presets
    from tests.test_layouts import layout_of

    names = {name.split()[0] for name in PRESETS} | {"llava/official-to-hf-onevision"}  # in test_llava_pairs
    assert set(list_presets()) <= names | {layout_of(name).preset for name in names if "/" not in name}


# ---- all that a plan can hold


def test_all_fields_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a note.txt"
    path.write_bytes("größe\n".encode() + bytes(range(256)))
    stamp = FileStamp.of(str(path), path.stat(), b"header")
    part, rest = Extent(str(path), 0, 7), Extent(str(path), 7, 256)
    sides = (
        SideFile("config.json", ('{"ü": "\\u2028"}\n'.encode(), part)),
        SideFile("more/binary.bin", (bytes(range(256)), rest, b"")),
        SideFile("empty", ()),
    )
    store = Store(tmp_path)
    entries = {f"a.{way}": store.put(numbered((4, 6)), way, f"of.{way}") for way in Store.WAYS}
    for form, size in (("safetensors", 1 << 30), ("safetensors", 200), ("bin", 200)):
        made = planned({**entries, 'a "name"\\ größe \U0001f600': entries["a.whole"]}, sides, size=size, form=form)
        plan = replace(
            made,
            copies={part: "0" * 64, rest: "1" * 64},
            side_sources=(stamp,),
            unused=(Unused("src", "a", "dropped"), Unused("src", "b\n", "")),
            warnings=("one", "zwei ü\n"),
            left_behind=(("x.py", "code"), ("", "")),
            checks=("transformers 5",),
        )
        check_text(plan, "/an/output \udcff path")


@pytest.mark.parametrize("way", Store.WAYS)
def test_moves_of_moves_come_back(way: str, tmp_path: Path) -> None:
    entry = Store(tmp_path).put(numbered((4, 6)), way)
    moves = [compose(move, [one]) for one in (entry, *joins(entry)) for move in menu(one.shape)]
    check_text(planned({f"x{n:04}": one for n, one in enumerate([*moves, *joins(entry)])}, size=1000))


def other_numbers(op: Op, rng: random.Random) -> Op:
    """Returns an op with any numbers where it has some; that is not what decides the shape."""
    found = {}
    for field in fields(op):
        value = getattr(op, field.name)
        if "float" in str(field.type):
            found[field.name] = (
                tuple(drawn("float", rng) for _ in value) if isinstance(value, tuple) else drawn("float", rng)
            )
        elif field.name in ("seed", "salt"):
            found[field.name] = drawn(str(field.type), rng)
    return replace(op, **found)


@pytest.mark.parametrize("way", WAYS)
def test_every_op_comes_back_with_any_numbers(way: str, tmp_path: Path) -> None:
    store, rng = OpStore(tmp_path, np.random.default_rng(0)), random.Random(way)
    entries: dict[str, TensorEntry] = {}
    for kind, cases in CASES.items():
        for index, case in enumerate(cases(4)):
            inputs = put(case, store, way)
            op = build(OPS[kind], case.params)
            for turn, one in enumerate((op, *(other_numbers(op, rng) for _ in range(5)))):
                made = compose(one, inputs)
                entries[f"{kind}.{index}.{turn}"] = made
                entries[f"{kind}.{index}.{turn}.cast"] = cast_to(made, DTYPES["F16"])
    assert {row.split(".")[0] for row in entries} == set(OPS)
    check_text(planned(entries, size=2000))


def test_a_million_pieces_are_a_rule(tmp_path: Path) -> None:
    """1,024 ranks are one table, and a row a parameter, whatever stands around it."""
    store = Store(tmp_path)
    rule = store._ranks(numbered((4096,)), numbered((4096,)), 1024)
    one = TensorEntry("t", DTYPES["F32"], (4096,), rule, "fp32 partitions", "src")
    entries = {f"p{n}": replace(one, pieces=replace(rule, start=n % 2)) for n in range(50)}
    entries |= {f"cast{n}": cast_to(entry, DTYPES["BF16"]) for n, entry in enumerate(list(entries.values()))}
    plan = planned(entries, size=1 << 20)
    check_text(plan)
    rows = [line for line in plan_lines(plan) if '"made"' in line]
    assert len(rows) == 100
    assert max(map(len, rows)) < 400
    assert len(as_json(text(plan))["ranks"]) == 1


# ---- as a stream


class Counted:
    """Lines, and how many of them were asked for."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.read = lines, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.read += 1
            yield line


def many(folder: Path, tensors: int, size: int = 1 << 30) -> Plan:
    """A plan of many tensors over one file."""
    extent = Store(folder).extent(numbered((4096,)).tobytes())
    entries = {}
    for n in range(tensors):
        piece = Piece(0, 8, extent.slice(4 * (n % 4000), 32))
        name = f"model.layers.{n}.mlp.weight"
        entries[name] = cast_to(TensorEntry(name, DTYPES["F32"], (8,), (piece,), "", "src"), DTYPES["BF16"])
    return planned(entries, size=size)


def test_lines_are_made_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = many(tmp_path, 200, 160)
    made = []
    real = writing.entry_row
    monkeypatch.setattr(writing, "entry_row", lambda *given: made.append(1) or real(*given))
    lines = plan_lines(plan)
    head = next(lines)
    assert json.loads(head.rstrip(",\n") + "}")["plan"] == plan.id
    assert made == []
    seen = sum('"made"' in line for _, line in zip(range(120), lines, strict=False))
    assert 0 < seen < 200
    assert len(made) <= seen + 1
    rest = sum('"made"' in line for line in lines)
    assert len(made) == seen + rest == 200


def test_a_text_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Nor is what is read of it, but for the parts that somebody asked for."""
    plan = replace(many(tmp_path, 4000, 1600), side_files=())  # the index is one row
    assert plan.id
    size = len(text(plan))
    lines = list(plan_lines(plan))
    tracemalloc.start()
    written = sum(map(len, plan_lines(plan)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    (part,) = PlanText(lines, "plan.json").parts([7])
    read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    print(f"{size:,} bytes: {most:,} at most to write it, {read:,} to read {len(part.shard.tensors)} of 4,000 tensors")
    assert written == size
    assert most < size / 8
    assert read < size / 8


def test_parts_come_before_the_end_is_read(tmp_path: Path) -> None:
    plan = many(tmp_path, 200, 160)
    lines = Counted(list(plan_lines(plan)))
    read = PlanText(lines, "plan.json")
    head = lines.read
    assert read.sizes == tuple(shard.nbytes for shard in plan.shards)
    assert head < 30
    parts = read.parts(range(len(plan.shards)))
    for number in range(3):
        assert next(parts) == plan.parts()[number]
        assert lines.read <= head + 1 + (number + 1) * (2 + len(plan.shards[0].tensors))
    assert len(list(parts)) == len(plan.shards) - 3
    assert lines.read == len(lines.lines)


def test_a_reader_begins_while_somebody_writes(tmp_path: Path) -> None:
    """Through a pipe whose writer waits until the first part was read."""
    plan = many(tmp_path, 200, 160)
    lines = list(plan_lines(plan))
    ends = [place for place, line in enumerate(lines) if line.startswith("]}")]
    source, sink = os.pipe()
    first_read = threading.Event()

    def write() -> None:
        with os.fdopen(sink, "w") as file:
            file.writelines(lines[: ends[0] + 1])
            file.flush()
            assert first_read.wait(60)
            file.writelines(lines[ends[0] + 1 :])

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(source) as file:
        parts = PlanText(file, "a pipe").parts([0, 3])
        assert next(parts) == plan.parts()[0]
        first_read.set()
        assert list(parts) == [plan.parts()[3]]
    writer.join()


def living() -> int:
    gc.collect()
    return sum(type(one) is PlannedTensor for one in gc.get_objects())


def test_a_worker_holds_no_parts_but_its_own(tmp_path: Path) -> None:
    """Counted while it makes one, tensor by tensor; the whole plan is read when all parts are there."""
    plan = many(tmp_path, 80, 160)
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(text(plan, str(out)), "utf-8")
    count, each = len(plan.shards), len(plan.shards[0].tensors)
    del plan
    before, held = living(), []
    for index in range(8):
        done = api.run_part(
            path, f"{index}/8", options=sm.Options(sync=False), progress=lambda _: held.append(living())
        )
        assert isinstance(done, api.Unfinished if index < 7 else api.Result)
    assert held
    assert max(held) - before <= -(-count // 8) * each
    assert len(sm.open_checkpoint(out)) == 80


def test_more_tasks_than_parts_and_a_task_twice(tmp_path: Path) -> None:
    plan = many(tmp_path, 8, 64)
    path, out = tmp_path / "plan.json", tmp_path / "out"
    path.write_text(text(plan, str(out)), "utf-8")
    options = sm.Options(sync=False)
    assert len(plan.shards) == 2
    states = [api.run_part(path, f"{index}/5", options=options) for index in (4, 0, 0, 3)]
    assert [(one.made, one.missing, one.count) for one in states] == [(0, 2, 2), (1, 1, 2), (0, 1, 2), (0, 1, 2)]
    assert isinstance(api.run_part(path, "1/5", options=options), api.Result)
    again_ = api.run_part(path, "0/5", options=options)
    assert isinstance(again_, api.Result)
    assert again_.made == 0
    with pytest.raises(sm.OutputError, match="not an empty"):
        api.run_part(path, "0/5", options=replace(options, fresh=True))


# ---- what is no plan


CODES = {"damaged-plan", "other-version"}


def refused(path: Path) -> str:
    """Returns the code with which a file is refused as a plan."""
    with pytest.raises(sm.ShardmergeError) as caught:
        api.prepare(path, sm.Options())
    error = caught.value
    assert error.code in CODES
    assert error.exit_code == 1
    assert error.where == str(path)
    assert error.hint
    return str(error.code)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A plan of two tensors, one of them cast, and a side file; and the file that it reads."""
    store = Store(tmp_path)
    entry = store.put(numbered((2, 2)), "whole", "w")
    made = planned({"x": cast_to(entry, DTYPES["F16"]), "y": entry}, (SideFile("c.json", (b"{}",)),))
    (shard,) = made.shards  # of 16 bytes and no page before the data, so that each bit can be tried
    tensors = tuple(replace(one, offset={"x": 32, "y": 16}[one.name]) for one in shard.tensors)
    plan = replace(made, shards=(replace(shard, nbytes=40, blobs=((0, bytes(16)),), tensors=tensors),))
    path = tmp_path / "plan.json"
    path.write_text(text(plan, str(tmp_path / "out")), "utf-8")
    assert api.prepare(path, sm.Options()).plan == plan
    return path


def test_every_bit_of_a_plan_counts(small: Path) -> None:
    data = small.read_bytes()
    found: dict[str, int] = {}
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            small.write_bytes(changed)
            code = refused(small)
            found[code] = found.get(code, 0) + 1
    print(f"{len(data):,} bytes: {found}")
    assert sum(found.values()) == 8 * len(data)


def test_every_cut_of_a_plan_is_seen(small: Path) -> None:
    data = small.read_bytes()
    for length in range(len(data)):
        small.write_bytes(data[:length])
        assert refused(small) == "damaged-plan"


@pytest.mark.parametrize(
    "inserted", [b" ", b"\n", b"\r", b"0", b",", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\x0b", b"\xc2\x85"]
)
def test_whatever_is_inserted_is_seen(inserted: bytes, small: Path) -> None:
    """At every place: blanks and ends of lines of other systems too, which JSON would let pass."""
    data = small.read_bytes()
    for place in range(len(data) + 1):
        small.write_bytes(data[:place] + inserted + data[place:])
        refused(small)


def test_lines_that_are_gone_twice_there_or_elsewhere_are_seen(small: Path) -> None:
    lines = small.read_bytes().splitlines(keepends=True)
    for place, line in enumerate(lines):
        others = [
            lines[:place] + lines[place + 1 :],
            [*lines[: place + 1], *lines[place:]],
            [*lines[:place], *lines[place : place + 2][::-1], *lines[place + 2 :]],
            [line, *lines[:place], *lines[place + 1 :]],
            [*lines[:place], *lines[place + 1 :], line],
        ]
        for other in others:
            if other != lines:
                small.write_bytes(b"".join(other))
                refused(small)


@pytest.mark.parametrize(
    "name", ["meta_llama3_tp2_gqa", "xtuner/llava-to-hf frozen_z3", "bag_z3_w3_fp32 cast", "peft/merge"]
)
def test_random_damage_to_larger_plans_is_seen(name: str, tmp_path: Path) -> None:
    prepared = PLANS[name](tmp_path)
    path = tmp_path / "plan.json"
    data = text(prepared.plan).encode()
    rng = random.Random(name)
    for _ in range(60):
        changed = bytearray(data)
        low = rng.randrange(len(data))
        high = low + rng.randint(1, 200)
        way = rng.choice(("flip", "cut", "repeat", "other"))
        if way == "flip":
            changed[low] ^= 1 << rng.randrange(8)
        elif way == "cut":
            del changed[low:high]
        elif way == "repeat":
            changed[low:low] = data[low:high]
        else:
            changed[low:high] = bytes(rng.choice(data) for _ in range(low, high))
        if changed != data:
            path.write_bytes(changed)
            refused(path)


def test_another_version_is_refused_by_name(small: Path) -> None:
    lines = small.read_text("utf-8").splitlines(keepends=True)[:-1]
    head = json.loads(lines[0].rstrip(",\n") + "}")
    for change in ({"schema": head["schema"] + 1}, {"shardmerge": "9.9.9"}, {"schema": None}):
        other = f"{json.dumps({**head, **change})[:-1]},\n"
        small.write_text("".join(signed([other, *lines[1:]])), "utf-8")
        assert refused(small) == "other-version"
        done = shardmerge("run", small, code=1)
        assert "[other-version]" in done.stderr
        assert "shardmerge plan MAPPING --out PLAN" in done.stderr


NO_PLANS = {
    "empty": b"",
    "an object": b"{}\n",
    "a mapping": b"shardmerge: 1\nsources: {a: b}\n",
    "a mapping in JSON": b'{"shardmerge": 1, "sources": {}}\n',
    "another list": b"[1, 2]\n",
    "no text": bytes(range(256)),
    "UTF-16": '{"format": "shardmerge plan"}\n'.encode("utf-16"),
    "deep": b"[" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"\n",
    "a long number": b'{"format": ' + b"9" * 100_000 + b"\n",
    "a receipt": b'{"format": "shardmerge receipt", "plan": "x"}\n',
}


@pytest.mark.parametrize("about", NO_PLANS)
def test_what_is_no_plan_is_refused(about: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(NO_PLANS[about])
    assert refused(path) == "damaged-plan"


@pytest.mark.parametrize("command", ["run", "plan", "finish"])
def test_no_command_ends_in_a_traceback(command: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(NO_PLANS["deep"])
    done = shardmerge(command, path, code=1)
    assert "[damaged-plan]" in done.stderr
    assert len(done.stderr) < 1000


def test_a_plan_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        name = path if path.suffix else path.with_suffix(".json")
        with pytest.raises(sm.UsageError) as caught:
            api.prepare(name, sm.Options())
        assert caught.value.code == "missing-path"
    broken = tmp_path / "broken.json"
    broken.symlink_to("/proc/self/mem")  # a file as far as stat knows, and no byte of it can be read
    with pytest.raises(sm.CheckpointError) as caught:
        api.prepare(broken, sm.Options())
    assert caught.value.code == "unreadable-file"


# ---- a digest that is right says nothing of who wrote it


def forged(path: Path, old: str, new: str) -> list[str]:
    """Returns the lines of a plan with some text replaced, and the digest that is right for them."""
    written = path.read_text("utf-8")
    assert written.count(old) >= 1, old
    return signed(written.replace(old, new, 1).splitlines(keepends=True)[:-1])


OUTSIDE = [
    "../x",
    "/tmp/x",
    "a/../../x",
    "",
    ".",
    "a//b",
    "a/.",
    "a/",
    "..",
    "a\\u0000b",
    "shardmerge.json",
    "OTHER",
    "OTHER/x",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_of_files_stay_inside_of_the_output(name: str, small: Path) -> None:
    whole, before = small.read_text("utf-8"), set(small.parent.rglob("*"))
    for own, other in (("model.safetensors", "c.json"), ("c.json", "model.safetensors")):
        wanted = name.replace("OTHER", other)
        small.write_text(whole, "utf-8")
        small.write_text("".join(forged(small, f'"name": "{own}"', f'"name": "{wanted}"')), "utf-8")
        assert refused(small) == "damaged-plan"
        if own != "c.json" and "OTHER" not in name:  # a share knows of no other file
            with pytest.raises(sm.CheckpointError):
                api.run_part(small, "0/1", options=sm.Options(sync=False))
    assert set(small.parent.rglob("*")) == before


HOSTILE = [
    ('"plan": "', '"plan": "/../../../../x'),
    ('"parts": [', '"parts": [7, '),
    ('"parts": [', '"parts": [-'),
    ('"nbytes": ', '"nbytes": 9'),
    ('"nbytes": ', '"nbytes": -'),
    ('"blobs": [[0, ', '"blobs": [[-1, '),
    ('"blobs": [[0, ', '"blobs": [[1, '),
    ('"blobs": [[', '"blobs": [], "more": [['),
    ('"checksums": {}', '"checksums": {"none": [0]}'),
    ('"checksums": {}', '"checksums": {"x": [999999]}'),
    ('"offset": ', '"offset": -'),
    ('"offset": ', '"offset": 9'),
    ('"rule": 0', '"rule": -1'),
    ('"rule": 0', '"rule": 99'),
    ('"rule": 0', '"rule": true'),
    ('"pieces": [[0, 4, 0, ', '"pieces": [[0, 4, 0, -'),
    ('"pieces": [[0, 4, 0, ', '"pieces": [[0, 4, -1, '),
    ('"pieces": [[0, 4, 0, ', '"pieces": [[0, 4, 7, '),
    ('"pieces": [[0, 4, ', '"pieces": [[0, 3, '),
    ('"pieces": [[0, 4, ', '"pieces": [[1, 3, '),
    ('"pieces": [[0, 4, ', '"pieces": [[0, 5, '),
    ('"pieces": [[', '"pieces": [[0, 2, 0, 1], [0, 2, 0, 1]], "more": [['),
    ('"pieces": [[', '"pieces": [], "more": [['),
    ('"shape": [2, 2]', '"shape": [-2, -2]'),
    ('"shape": [2, 2]', '"shape": [2, 3]'),
    ('"shape": [2, 2]', '"shape": [1e9]'),
    ('"shape": [2, 2]', f'"shape": [{"9" * 400}]'),
    ('"dtype": "F16"', '"dtype": "F32"'),
    ('"dtype": "F16"', '"dtype": "F99"'),
    ('"op": "Cast"', '"op": "Arange"'),
    ('"op": "Cast"', '"op": "__import__"'),
    ('"source": "F32"', '"source": "F64"'),
    ('"op": "Cast", "source": "F32", "target": "F16"', '"op": "Fill", "shape": [2, 2], "dtype": "F16", "value": "x"'),
    ('"by": {', '"view": [0, [2, 2], [2, 1]], "by": {'),
    ('"by": {', '"columns": 1, "by": {'),
    ('"made": {', '"made": ' + '{"of": [' * 3000 + "{"),
    ('"parts": [{"text": "{}"', '"parts": [{"copy": [0, 0, 1], "sha256": "00"'),
    ('"parts": [{"text": "{}"', '"parts": [{"base64": "!"'),
    ('"parts": [{"text": "{}"', '"parts": [{"text": 7'),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_a_plan_that_makes_no_sense_is_refused(old: str, new: str, small: Path) -> None:
    if old not in small.read_text("utf-8"):
        pytest.fail(f"the plan has no {old}")
    before = set(small.parent.rglob("*"))
    small.write_text("".join(forged(small, old, new)), "utf-8")
    assert refused(small) == "damaged-plan"
    assert set(small.parent.rglob("*")) == before
