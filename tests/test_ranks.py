"""The rank rule as a value: its numbers are all there is to it, and comparing two costs no look at the ranks."""

from __future__ import annotations

import copy
import pickle
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

import shardmerge as sm
from shardmerge.tensors import Extent
from shardmerge.tensors.ranks import Fragments, Partition, Partitions, RankChunks
from tests.counting import calls

CASES = ("bag_z3_w3_bf16", "llama_z3_w2_bf16", "subgroups_bag_z3_w3_bf16")


def rules(case: str, golden: Path) -> list[RankChunks]:
    """The rank rules of a checkpoint that DeepSpeed wrote."""
    catalog = sm.inspect(golden / "zero" / case / "ckpt")
    return [entry.pieces for entry in catalog.entries.values() if isinstance(entry.pieces, RankChunks)]


def again(table: Partitions) -> Partitions:
    """A table of the same content that shares nothing with it."""
    if isinstance(table, Fragments):
        offsets = tuple(array("q", row.tolist()) for row in table.offsets)
        return Fragments(tuple(map(str, table.files)), offsets, table.index, table.numel, table.itemsize)
    return tuple(Partition(replace(part.extent), part.numel) for part in table)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_is_what_its_numbers_say(case: str, golden: Path) -> None:
    found = rules(case, golden)
    assert len(found) > 5
    assert case.startswith("llama") or any(isinstance(rule.partitions, Fragments) for rule in found)
    for rule in found:
        rebuilt = RankChunks(again(rule.partitions), rule.itemsize, rule.start, rule.numel)
        assert rebuilt == rule
        assert (hash(rebuilt), hash(rebuilt.partitions)) == (hash(rule), hash(rule.partitions))
        assert list(rebuilt) == list(rule)
        for sent in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
            assert (sent, list(sent)) == (rule, list(rule))
    assert len(set(found)) == len(found)  # no two parameters lie in one place


@pytest.mark.parametrize("case", CASES)
def test_parameters_of_a_sub_group_share_one_table(case: str, golden: Path) -> None:
    tables = [rule.partitions for rule in rules(case, golden)]
    owned = [table for table in tables if isinstance(table, tuple)]
    assert len({id(table) for table in owned}) == len(set(owned)) < len(owned)
    frozen = [table for table in tables if isinstance(table, Fragments)]
    assert len({id(table.files) for table in frozen}) == len({id(table.offsets) for table in frozen}) == bool(frozen)


def tables(world: int) -> list[Partitions]:
    files = tuple(f"rank{rank}" for rank in range(world))
    offsets = tuple(array("q", [64, 64 * rank]) for rank in range(world))
    return [tuple(Partition(Extent(file, 64, 4000), 1000) for file in files), Fragments(files, offsets, 1, 1000, 4)]


@pytest.mark.parametrize("kind", [0, 1])
def test_any_other_number_is_another_rule(kind: int) -> None:
    rule = RankChunks(tables(8)[kind], 4, 10, 90)
    others = [replace(rule, itemsize=2), replace(rule, start=11), replace(rule, numel=91)]
    others += [replace(rule, partitions=table) for table in (*tables(9), tables(8)[1 - kind])]
    if isinstance(rule.partitions, Fragments):
        table = rule.partitions
        others += [
            replace(rule, partitions=replace(table, **change))
            for change in (
                {"index": 0},
                {"numel": 999},
                {"itemsize": 2},
                {"files": (*table.files[:7], "elsewhere")},
                {"offsets": (*table.offsets[:7], array("q", [64, 7]))},
            )
        ]
    else:
        others.append(replace(rule, partitions=(*rule.partitions[:7], Partition(Extent("elsewhere", 64, 4000), 1000))))
    for n, other in enumerate(others):
        assert other not in (rule, *others[:n])
        assert rule != other


@pytest.mark.parametrize("kind", [0, 1])
def test_what_is_shared_is_not_looked_at(kind: int) -> None:
    """Two parameters of 1,024 ranks are compared, and hashed, for the price of a few numbers."""
    table = tables(1024)[kind]
    one, same, other = RankChunks(table, 4, 0, 5000), RankChunks(table, 4, 0, 5000), RankChunks(table, 4, 7, 5000)
    assert calls(lambda: one == same) < 12
    assert calls(lambda: one == other) < 12
    assert calls(lambda: hash(one)) < 24
    assert one == same
