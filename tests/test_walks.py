"""Walks over elements are cut by arithmetic: what a walk holds is never counted through."""

from __future__ import annotations

from shardmerge.plan.walks import Walk, cut, whole

HUGE = 1 << 60


def test_a_part_of_a_huge_tensor_is_cut_at_once() -> None:
    """A fused parameter of a ZeRO run is cut so at every rank: half a billion elements, at every plan."""
    assert list(cut(whole(HUGE), 0, 3, HUGE // 2)) == [Walk(3, (3,), ((HUGE // 2 - 3, 1, (1,)),))]


def test_rows_that_lie_inside_are_one_walk_and_the_others_are_taken_one_by_one() -> None:
    """Rows of four elements; the range begins in the second, and ends in the last but one."""
    rows = Walk(0, (0,), ((HUGE, 4, (4,)), (4, 1, (1,))))
    found = list(cut(rows, 0, 6, 4 * HUGE - 6))
    middle, *ends = found
    assert middle == Walk(8, (8,), ((HUGE - 4, 4, (4,)), (4, 1, (1,))))
    assert sorted(end.at for end in ends) == [6, 4 * HUGE - 8]
