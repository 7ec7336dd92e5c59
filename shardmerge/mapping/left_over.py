"""What is left over of the sources once all rules are put to them. Nothing is left over in silence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.absent import unfilled
from shardmerge.mapping.matching import Matching
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.refusals import packed_error, placeholder_error
from shardmerge.mapping.resolution import Assignment
from shardmerge.mapping.spec import Reference, Rule, ops_of, references
from shardmerge.mapping.suggest import drop_lines, ticked
from shardmerge.shown import inspecting

# How peft spells what belongs to an adapter and not to a model.
_ADAPTER = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector", ".modules_to_save.", ".base_layer.")


def idle_drops(work: Matching) -> Iterator[ShardmergeError]:
    """Yields an error for each of the user's drops that matches no tensor."""
    for drop in work.gone.idle:
        what = f"the drop `{drop.source}:{drop.template}` matches no tensor"
        hint = work.near(drop.source, drop.template.text) or "remove the line"
        yield MappingError("drop-matches-nothing", what, where=str(drop.mark), hint=hint)


def unfilled_targets(
    work: Matching, made: Mapping[str, Assignment], rules: Sequence[Rule]
) -> Iterator[ShardmergeError]:
    """Yields placeholders that no other source stands in for. What a closed target lacks is reported with its names."""
    lacking: dict[str, list[str]] = defaultdict(list)
    wanted = work.expectation.tensors if work.expectation and not work.expectation.open else None
    made_by = {target: one.term for target, one in made.items()}
    for case in unfilled(rules, work.catalogs, made_by):
        if case.target in work.failed or (wanted is not None and case.target not in wanted):
            continue
        work.placeholders.setdefault(case.target, (case.source, case.name))
        if wanted is None or case.target in made:
            lacking[case.source].append(case.name)
    for source, names in lacking.items():
        once, droppable = list(dict.fromkeys(names)), work.expectation is None
        yield placeholder_error(source, once, work.catalogs[source], droppable=droppable)


def unmerged_adapters(work: Matching, made: Mapping[str, Assignment]) -> Iterator[ShardmergeError]:
    """Yields adapter tensors by source: those that no rule uses, and those that the target has no place for."""
    pairs = _left_over(work)
    if work.expectation is not None and not work.expectation.open:
        placeless, told = made.keys() - work.expectation.tensors.keys(), tuple(work.expectation.left_out)
        pairs += [(a.source, a.name) for t, a in made.items() if t in placeless and not t.startswith(told)]
    theirs = work.expectation.ignored if work.expectation is not None else {}
    ignored = {(source, name) for source, names in theirs.items() for name in names}
    found: dict[str, list[str]] = defaultdict(list)
    for source, name in pairs:
        if _is_adapter(name) and (source, name) not in ignored:
            found[source].append(name)
    for source, names in found.items():
        yield MappingError(
            "unmerged-adapter",
            f"{source} holds {count(len(names), 'adapter tensor')} that are merged into no base: {listed(names, 3)}",
            where=work.catalogs[source].path,
            hint=f"to merge it, add `adapters: [{{from: {source}, onto: BASE}}]`, BASE being what it was trained on",
        )


def packed_operands(work: Matching) -> Iterator[ShardmergeError]:
    """Yields the packed weights by source that rules take for numbers."""
    purpose = "an op" if work.expectation is None or work.expectation.open else "the target"
    for source, (mark, names) in work.quantized.items():
        yield packed_error(source, list(names), work.packed_in(source), work.used(source), mark, purpose)


def _left_over(work: Matching) -> list[tuple[str, str]]:
    everything = ((source, name) for source, catalog in work.catalogs.items() for name in catalog.names())
    settled = work.matched | work.merged
    return [pair for pair in everything if pair not in settled]


def idle_rules(work: Matching, missing: Sequence[str]) -> Iterator[ShardmergeError]:
    """Yields the rules that match nothing, but for those whose targets are reported ``missing`` already."""
    for rule in work.idle:
        if any(rule.target.match(name) is not None for name in missing):
            continue  # the tensors it would have made are already reported missing
        named = [reference for candidate in rule.candidates for reference in references(candidate)]
        if rule.optional or not named or all(reference.source not in work.catalogs for reference in named):
            continue  # a preset's, or the user said that these sources may be absent
        if rule.rest and any(
            r.source == source and r.template.match(name) for r in named for source, name in work.spent
        ):
            continue  # nothing was left for it, and that is what `rest` is for
        yield MappingError(
            "rule-matches-nothing",
            f"no source tensor matches the rule for `{rule.target}`",
            where=str(rule.mark),
            found=", ".join(f"`{r.source}:{r.template}`" for r in named),
            hint=_idle_hint(work, named),
        )


def idle_filters(work: Matching, rules: Sequence[Rule]) -> Iterator[MappingError]:
    """Yields the filters of settings that decide for no tensor."""
    terms = (term for rule in rules if not rule.optional for term in rule.candidates)
    for op in (one for term in terms for one in ops_of(term)):
        for case in (case for one in op.arguments.values() for setting in one.settings for case in setting.cases):
            if case.filter and id(case) not in work.used_cases:
                yield MappingError(
                    "no-effect",
                    f"the filter `{case.filter}` applies to no tensor",
                    where=str(case.mark),
                    hint="write a part of a target's name, or move the line before a filter that takes its tensors",
                )


def _idle_hint(work: Matching, named: Sequence[Reference]) -> str:
    first = named[0]
    for one in named:
        mine = sorted(name for source, name in work.merged if source == one.source)
        gone = next((name for name in mine if one.template.match(name) is not None), "")
        if gone:
            if gone in work.catalogs[one.source]:
                text = f"`adapters:` merges {one.source}:{gone} into its base"
                return f"{text}: remove this rule, or take the base's tensor"
            return f"{one.source}:{gone} is part of the dequantized weight by now: remove this rule"
        lines = (pair for pair in work.gone.lines if pair[0] == one.source)
        lost = next((pair for pair in lines if one.template.match(pair[1]) is not None), None)
        if lost is not None:
            return f"{one.source}:{lost[1]} is {work.gone.said(*lost)}: remove this rule, or that line"
    return work.near(first.source, first.template.text) or _listing(work, first.source)


def _listing(work: Matching, source: str) -> str:
    """Returns a hint with the command that lists the names of a source."""
    return f"{inspecting(work.catalogs[source].path)} lists the names" if source in work.catalogs else ""


def unmatched(work: Matching, where: str) -> Iterator[ShardmergeError]:
    """Yields the tensors by source that no rule uses."""
    groups: dict[str, list[str]] = defaultdict(list)
    for source, name in _left_over(work):
        groups[source].append(name)
    for source, names in groups.items():
        lines = ticked(drop_lines(source, names, work.used(source)))
        yield MappingError(
            "unmatched-source",
            f"no rule uses {count(len(names), 'tensor')} of {source}: {listed(names)}",
            where=where,
            hint=f"write a rule for them, or add under `drop:` {lines}",
        )


def nothing_matched(work: Matching, where: str) -> MappingError:
    """Returns the error for a mapping that uses no tensor at all."""
    named = (one.source for rule in work.idle for term in rule.candidates for one in references(term))
    away = next((source for source in named if source not in work.catalogs), "")  # declared `required: false`
    hint = f"there is no `{away}`: correct its path under `sources:`" if away else ""
    return MappingError("nothing-matched", "no tensor of any source is used", where=where, hint=hint)


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER)
