"""What rules make, against what the target must hold: what it lacks, what it has no place for, other shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shardmerge.errors import TargetError
from shardmerge.mapping.matching import Matching
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.refusals import Misfit, placeholder_hint, shape_hint
from shardmerge.mapping.resolution import Assignment
from shardmerge.mapping.spec import Rule, references
from shardmerge.mapping.suggest import drop_lines, ticked
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.targets.expectation import Component, Expectation, Resize
from shardmerge.tensors import Shape

_TAKE_BACK = "the target cannot do without them: take that line out of `drop`"


def missing_tensors(
    work: Matching, expectation: Expectation, left: Sequence[str], rules: Sequence[Rule], where: str
) -> Iterator[TargetError]:
    """Yields an error for each whole component that has no source, and one for what is ``left`` besides."""
    for component in expectation.components:
        own = [name for name in left if name.startswith(component.prefix)]
        whole = sum(name.startswith(component.prefix) for name in expectation.tensors)
        if own and len(own) == whole and work.placeholders.keys().isdisjoint(own):
            yield _missing_component(component, len(own), where, _taken_away(work, own[0], rules))
            left = [name for name in left if not name.startswith(component.prefix)]
    if left:
        looked_for = _looked_for(left[0], rules)
        words = [*looked_for, *((source, _leaf(left[0])) for source in work.catalogs)]
        hints = (hint for source, word in words if (hint := work.near(source, word)))
        empty = {work.placeholders[name]: None for name in left if name in work.placeholders}
        hollow = next((placeholder_hint(work.catalogs[source]) for source, _ in empty), "")
        said = _taken_away(work, left[0], rules)
        taken_away = _TAKE_BACK if said else ""
        yield TargetError(
            "missing-tensor",
            f"{count(len(left), 'tensor')} of the target without a source: {listed(left)}",
            where=where,
            found=f"placeholders without data: {listed([':'.join(one) for one in empty])}" if empty else said,
            expected=" or ".join(f"{source}:{name}" for source, name in looked_for),
            hint=hollow or taken_away or next(hints, "add a source that has them, or a rule that names them"),
        )


def _taken_away(work: Matching, target: str, rules: Sequence[Rule]) -> str:
    """Returns which line under ``drop:`` takes the tensor away that would have made a target, or nothing."""
    return next((said for one in _looked_for(target, rules) if (said := work.gone.said(*one))), "")


def unexpected_targets(
    work: Matching, made: Mapping[str, Assignment], expectation: Expectation
) -> Iterator[TargetError]:
    """Yields by rule and source the targets that are made and that the directory does not have."""
    extra: dict[tuple[Mark, str], list[Assignment]] = defaultdict(list)
    for name, assignment in made.items():
        if name not in expectation.tensors and not expectation.open:
            extra[assignment.rule.mark, assignment.source].append(assignment)
    index = NameIndex(expectation.tensors)
    for (mark, source), cases in extra.items():
        lines = drop_lines(source, [a.name for a in cases], work.used(source, without=cases)) if source else []
        near = index.near(cases[0].target)
        yield TargetError(
            "unexpected-target",
            f"{count(len(cases), 'tensor')} that the target does not have: {listed([a.target for a in cases])}",
            where=str(mark),
            found=f"{source}:{cases[0].name}" if source else "",
            expected=f"names such as {', '.join(near)}" if near else "",
            hint=_unwanted_hint(lines, cases, made.values()),
        )


def misshapen(made: Mapping[str, Assignment], expectation: Expectation) -> Iterator[TargetError]:
    """Yields by source the targets of another shape than the directory has, where no rows are added or cut off."""
    wrong: dict[str, list[tuple[Assignment, Misfit]]] = defaultdict(list)
    for name, assignment in made.items():
        wanted = expectation.tensors.get(name)
        shape = assignment.entry.shape
        if wanted is not None and not _fits(shape, wanted, expectation.resized.get(name)):
            wrong[assignment.source].append((assignment, Misfit(name, assignment.name, shape, wanted)))
    for source, cases in wrong.items():
        misfits = [one for _, one in cases]
        targets = listed([one.target for one in misfits])
        yield TargetError(
            "shape-mismatch",
            f"{count(len(cases), 'tensor')} of {source} in another shape than the target's config says: {targets}",
            where=str(cases[0][0].rule.mark),
            found=listed([f"{list(one.shape)} in {source}:{one.name}" for one in misfits]),
            expected=listed([str(list(one.wanted)) for one in misfits]),
            hint=shape_hint(misfits, source),
        )


def _unwanted_hint(lines: list[str], cases: list[Assignment], every: Iterable[Assignment]) -> str:
    """A tensor that makes a wanted target too must not be dropped: it is the rule that is one too many."""
    unwanted = {case.target for case in cases}
    elsewhere = {(one.source, one.name) for one in every if one.target not in unwanted}
    if not lines or any((case.source, case.name) in elsewhere for case in cases):
        return f"remove the rule `{cases[0].rule.target}`"
    return f"if not wanted, add under `drop:` {ticked(lines)}"


def _looked_for(target: str, rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """Returns where the rules would have taken a target name from."""
    found = []
    for rule in rules:
        bindings = rule.target.match(target)
        if bindings is None:
            continue
        for reference in (one for candidate in rule.candidates for one in references(candidate)):
            template = reference.template
            if set(template.captures) <= set(bindings) and template.fits(bindings):
                found.append((reference.source, template.format(bindings)))
    return found


def _missing_component(component: Component, number: int, file: str, taken_away: str) -> TargetError:
    reason = f": {component.reason}" if component.reason else ""
    return TargetError(
        "missing-component",
        f"{number} tensors of {component.prefix}* have no source{reason}",
        where=file,
        found=taken_away,
        hint=_TAKE_BACK if taken_away else component.remedy,
    )


def _fits(shape: Shape, wanted: Shape, resize: Resize | None) -> bool:
    if shape == wanted:
        return True
    if resize is None or len(shape) != len(wanted) or not shape or shape[1:] != wanted[1:]:
        return False
    return 0 < shape[0] < wanted[0] or (resize.trim and shape[0] > wanted[0])


def _leaf(name: str) -> str:
    """The part of a name that two layouts are most likely to share."""
    return ".".join(name.split(".")[-4:])
