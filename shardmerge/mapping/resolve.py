"""Rules against catalogs: which source tensor every target name takes. Pure, and order-free but for candidates.

The target pulls: a rule's first candidate that really has a tensor wins. Nothing is left over in silence: every source
tensor is used, shadowed by an earlier candidate, or dropped by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.errors import MappingError, ShardmergeError, TargetError, raise_all
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.spec import Drop, Reference, Rule
from shardmerge.mapping.suggest import drop_lines
from shardmerge.mapping.yaml_nodes import Mark
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
        ``shape-mismatch``, ``nothing-matched``.
    """
    work = _Work(catalogs, expectation, user_file)
    for drop in drops:
        work.drop(drop)
    for rule in rules:
        work.apply(rule)
    work.finish(rules)
    raise_all(work.problems)
    used = {(assignment.source, assignment.name) for assignment in work.assignments.values()}
    shadowed = tuple(case for case in work.shadowed if case[:2] not in used)
    return Resolution(work.assignments, shadowed, tuple(sorted(work.dropped)))


@dataclass(slots=True)
class _Work:
    """A resolution in the making."""

    catalogs: Mapping[str, Catalog]
    expectation: Expectation | None
    user_file: str
    assignments: dict[str, Assignment] = field(default_factory=dict)
    shadowed: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: set[tuple[str, str]] = field(default_factory=set)
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    matched: set[tuple[str, str]] = field(default_factory=set)
    problems: list[ShardmergeError] = field(default_factory=list)
    claimed_by: dict[str, Reference] = field(default_factory=dict)
    clashes: dict[tuple[Mark, Mark], list[tuple[Assignment, Assignment]]] = field(default_factory=dict)
    placeholders: dict[str, str] = field(default_factory=dict)
    idle: list[Rule] = field(default_factory=list)
    indexes: dict[str, NameIndex] = field(default_factory=dict)

    def near(self, source: str, word: str) -> str:
        """Returns a hint with the names of a source that are like a word."""
        if source not in self.catalogs:  # declared `required: false`, and not there
            return ""
        if source not in self.indexes:
            self.indexes[source] = NameIndex(self.catalogs[source].names())
        found = self.indexes[source].near(word)
        return "near names: " + ", ".join(f"{source}:{name}" for name in found) if found else ""

    def drop(self, drop: Drop) -> None:
        """Sets aside what a drop matches; one of the user's own must match something."""
        catalog = self.catalogs.get(drop.source)
        if catalog is None:
            return
        names = [name for name in catalog.names() if drop.template.match(name) is not None]
        self.dropped.update((drop.source, name) for name in names)
        if not names and not drop.optional:
            what = f"the drop `{drop.source}:{drop.template}` matches no tensor"
            hint = self.near(drop.source, drop.template.text) or "remove the line"
            self.problems.append(MappingError("drop-matches-nothing", what, where=str(drop.mark), hint=hint))

    def apply(self, rule: Rule) -> None:
        """The first candidate that has a tensor wins, the later ones are shadowed by it."""
        found = False
        for reference in rule.candidates:
            template = reference.template
            check = not rule.target.surely_fits(template)
            # Most names fail at once: the inline test saves a call for each of them.
            for name in [name for name in self._names(reference.source) if name.startswith(template.head)]:
                bindings = template.match(name)
                if bindings is None or (check and not rule.target.fits(bindings)):
                    continue
                found = True
                self._claim(rule, reference, name, rule.target.format(bindings))
        if not found:
            self.idle.append(rule)

    def _names(self, source: str) -> Sequence[str]:
        """Returns the names of a source that are not dropped; asked for once all drops are known."""
        if source not in self.names:
            catalog = self.catalogs.get(source)
            every = catalog.names() if catalog else ()
            self.names[source] = [name for name in every if (source, name) not in self.dropped]
        return self.names[source]

    def _claim(self, rule: Rule, reference: Reference, name: str, target: str) -> None:
        self.matched.add((reference.source, name))
        before = self.assignments.get(target)
        if before is None:
            if self._is_placeholder(reference.source, name, target):
                self.placeholders[target] = f"{reference.source}:{name}"
                return
            self.assignments[target] = Assignment(target, reference.source, name, rule)
            self.claimed_by[target] = reference
        elif before.rule is rule and self.claimed_by[target] is not reference:
            self.shadowed.append((reference.source, name, target))
        else:  # another rule's target, or two names that one candidate makes into one
            claim = Assignment(target, reference.source, name, rule)
            self.clashes.setdefault((before.rule.mark, rule.mark), []).append((before, claim))

    def _is_placeholder(self, source: str, name: str, target: str) -> bool:
        """A tensor without elements does not count where the target wants some."""
        wanted = self.expectation.tensors.get(target) if self.expectation else None
        return wanted is not None and self.catalogs[source][name].numel == 0 and prod(wanted) > 0

    def finish(self, rules: Sequence[Rule]) -> None:
        """Checks what is left over on either side."""
        self.problems += map(_double_claim, self.clashes.values())
        adapters = self._adapters()
        if adapters:
            self.problems += [
                _adapter_error(source, names, self.catalogs[source]) for source, names in adapters.items()
            ]
            return  # everything else follows from it
        missing: list[str] = []
        if self.expectation is not None:
            self._drop_tied(self.expectation)
            missing = [name for name in self.expectation.tensors if name not in self.assignments]
            self.problems += self._missing(self.expectation, missing, rules)
            self.problems += self._unexpected(self.expectation)
            self.problems += self._misshapen(self.expectation)
        self.problems += self._idle_rules(missing)
        self.problems += self._unmatched()
        if not self.assignments and not self.problems:
            hint = "`shardmerge inspect` shows what a source holds"
            self.problems.append(
                MappingError("nothing-matched", "no tensor of any source is used", where=self.user_file, hint=hint)
            )

    def _adapters(self) -> dict[str, list[str]]:
        """Returns the adapter tensors by source: those no rule uses, and those the target has no place for."""
        pairs = self._left_over()
        if self.expectation is not None:
            made = ((a.source, a.name) for t, a in self.assignments.items() if t not in self.expectation.tensors)
            pairs = [*pairs, *made]
        found: dict[str, list[str]] = defaultdict(list)
        for source, name in pairs:
            if _is_adapter(name):
                found[source].append(name)
        return found

    def _left_over(self) -> list[tuple[str, str]]:
        everything = ((source, name) for source, catalog in self.catalogs.items() for name in catalog.names())
        return [pair for pair in everything if pair not in self.matched and pair not in self.dropped]

    def _drop_tied(self, expectation: Expectation) -> None:
        for target in expectation.tied:
            assignment = self.assignments.pop(target, None)
            if assignment is not None:
                self.dropped.add((assignment.source, assignment.name))

    def _missing(
        self, expectation: Expectation, left: Sequence[str], rules: Sequence[Rule]
    ) -> Iterator[ShardmergeError]:
        for component in expectation.components:
            own = [name for name in left if name.startswith(component.prefix)]
            whole = sum(name.startswith(component.prefix) for name in expectation.tensors)
            if own and len(own) == whole:
                yield _missing_component(component, len(own), self.user_file)
                left = [name for name in left if not name.startswith(component.prefix)]
        if left:
            looked_for = _looked_for(left[0], rules)
            words = [*looked_for, *((source, _leaf(left[0])) for source in self.catalogs)]
            hints = (hint for source, word in words if (hint := self.near(source, word)))
            empty = [self.placeholders[name] for name in left if name in self.placeholders]
            yield TargetError(
                "missing-tensor",
                f"{count(len(left), 'tensor')} of the target without a source: {listed(left)}",
                where=self.user_file,
                found=f"placeholders without data: {listed(empty)}" if empty else "",
                expected=" or ".join(f"{source}:{name}" for source, name in looked_for),
                hint=next(hints, "add a source that has them, or a rule that names them"),
            )

    def _unexpected(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        extra: dict[tuple[Mark, str], list[Assignment]] = defaultdict(list)
        for name, assignment in self.assignments.items():
            if name not in expectation.tensors:
                extra[assignment.rule.mark, assignment.source].append(assignment)
        index = NameIndex(expectation.tensors)
        for (mark, source), cases in extra.items():
            lines = drop_lines(source, [a.name for a in cases], self._used(source, without=cases))
            near = index.near(cases[0].target)
            yield TargetError(
                "unexpected-target",
                f"{count(len(cases), 'tensor')} that the target does not have: {listed([a.target for a in cases])}",
                where=str(mark),
                found=f"{source}:{cases[0].name}",
                expected=f"names such as {', '.join(near)}" if near else "",
                hint=f"if not wanted, add under `drop:` {_ticked(lines)}",
            )

    def _misshapen(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        wrong: dict[str, list[tuple[Assignment, Shape, Shape]]] = defaultdict(list)
        for name, assignment in self.assignments.items():
            wanted = expectation.tensors.get(name)
            shape = self.catalogs[assignment.source][assignment.name].shape
            if wanted is not None and not _fits(shape, wanted, grown=name in expectation.grown):
                wrong[assignment.source].append((assignment, shape, wanted))
        for source, cases in wrong.items():
            targets = listed([assignment.target for assignment, _, _ in cases])
            yield TargetError(
                "shape-mismatch",
                f"{count(len(cases), 'tensor')} of {source} in another shape than the target's config says: {targets}",
                where=str(cases[0][0].rule.mark),
                found=listed([f"{list(shape)} in {source}:{a.name}" for a, shape, _ in cases]),
                expected=listed([str(list(wanted)) for _, _, wanted in cases]),
                hint=f"is `{source}` a base model of another size than the one that was trained?",
            )

    def _idle_rules(self, missing: Sequence[str]) -> Iterator[ShardmergeError]:
        for rule in self.idle:
            if any(rule.target.match(name) is not None for name in missing):
                continue  # the tensors it would have made are already reported missing
            if all(reference.source not in self.catalogs for reference in rule.candidates):
                continue  # the user said that these sources may be absent
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
            lines = _ticked(drop_lines(source, names, self._used(source)))
            yield MappingError(
                "unmatched-source",
                f"no rule uses {count(len(names), 'tensor')} of {source}: {listed(names)}",
                where=self.user_file,
                hint=f"write a rule for them, or add under `drop:` {lines}",
            )

    def _used(self, source: str, without: Collection[Assignment] = ()) -> set[str]:
        """Returns the names of a source that rules match, but for those of some assignments."""
        return {name for owner, name in self.matched if owner == source} - {a.name for a in without}


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
        hint="let each value of the captures make a name of its own"
        if same
        else "make it one rule with an ordered list of candidates, or narrow one of the two",
    )


def _looked_for(target: str, rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """Returns where the rules would have taken a target name from."""
    found = []
    for rule in rules:
        bindings = rule.target.match(target)
        if bindings is not None:
            found += [(r.source, r.template.format(bindings)) for r in rule.candidates if r.template.fits(bindings)]
    return found


def _ticked(lines: Sequence[str]) -> str:
    return " and ".join(f"`{line}`" for line in lines)


def _adapter_error(source: str, names: list[str], catalog: Catalog) -> MappingError:
    return MappingError(
        "lora-not-yet",
        f"{source} holds {count(len(names), 'LoRA tensor')}, which this version does not merge: {listed(names, 3)}",
        where=catalog.path,
        hint="merge the adapter into its base with peft's merge_and_unload first, then convert the result",
    )


def _missing_component(component: Component, number: int, file: str) -> TargetError:
    reason = f": {component.reason}" if component.reason else ""
    return TargetError(
        "missing-component",
        f"{number} tensors of {component.prefix}* have no source{reason}",
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
