"""Rules against catalogs: which source tensor every target name takes. Pure, and order-free but for candidates.

The target pulls: a rule's first candidate that really has a tensor wins, and of two rules for a name the narrower one.
Rules of ``rest:`` come last and take what the others left. Nothing is left over in silence: every source tensor is
used, shadowed, or dropped by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shardmerge.errors import MappingError, raise_all
from shardmerge.mapping.dropping import Dropped
from shardmerge.mapping.lacking import misshapen, missing_tensors, unexpected_targets
from shardmerge.mapping.left_over import (
    idle_drops,
    idle_filters,
    idle_rules,
    nothing_matched,
    packed_operands,
    unfilled_targets,
    unmatched,
    unmerged_adapters,
)
from shardmerge.mapping.matching import Matching
from shardmerge.mapping.near import listed
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import Rule
from shardmerge.mapping.variables import Variables
from shardmerge.targets.expectation import Expectation
from shardmerge.tensors import Catalog, Extent


def resolve(
    rules: Sequence[Rule],
    dropped: Dropped,
    catalogs: Mapping[str, Catalog],
    expectation: Expectation | None = None,
    *,
    user_file: str,
    variables: Variables | None = None,
    merged: Collection[tuple[str, str]] = (),
) -> Resolution:
    """Returns which source tensor every target takes.

    Parameters
    ----------
    rules
        Of the spec, presets included.
    dropped
        What its drops take away.
    catalogs
        By source name; what is dropped may still be in them.
    expectation
        What the target must hold; None if the mapping alone decides.
    user_file
        The mapping, for messages that have no line of their own.
    variables
        What the formulas of ops may name.
    merged
        (source, name) of tensors that are part of others by now: of adapters in their bases, scales in their weights.

    Raises
    ------
    ShardmergeError
        All problems at once: ``double-claim``, ``rule-matches-nothing``, ``drop-matches-nothing``,
        ``unmatched-source``, ``unmerged-adapter``, ``missing-component``, ``missing-tensor``, ``unexpected-target``,
        ``shape-mismatch``, ``nothing-matched``, ``placeholder``, and of ops ``missing-operand``, ``op-shape``,
        ``op-value``, ``unknown-value``, ``bad-formula``.
    """
    known = variables or Variables(catalogs, _no_files)
    work = Matching(dropped.left(catalogs), dropped, expectation, known, merged=frozenset(merged))
    for rule in (one for one in rules if not one.rest):
        work.apply(rule)
    work.spent = frozenset(work.matched)
    for rule in (one for one in rules if one.rest):
        work.apply(rule)
    work.settle_failures()
    made, clashes = work.claims.settled()
    problems = [*work.problems, *map(_double_claim, clashes), *idle_drops(work)]
    # Codes and adapters that are left over make everything else look wrong besides.
    if causes := [*unmerged_adapters(work, made)] or [*packed_operands(work)]:
        raise_all([*problems, *causes])
    problems += unfilled_targets(work, made, rules)
    left_out: set[tuple[str, str]] = set()
    missing: list[str] = []
    if expectation is not None:
        left_out = _taken_back(work, made, expectation)
        missing = [
            name
            for name in expectation.tensors
            if name not in made and name not in work.failed and not (expectation.open and _is_dropped(work, name))
        ]
        problems += missing_tensors(work, expectation, missing, rules, user_file)
        problems += unexpected_targets(work, made, expectation)
        problems += misshapen(made, expectation)
    problems += idle_rules(work, missing)
    problems += unmatched(work, user_file)
    if not problems:  # a rule that fails asks for no values
        problems += idle_filters(work, rules)
    if not made and not problems:
        problems.append(nothing_matched(work, user_file))
    raise_all(problems)
    gone = tuple(sorted({*dropped.lines, *left_out}))
    return Resolution(made, work.claims.shadowed(made), gone, work.claims.copies(made))


def _no_files(extent: Extent) -> bytes:
    raise MappingError("unreadable-file", "no files can be read here", where=extent.file)


def _taken_back(work: Matching, made: dict[str, Assignment], expectation: Expectation) -> set[tuple[str, str]]:
    """Takes back what rules made and this directory has no place for, by the target's own word; returns of what."""
    left_out = {(source, name) for source, names in expectation.ignored.items() for name in names} - work.matched
    work.matched |= left_out
    outside = [name for name in made if name.startswith(tuple(expectation.left_out))]
    for target in [*(name for name in expectation.tied if name in made), *outside]:
        assignment = made.pop(target, None)
        if assignment is not None and assignment.source:
            left_out.add((assignment.source, assignment.name))
    return left_out - {(assignment.source, assignment.name) for assignment in made.values()}


def _is_dropped(work: Matching, target: str) -> bool:
    """Tells whether a target of an open directory, known only since a source has it, is dropped from there."""
    return any((source, target) in work.gone.lines for source in work.catalogs)


def _double_claim(cases: list[tuple[Assignment, Assignment]]) -> MappingError:
    before, after = cases[0]
    targets = listed([assignment.target for assignment, _ in cases])
    same = before.rule is after.rule
    return MappingError(
        "double-claim",
        f"{'one rule makes the same target name twice' if same else 'two rules claim'}: {targets}",
        where=str(after.rule.mark),
        found=f"{before.source}:{before.name} by `{before.rule.target}` at {before.rule.mark}, and "
        f"{after.source}:{after.name} by `{after.rule.target}`",
        hint=_clash_hint(before.rule, after.rule),
    )


def _clash_hint(before: Rule, after: Rule) -> str:
    if before is after:
        return "let each value of the captures make a name of its own"
    later = "takes only what the others leave"
    if before.optional != after.optional:  # a preset's, and one that was probably meant to replace it
        preset, own = (before, after) if before.optional else (after, before)
        return (
            f"to replace the preset's rule, write its target to the letter: `{preset.target}`; "
            f"or move `{own.target}` under `rest:`, where it {later}"
        )
    if before.rest:
        return "neither is narrower than the other: move one of the two to `tensors:`, which go before `rest:`"
    return f"neither is narrower than the other: move one of the two under `rest:`, where it {later}"
