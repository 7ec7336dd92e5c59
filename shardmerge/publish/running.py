"""Carries out a plan: makes the parts that have no receipt, by whoever is at hand, and publishes the result."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from shardmerge.errors import InterruptedRunError, PublishedError, ShardmergeError
from shardmerge.execute.engine import Counters, Outcome
from shardmerge.execute.executors.contract import Make, Progress, Stopped
from shardmerge.execute.patience import patiently
from shardmerge.plan.schedule import largest_first
from shardmerge.plan.value import Part, Plan
from shardmerge.prepare.options import Options
from shardmerge.publish.checks import check_place
from shardmerge.publish.finishing import Goal, finish, published_plan, unconfirmed
from shardmerge.publish.having_made import have_made
from shardmerge.publish.making import is_made, read_receipt, receipt_path
from shardmerge.publish.results import Result, Unfinished
from shardmerge.publish.staging import Staging, left_over, remove, stagings
from shardmerge.sources.checksums import read_records

if TYPE_CHECKING:
    from shardmerge.publish.shares import Which

_T = TypeVar("_T")

# How often parts that are lost before they are published are made again. 3 of 978 races lost one, none of 800 since.
_TIMES = 3


def carry_out(
    plan: Plan,
    out: Path,
    options: Options,
    progress: Progress | None = None,
    publishing: Callable[[], object] = bool,
) -> Result:
    """Runs a plan and publishes the result as ``out``.

    What an earlier run of the same plan made is kept. What is published already is left as it is.

    Parameters
    ----------
    plan, out, options
        What, where, and how.
    progress
        See ``execute.executors.contract``; called with 0 while the result is published.
    publishing
        Called once all parts are made.

    Raises
    ------
    ShardmergeError
        See ``publish.checks.check_output``, ``execute.engine.Workshop.make`` and ``publish.finishing.finish``.
        Whatever is raised but a ``PublishedError``, ``out`` is as it was.
    """
    goal = Goal.of(plan, out, fresh=options.fresh)
    make = partial(_make_missing, plan, out, options, progress)
    return _published(goal, make, options, progress, publishing=publishing)


def carry_out_share(
    plan: Plan, which: Which, out: Path, options: Options, progress: Progress | None = None
) -> Result | Unfinished:
    """Makes some of the parts of a plan, as one of several that do; publishes where all are made then.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    goal = Goal.of(plan, out)
    if goal.reached():
        return _there_already(goal, options)
    try:
        state = make_some(plan.parts(), which, out, options, progress, there=goal.reached)
    except InterruptedRunError as error:
        return _there_after_all(goal, options, error)
    if (state.missing or state.elsewhere) and not goal.reached():
        return state
    return replace(_published(goal, int, options, progress), made=state.made)


def finish_plan(plan: Plan, out: Path, options: Options, made: int = 0) -> Result:
    """Publishes a plan whose parts are made, so many by the caller; raises as ``publish.finishing.finish``."""
    return replace(_published(Goal.of(plan, out), int, options, recheck=options.recheck), made=made)


