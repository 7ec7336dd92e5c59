"""What a plan costs grows with tensors, and not with ranks times tensors. Counted, since a clock would flake.

The checkpoints are small twins of those of ``benchmarks.scale``: true files, fewer layers, more ranks than GPUs.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

import shardmerge as sm
from benchmarks.harness import answer, measure, succeed
from shardmerge.plan.value import Plan
from shardmerge.sources.pickle_machine import Machine
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, Piece

scale = pytest.importorskip("benchmarks.scale", reason="torch writes the checkpoints")

SHAPE = scale.LlamaShape(256, 8, 8, 2, 512, 1024)
FEW, MANY = 8, 64


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mapping of a ZeRO-3 checkpoint of 8 ranks."""
    return scale.write_405b(tmp_path_factory.mktemp("few"), FEW, SHAPE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mapping of the same model on 64 ranks."""
    return scale.write_405b(tmp_path_factory.mktemp("many"), MANY, SHAPE)


def living(kind: type) -> int:
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


def held(mapping: Path) -> tuple[Plan, int]:
    """Returns a plan and the bytes that stay allocated for it."""
    sm.plan(mapping)  # whatever is cached is there
    gc.collect()
    tracemalloc.start()
    plan = sm.plan(mapping)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return plan, kept


def test_a_rank_adds_a_few_objects_and_not_one_a_tensor(few: Path, many: Path) -> None:
    small, small_kept = held(few)
    large, large_kept = held(many)
    tensors = sum(1 for _ in large.tensors())
    assert tensors == sum(1 for _ in small.tensors()) == 75
    more = (large_kept - small_kept) / (MANY - FEW)
    print(f"{small_kept:,} bytes for {FEW} ranks, {large_kept:,} for {MANY}: {more:.0f} a rank")
    assert more < 1600  # two stamps, with path and digest, and a partition; a piece a tensor would be 10,000
    assert small.tensor_bytes == large.tensor_bytes


def test_pieces_are_made_when_asked_for(many: Path) -> None:
    before = living(Piece), living(Extent)
    plan = sm.plan(many)
    tensors = list(plan.tensors())
    # A piece for the cast of each tensor; an extent for the partition of each rank.
    assert living(Piece) - before[0] <= len(tensors) + 8
    assert living(Extent) - before[1] <= MANY + 8
    chunks = [base.pieces for tensor in tensors for base in tensor.entry.pieces[0].held.bases]
    assert {len(pieces) for pieces in chunks} == {MANY}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts pickles that are interpreted, files that are opened, reads and bytes."""
    counts: Counter[str] = Counter()
    run, opened, read = Machine.run, SourceFile.__init__, SourceFile.read_into

    def counting_run(self: Machine) -> None:
        counts["pickles"] += 1
        run(self)

    def counting_open(self: SourceFile, path: str | Path) -> None:
        counts["files"] += 1
        opened(self, path)

    def counting_read(self: SourceFile, offset: int, out: memoryview) -> None:
        counts["reads"] += 1
        counts["bytes"] += len(out)
        read(self, offset, out)

    monkeypatch.setattr(Machine, "run", counting_run)
    monkeypatch.setattr(SourceFile, "__init__", counting_open)
    monkeypatch.setattr(SourceFile, "read_into", counting_read)
    return counts


def test_equal_pickles_are_interpreted_once(many: Path, counted: Counter[str]) -> None:
    """64 ranks on nodes of 8 GPUs write 8 pickles for their model files and 8 for their optimizer files."""
    sm.plan(many)
    assert counted["pickles"] == 2 * scale.GPUS


def test_every_rank_file_is_opened_and_its_headers_read_at_once(many: Path, counted: Counter[str]) -> None:
    sm.plan(many)
    # Each file, rank 0's model file two times more, each optimizer file once more for its step, and `latest`.
    assert counted["files"] == 3 * MANY + 3
    # End records, directory, headers, byte order, pickle: not one read for each of the 75 tensors of a model file.
    assert counted["reads"] <= 12 * counted["files"]
    headers = sum(len_of_headers(path) for path in (many.parent / "model").rglob("*model_states.pt"))
    assert counted["bytes"] < 2 * headers + MANY * (16 << 10)


def len_of_headers(path: Path) -> int:
    """A model file of ZeRO-3 has placeholders only: all of it is header."""
    return path.stat().st_size


def test_a_damaged_rank_among_equal_ones_is_found(many: Path, tmp_path: Path) -> None:
    """That its pickle is known spares nobody the check of its headers."""
    name = "zero_pp_rank_33_mp_rank_00_model_states.pt"
    tag = many.parent / "model" / "global_step1"
    for path in tag.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink()
    data = bytearray((tag / name).read_bytes())
    at = data.index(b"PK\x03\x04", len(data) // 2)  # the local header of a member in the middle
    data[at + 30] ^= 1  # its name
    (tmp_path / name).write_bytes(data)
    with pytest.raises(sm.CheckpointError) as caught:
        sm.inspect(tmp_path)
    assert caught.value.code == "hostile-zip"
    assert name in caught.value.where


def test_the_id_is_made_once(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = sm.plan(few)
    first = plan.id
    monkeypatch.setattr(sys.modules["shardmerge.plan.identity"], "identity", None)
    assert plan.id == first


# ---- many tensors

EXPERTS = scale.DeepSeekShape(
    hidden=256, layers=4, dense=1, experts=256, intermediate=512, expert=128, heads=2, vocab=512
)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mapping of a small DeepSeek of 256 experts a layer: 6,261 tensors in several shards."""
    folder = tmp_path_factory.mktemp("experts")
    scale.write_sharded(folder / "model", EXPERTS.tensors(), 40_000_000)
    path = folder / "mapping.yaml"
    path.write_text(scale.EXPERTS, "utf-8")
    return path


def test_a_tensor_takes_what_the_memory_law_counts_for_it(experts: Path) -> None:
    gc.collect()
    tracemalloc.start()
    plan = sm.plan(experts)
    assert plan.id
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tensors = sum(1 for _ in plan.tensors())
    print(f"{tensors} tensors: {peak / tensors:.0f} bytes each at the peak")
    assert tensors == sum(1 for _ in EXPERTS.tensors())
    assert peak / tensors < 2300


def test_json_is_written_as_it_is_made(experts: Path) -> None:
    """Neither the text nor its objects are ever there as a whole."""
    command = [sys.executable, "-m", "shardmerge", "plan", experts]
    text, rows = succeed(measure(command)), measure([*command, "--json"])
    found = answer(rows)
    assert len(found["tensors"]) == sum(1 for _ in EXPERTS.tensors())
    print(f"{len(rows.stdout):,} bytes of JSON, {rows.peak - text.peak:,} more at the peak")
    assert rows.peak - text.peak < len(rows.stdout) / 2


def test_every_answer_names_the_same_id(experts: Path) -> None:
    """Processes with other seeds for their hashes; the last one reads a plan of several MB, and makes none."""
    written = experts.with_name("plan.json")
    command = [sys.executable, "-m", "shardmerge", "plan"]
    ids = {sm.plan(experts).id}
    for more in ([experts, "--out", written], [written]):
        ids.add(str(answer(measure([*command, *more, "--json"]))["id"]))
    assert ids == {json.loads(written.read_text("utf-8"))["plan"]}
