"""How a plan is carried out follows from it and from what is granted: laws of the pure functions that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ResourceError
from shardmerge.packed_names import PackedName
from shardmerge.plan.schedule import Schedule, largest_first, schedule, share
from shardmerge.plan.shard import PlannedShard
from shardmerge.prepare.options import Options, granted
from shardmerge.tensors import Extent, FileStamp, TensorEntry, dense
from tests.small_plans import planned

SIZES = st.lists(st.integers(0, 1 << 40), min_size=0, max_size=60)
MIB = 1 << 20


@given(SIZES)
def test_the_order_is_one_of_all_parts_and_descends(sizes: list[int]) -> None:
    order = largest_first(sizes)
    assert sorted(order) == list(range(len(sizes)))
    assert [sizes[part] for part in order] == sorted(sizes, reverse=True)


@given(SIZES, st.integers(1, 20))
def test_shares_are_all_parts_each_once_and_even(sizes: list[int], count: int) -> None:
    """No task has more than the fair share and one part: what the largest part first gives (Graham's bound)."""
    shares = [share(sizes, index, count) for index in range(count)]
    assert sorted(part for one in shares for part in one) == list(range(len(sizes)))
    assert shares == [share(sizes, index, count) for index in range(count)]
    heaviest = max(sum(sizes[part] for part in one) for one in shares)
    assert heaviest * count <= sum(sizes) + (count - 1) * max(sizes, default=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlannedShard, ...]:
    """Eight files of 64 MiB, of which nobody reads a byte."""
    path = tmp_path_factory.mktemp("schedule") / "source"
    with path.open("wb") as file:
        file.truncate(512 * MIB)
    f32 = DTYPES["F32"]
    entries = {}
    for n in range(8):
        extent = Extent(str(path), 64 * MIB * n, 64 * MIB)
        entries[f"w{n}"] = TensorEntry(f"w{n}", f32, (16 * MIB,), dense(extent, 16 * MIB), "", "src")
    found = planned(entries, size=64 * MIB).shards
    assert len(found) == 8
    assert Path(path).stat().st_size == sum(tensor.nbytes for shard in found for tensor in shard.tensors)
    return found


GRANTED = st.tuples(st.integers(40, 400), st.integers(1, 64), st.integers(1, 16))


def scheduled(
    shards: tuple[PlannedShard, ...], granted: tuple[int, int, int], *, apart: bool = False, sha256: bool = False
) -> Schedule | ResourceError:
    budget, workers, processes = granted
    try:
        return schedule(shards, budget=budget * MIB, workers=workers, processes=processes, apart=apart, sha256=sha256)
    except ResourceError as error:
        return error


@given(GRANTED, st.booleans(), st.booleans())
def test_a_schedule_stays_within_what_is_granted(
    shards: tuple[PlannedShard, ...], granted: tuple[int, int, int], apart: bool, sha256: bool
) -> None:
    budget, workers, processes = granted
    found = scheduled(shards, granted, apart=apart, sha256=sha256)
    if isinstance(found, ResourceError):
        needed = int(found.hint.rpartition(" ")[2].removesuffix("MiB"))
        assert needed > budget
        found = scheduled(shards, (needed, workers, processes), apart=apart, sha256=sha256)
        assert isinstance(found, Schedule)
        budget = needed
    assert found.peak <= budget * MIB
    assert 1 <= found.workers <= workers
    assert found.processes <= min(processes, len(shards))
    assert found.threads <= 4
    assert found.tile & (found.tile - 1) == 0


@given(GRANTED, st.integers(0, 200), st.integers(0, 32))
def test_more_is_never_worse(
    shards: tuple[PlannedShard, ...], granted: tuple[int, int, int], memory: int, cpus: int
) -> None:
    """More memory or more CPUs never give fewer workers."""
    budget, workers, processes = granted
    less, more = scheduled(shards, granted), scheduled(shards, (budget + memory, workers + cpus, processes))
    if isinstance(less, Schedule):
        assert isinstance(more, Schedule)
        assert more.workers >= less.workers


def test_what_headers_and_frames_take_is_planned(shards: tuple[PlannedShard, ...]) -> None:
    """Of a `.metadata`, measured, four fifths of its bytes; of each frame that a worker has open, its window."""
    options = Options(memory=2048 * MIB, workers=2)
    plain = granted(shards, options, [FileStamp("/ck/__0_0.distcp", 64 * MIB, 1)], "state-dict")
    table = [FileStamp("/ck/.metadata", 80 * MIB, 1), FileStamp("/ck/__3.metadata", 20 * MIB, 1)]
    assert granted(shards, options, table, "state-dict").peak - plain.peak == 85 * MIB
    frames = [FileStamp(str(PackedName("/ck/__0_0.distcp", n, 99, n * MIB)), 64 * MIB, 1) for n in range(1, 7)]
    found = granted(shards, options, frames, "state-dict")
    assert found.workers == plain.workers
    assert found.peak - plain.peak == found.workers * (3 + 4 + 5 + 6 + 4) * MIB