def make_some(
    parts: Sequence[Part],
    which: Which,
    out: Path,
    options: Options,
    progress: Progress | None = None,
    *,
    there: Callable[[], bool] = lambda: False,
) -> Unfinished:
    """Makes some of the parts of a plan, as one of several that do; publishes nothing.

    Parameters
    ----------
    parts
        All parts of the plan, or those that this one is to make.
    which
        Its share, or whatever nobody has made or is visibly at work on.
    out, options, progress
        As for ``carry_out``.
    there
        Tells whether the result is published: what fails because another one did that meanwhile did not fail.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    staging = Staging.of(out, parts[0].plan, sync=options.sync)
    made = mmap.mmap(-1, 1 + max(part.number for part in parts))  # a byte a part, shared with forked processes
    begun = False
    try:
        for todo in which.rounds(parts, staging, options):
            begun = True
            have_made(
                todo, staging, out, options, progress, made_by=lambda make: which.maker(_Marking(make, made), staging)
            )
    except (OSError, ShardmergeError) as error:
        if isinstance(error, InterruptedRunError) or not there():
            raise
        return Unfinished(sum(made[:]), 0, len(parts), elsewhere=True)
    missing = sum(read_receipt(staging, part) is None for part in parts)
    elsewhere = begun and not staging.is_begun()
    return Unfinished(sum(made[:]), 0 if elsewhere else missing, len(parts), elsewhere)


@dataclass(frozen=True, slots=True)
class _Marking:
    """Makes parts, and says which."""

    make: Make
    made: mmap.mmap

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        self.make(part, counters, stopped)
        self.made[part.number] = 1


def _published(
    goal: Goal,
    make: Callable[[], int],
    options: Options,
    progress: Progress | None = None,
    *,
    publishing: Callable[[], object] = bool,
    recheck: bool = False,
) -> Result:
    """Has parts made and publishes the result; what fails because somebody else has done so did not fail."""
    if goal.reached():
        return _there_already(goal, options)
    staging = Staging.of(goal.out, goal.plan.id, sync=options.sync)
    how = partial(
        finish, goal, staging, read_records, overwrite=options.overwrite, recheck=recheck, sha256=options.sha256
    )
    finished = partial(patiently, how, partial(progress, 0) if progress else bool, last=True)
    try:
        made, (outcome, records) = _made_and_finished(make, publishing, finished)
    except (OSError, ShardmergeError) as error:
        return _there_after_all(goal, options, error)
    return Result(goal.out, goal.plan, outcome, records, made, left_over(goal.out, goal.plan.id))


def _made_and_finished(
    make: Callable[[], int], publishing: Callable[[], object], finished: Callable[[], _T]
) -> tuple[int, _T]:
    """Makes parts and publishes. What was lost in between, as several took the model from each other, is made again."""
    made = make()
    publishing()
    for _ in range(_TIMES):
        try:
            return made, finished()
        except ShardmergeError as error:
            again = make() if error.code == "part-differs" else 0
            if not again:
                raise
            made += again
    return made, finished()


def _there_after_all(goal: Goal, options: Options, error: OSError | ShardmergeError) -> Result:
    """Returns the result if somebody else has published it meanwhile, or raises what happened."""
    if isinstance(error, PublishedError) or not goal.reached():
        raise error
    if isinstance(error, InterruptedRunError):
        raise unconfirmed(goal.out, "interrupted") from error
    return _there_already(goal, options)


def _there_already(goal: Goal, options: Options) -> Result:
    try:
        patiently(lambda _: goal.settle(sync=options.sync), last=True)
    except InterruptedRunError as error:
        raise unconfirmed(goal.out, "interrupted") from error
    return Result(goal.out, goal.plan, Outcome({}, {}, 0, 0, 0), left_over=left_over(goal.out, goal.plan.id))


def _make_missing(plan: Plan, out: Path, options: Options, progress: Progress | None) -> int:
    """Makes all parts that are not made yet; returns how many."""
    staging = Staging.of(out, plan.id, sync=options.sync)
    sides = sum(side.nbytes for side in plan.side_files)

    if options.fresh:
        check_place(plan.files(), out, overwrite=options.overwrite)
        for root in stagings(out):
            remove(root, out)
    every = _largest_first(plan.parts())
    todo = [part for part in every if not is_made(staging, part, recheck=options.recheck)]
    if progress is not None:
        progress(_tensor_bytes(every) - _tensor_bytes(todo))
    try:
        have_made(todo, staging, out, options, progress, files=plan.files(), more=sides, target=plan.target)
    except BaseException:
        staging.give_up()
        raise
    return len(todo)


def make_share(
    parts: Sequence[Part], plan: tuple[str, int], out: Path, options: Options, progress: Progress | None = None
) -> Unfinished:
    """Makes parts of a plan of which this one holds no others; publishes nothing.

    Parameters
    ----------
    parts
        Its share.
    plan
        The plan's id, and how many parts it has.
    out, options, progress
        As for ``carry_out``.

    Raises
    ------
    ShardmergeError
        As ``carry_out``.
    """
    from shardmerge.publish.shares import Everything

    plan_id, count = plan

    def there() -> bool:
        return not options.fresh and published_plan(out) == plan_id

    made = make_some(parts, Everything(), out, options, progress, there=there).made if parts else 0
    staging = Staging.of(out, plan_id, sync=options.sync)
    missing = sum(not receipt_path(staging, number).is_file() for number in range(count))
    return Unfinished(made, missing, count)


def _tensor_bytes(parts: Sequence[Part]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part.shard.tensors)


def _largest_first(parts: Sequence[Part]) -> list[Part]:
    return [parts[n] for n in largest_first([part.shard.nbytes for part in parts])]
