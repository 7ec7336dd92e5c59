"""Rules against catalogs: which source tensor every target name takes. Pure, and order-free but for candidates.

The target pulls: a rule's first candidate that really has a tensor wins. Nothing is left over in silence: every source
tensor is used, shadowed by an earlier candidate, or dropped by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.errors import MappingError, ShardmergeError, TargetError, raise_all
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.spec import Drop, Reference, Rule
from shardmerge.targets.expectation import Component, Expectation
from shardmerge.tensors import Catalog, Shape

# How peft spells what belongs to an adapter and not to a model.
_ADAPTER = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector", ".modules_to_save.", ".base_layer.")


@dataclass(frozen=True, slots=True)
class Assignment:
    """A target name and the source tensor it is made of; ``name`` may be an alias."""

    target: str
    source: str
    name: str
    rule: Rule


@dataclass(frozen=True, slots=True)
class Resolution:
    """All assignments by target name, and the source tensors that are not in the output.

    Attributes
    ----------
    shadowed
        (source, name, target): an earlier candidate has the tensor.
    dropped
        (source, name).
    """

    assignments: dict[str, Assignment]
    shadowed: tuple[tuple[str, str, str], ...]
    dropped: tuple[tuple[str, str], ...]


def resolve(
    rules: Sequence[Rule],
    drops: Sequence[Drop],
    catalogs: Mapping[str, Catalog],
    expectation: Expectation | None = None,
    *,
    user_file: str,
) -> Resolution:
    """Returns which source tensor every target takes.

    Parameters
    ----------
    rules, drops
        Of the spec, presets included.
    catalogs
        By source name.
    expectation
        What the target must hold; None if the mapping alone decides.
    user_file
        The mapping, for messages that have no line of their own.

    Raises
    ------
    ShardmergeError
        All problems at once: ``double-claim``, ``rule-matches-nothing``, ``drop-matches-nothing``,
        ``unmatched-source``, ``lora-not-yet``, ``missing-component``, ``missing-tensor``, ``unexpected-target``,
        ``shape-mismatch``.
    """
    work = _Work(catalogs, expectation, user_file)
    for drop in drops:
        work.drop(drop)
    for rule in rules:
        work.apply(rule)
    work.finish(rules)
    raise_all(work.problems)
    return Resolution(work.assignments, tuple(work.shadowed), tuple(sorted(work.dropped)))


@dataclass(slots=True)
class _Work:
    """A resolution in the making."""

    catalogs: Mapping[str, Catalog]
    expectation: Expectation | None
    user_file: str
    assignments: dict[str, Assignment] = field(default_factory=dict)
    shadowed: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: set[tuple[str, str]] = field(default_factory=set)
    matched: set[tuple[str, str]] = field(default_factory=set)
    problems: list[ShardmergeError] = field(default_factory=list)
    idle: list[Rule] = field(default_factory=list)
    indexes: dict[str, NameIndex] = field(default_factory=dict)

    def near(self, source: str, word: str) -> str:
        """Returns a hint with the names of a source that are like a word."""
        index = self.indexes.setdefault(source, NameIndex(self.catalogs[source].names()))
        found = index.near(word)
        return "near names: " + ", ".join(f"{source}:{name}" for name in found) if found else ""

    def drop(self, drop: Drop) -> None:
        names = [name for name in self.catalogs[drop.source].names() if drop.template.match(name) is not None]
        self.dropped.update((drop.source, name) for name in names)
        if not names and not drop.optional:
            what = f"the drop `{drop.source}:{drop.template}` matches no tensor"
            hint = self.near(drop.source, drop.template.text) or "remove the line"
            self.problems.append(MappingError("drop-matches-nothing", what, where=str(drop.mark), hint=hint))

    def apply(self, rule: Rule) -> None:
        """The first candidate that has a tensor wins, the later ones are shadowed by it."""
        found = False
        for reference in rule.candidates:
            for name in self._names(reference.source):
                bindings = reference.template.match(name)
                if bindings is None or not rule.target.fits(bindings):
                    continue
                found = True
                self._claim(rule, reference, name, rule.target.format(bindings))
        if not found:
            self.idle.append(rule)

    def _names(self, source: str) -> Iterator[str]:
        catalog = self.catalogs.get(source)
        for name in catalog.names() if catalog else ():
            if (source, name) not in self.dropped:
                yield name

    def _claim(self, rule: Rule, reference: Reference, name: str, target: str) -> None:
        self.matched.add((reference.source, name))
        before = self.assignments.get(target)
        if before is None:
            if not self._is_placeholder(reference.source, name, target):
                self.assignments[target] = Assignment(target, reference.source, name, rule)
        elif before.rule is rule and self._is_later(rule, before, reference):
            self.shadowed.append((reference.source, name, target))
        else:
            self.problems.append(_double_claim(before, rule, reference.source, name))

    def _is_later(self, rule: Rule, before: Assignment, reference: Reference) -> bool:
        """Two names of one candidate on one target are a clash; an earlier candidate's claim wins."""
        first = next(r for r in rule.candidates if r.source == before.source and r.template.match(before.name) is not None)
        return first is not reference

    def _is_placeholder(self, source: str, name: str, target: str) -> bool:
        """A tensor without elements does not count where the target wants some."""
        entry = self.catalogs[source][name]
        wanted = self.expectation.tensors.get(target) if self.expectation else None
        return entry.numel == 0 and wanted is not None and prod(wanted) > 0

    def finish(self, rules: Sequence[Rule]) -> None:
        """Checks what is left over on either side."""
        adapters = [pair for pair in self._left_over() if _is_adapter(pair[1])]
        if adapters:
            self.problems.append(_adapters(adapters, self.catalogs))
            return  # everything else follows from it
        if self.expectation is not None:
            self._drop_tied(self.expectation)
            self.problems += self._missing(self.expectation)
            self.problems += self._unexpected(self.expectation)
            self.problems += self._misshapen(self.expectation)
        self.problems += self._idle_rules(rules)
        self.problems += self._unmatched()

    def _left_over(self) -> list[tuple[str, str]]:
        everything = ((source, name) for source, catalog in self.catalogs.items() for name in catalog.names())
        return [pair for pair in everything if pair not in self.matched and pair not in self.dropped]

    def _drop_tied(self, expectation: Expectation) -> None:
        for target in expectation.tied:
            assignment = self.assignments.pop(target, None)
            if assignment is not None:
                self.dropped.add((assignment.source, assignment.name))

    def _missing(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        left = [name for name in expectation.tensors if name not in self.assignments]
        for component in expectation.components:
            own = [name for name in left if name.startswith(component.prefix)]
            whole = sum(name.startswith(component.prefix) for name in expectation.tensors)
            if own and len(own) == whole:
                yield _missing_component(component, len(own), self.user_file)
                left = [name for name in left if not name.startswith(component.prefix)]
        if left:
            hints = [hint for source in self.catalogs if (hint := self.near(source, _leaf(left[0])))]
            yield TargetError(
                "missing-tensor",
                f"{count(len(left), 'tensor')} of the target have no source: {listed(left)}",
                where=self.user_file,
                hint=hints[0] if hints else "add a source that has them, or a rule that names them",
            )

    def _unexpected(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        extra = [a for name, a in self.assignments.items() if name not in expectation.tensors]
        if extra:
            first = extra[0]
            yield TargetError(
                "unexpected-target",
                f"{count(len(extra), 'tensor')} are not part of the target: {listed([a.target for a in extra])}",
                where=str(first.rule.mark),
                found=f"{first.source}:{first.name}",
                hint=f"if they are not wanted, add under `drop:`: `- {first.source}:{_pattern([a.name for a in extra])}`",
            )

    def _misshapen(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        wrong: dict[str, list[tuple[Assignment, Shape, Shape]]] = defaultdict(list)
        for name, assignment in self.assignments.items():
            wanted = expectation.tensors.get(name)
            shape = self.catalogs[assignment.source][assignment.name].shape
            if wanted is not None and not _fits(shape, wanted, grown=name in expectation.grown):
                wrong[assignment.source].append((assignment, shape, wanted))
        for source, cases in wrong.items():
            first, shape, wanted = cases[0]
            more = f" (and {len(cases) - 1} more of this source)" if len(cases) > 1 else ""
            yield TargetError(
                "shape-mismatch",
                f"{first.target} has another shape than the target's config implies{more}",
                where=str(first.rule.mark),
                found=f"{list(shape)} in {source}:{first.name}",
                expected=f"{list(wanted)}",
                hint="is it a base model of another size than the one that was trained?",
            )

    def _idle_rules(self, rules: Sequence[Rule]) -> Iterator[ShardmergeError]:
        for rule in self.idle:
            if self.expectation is not None and self.problems:
                continue  # the tensors it would have made are already reported missing
            first = rule.candidates[0]
            yield MappingError(
                "rule-matches-nothing",
                f"no source tensor matches the rule for `{rule.target}`",
                where=str(rule.mark),
                found=", ".join(f"`{r.source}:{r.template}`" for r in rule.candidates),
                hint=self.near(first.source, first.template.text) or "shardmerge inspect shows the names",
            )

    def _unmatched(self) -> Iterator[ShardmergeError]:
        groups: dict[str, list[str]] = defaultdict(list)
        for source, name in self._left_over():
            groups[source].append(name)
        for source, names in groups.items():
            lines = " and ".join(f"`- {source}:{pattern}`" for pattern in _patterns(names))
            yield MappingError(
                "unmatched-source",
                f"no rule uses {count(len(names), 'tensor')} of {source}: {listed(names)}",
                where=self.user_file,
                hint=f"write a rule for them, or add under `drop:` {lines}",
            )


def _double_claim(before: Assignment, rule: Rule, source: str, name: str) -> MappingError:
    return MappingError(
        "double-claim",
        f"two rules claim {before.target}",
        where=str(rule.mark),
        found=f"{before.source}:{before.name} by `{before.rule.target}` at {before.rule.mark}, and "
        f"{source}:{name} by `{rule.target}`",
        hint="make it one rule with an ordered list of candidates, or narrow one of the two",
    )


def _adapters(pairs: list[tuple[str, str]], catalogs: Mapping[str, Catalog]) -> MappingError:
    source = pairs[0][0]
    return MappingError(
        "lora-not-yet",
        f"{source} holds {count(len(pairs), 'LoRA tensor')}, which this version does not merge: "
        f"{listed([name for _, name in pairs], 3)}",
        where=catalogs[source].path,
        hint="merge the adapter into its base with peft's merge_and_unload first, then convert the result",
    )


def _missing_component(component: Component, number: int, file: str) -> TargetError:
    reason = f": {component.reason}" if component.reason else ""
    return TargetError(
        "missing-component",
        f"{number} tensors of {component.prefix}* have no source{reason}. {component.remedy}",
        where=file,
        hint=component.remedy,
    )


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER)


def _fits(shape: Shape, wanted: Shape, *, grown: bool) -> bool:
    if shape == wanted:
        return True
    return grown and len(shape) == len(wanted) and shape[1:] == wanted[1:] and 0 < shape[0] < wanted[0]


def _leaf(name: str) -> str:
    """The part of a name that two layouts are most likely to share."""
    return ".".join(name.split(".")[-4:])


def _patterns(names: list[str], most: int = 3) -> list[str]:
    """Returns templates that cover the names, one for each first segment, a few at most."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.split(".")[0]].append(name)
    if len(groups) > most:
        return [_pattern(group) for group in list(groups.values())[:most]]
    return [_pattern(group) for group in groups.values()]


def _pattern(names: list[str]) -> str:
    """Returns a template for names: the segments they share at the start, then the rest."""
    if len(names) == 1:
        return names[0].replace("{", "{{").replace("}", "}}")
    shared = []
    for segments in zip(*(name.split(".") for name in names), strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join([*shared, "{rest...}"])
