"""Rules against catalogs: which source tensor every target name takes. Pure, and order-free but for candidates.

The target pulls: a rule's first candidate that really has a tensor wins, and of two rules for a name the narrower one.
Rules of ``rest:`` come last and take what the others left. Nothing is left over in silence: every source tensor is
used, shadowed, or dropped by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.errors import MappingError, ShardmergeError, TargetError, raise_all
from shardmerge.mapping.absent import unfilled
from shardmerge.mapping.claims import Claim, Claims
from shardmerge.mapping.dropping import Dropped
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.refusals import Misfit, packed_error, placeholder_error, placeholder_hint, shape_hint
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import OpTerm, Reference, Rule, Term, dequantized_by, references
from shardmerge.mapping.suggest import drop_lines
from shardmerge.mapping.terms import Bindings, Finder, Operand
from shardmerge.mapping.variables import Variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.shown import inspecting
from shardmerge.targets.expectation import Component, Expectation, Resize
from shardmerge.tensors import Catalog, Extent, Shape, TensorEntry, of_source
from shardmerge.tensors.packed import Packed, packed_weights

# How peft spells what belongs to an adapter and not to a model.
_TAKE_BACK = "the target cannot do without them: take that line out of `drop`"
_ADAPTER = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector", ".modules_to_save.", ".base_layer.")


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
    work = _Work(dropped.left(catalogs), dropped, expectation, user_file, known, merged=frozenset(merged))
    for rule in (one for one in rules if not one.rest):
        work.apply(rule)
    work.spent = frozenset(work.matched)
    for rule in (one for one in rules if one.rest):
        work.apply(rule)
    work.finish(rules)
    raise_all(work.problems)
    return Resolution(
        work.assignments,
        work.claims.shadowed(work.assignments),
        tuple(sorted({*dropped.lines, *work.left_out})),
        work.claims.copies(work.assignments),
    )


def _no_files(extent: Extent) -> bytes:
    raise MappingError("unreadable-file", "no files can be read here", where=extent.file)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A target that an op cannot make."""

    term: OpTerm
    target: str
    error: MappingError
    operands: Sequence[Operand] = ()


@dataclass(slots=True)
class _Work:
    """A resolution in the making."""

    catalogs: Mapping[str, Catalog]
    gone: Dropped
    expectation: Expectation | None
    user_file: str
    variables: Variables
    merged: frozenset[tuple[str, str]] = frozenset()
    spent: frozenset[tuple[str, str]] = frozenset()
    claims: Claims = field(default_factory=Claims)
    assignments: dict[str, Assignment] = field(default_factory=dict)
    left_out: set[tuple[str, str]] = field(default_factory=set)
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    matched: set[tuple[str, str]] = field(default_factory=set)
    problems: list[ShardmergeError] = field(default_factory=list)
    placeholders: dict[str, tuple[str, str]] = field(default_factory=dict)
    idle: list[Rule] = field(default_factory=list)
    indexes: dict[str, NameIndex] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    packed: dict[str, dict[str, Packed]] = field(default_factory=dict)
    quantized: dict[str, tuple[Mark, dict[str, None]]] = field(default_factory=dict)
    _finder: Finder | None = None

    def near(self, source: str, word: str) -> str:
        """Returns a hint with the names of a source that are like a word."""
        if source not in self.catalogs:  # declared `required: false`, and not there
            return ""
        if source not in self.indexes:
            self.indexes[source] = NameIndex(self.catalogs[source].names())
        found = self.indexes[source].near(word)
        return "near names: " + ", ".join(f"{source}:{name}" for name in found) if found else ""

    def apply(self, rule: Rule) -> None:
        """The first candidate that has a tensor wins, the later ones are shadowed by it."""
        found = False
        failures: list[_Failure] = []
        for candidate in rule.candidates:
            if isinstance(candidate, Reference):
                found |= self._take(rule, candidate)
            else:
                found |= self._make(rule, candidate, failures)
        # An op that lacks a tensor is passed over where a later candidate makes the target.
        left = [one for one in failures if one.error.code != "missing-operand" or not self.claims.by(rule, one.target)]
        for one in left:  # what the op would have used is not left over besides
            self.failed.add(one.target)
            self.matched.update((operand.source, operand.name) for operand in one.operands)
        self.problems += _failed(rule, left, self.near, self.catalogs)
        if not found:
            self.idle.append(rule)

    def _take(self, rule: Rule, reference: Reference) -> bool:
        """Claims a target for every tensor that the reference matches."""
        found = False
        template = reference.template
        check = not rule.target.surely_fits(template)
        # Most names fail at once: the inline test saves a call for each of them.
        for name in [name for name in self._names(reference.source) if name.startswith(template.head)]:
            bindings = template.match(name)
            if bindings is None or (check and not rule.target.fits(bindings)):
                continue
            found = True
            if rule.rest and (reference.source, name) in self.spent:
                continue
            if self.expectation is not None and not self.expectation.open:
                self._note_packed(rule, [Operand(reference.source, name)])
            entry = of_source(self.catalogs[reference.source][name], reference.source)
            self._claim(rule, reference, self._target(rule, bindings), [Operand(reference.source, name)], entry)
        return found

    def _make(self, rule: Rule, term: OpTerm, failures: list[_Failure]) -> bool:
        """Claims a target for every combination of captures that the op finds its first tensors for."""
        found = False
        for bindings in self._bindings(rule, term, failures):
            if not rule.target.fits(bindings):
                continue
            found = True
            target = self._target(rule, bindings)
            operands = [one for reference in references(term) for one in self.finder.operands(reference, bindings)]
            codes = [one for reference in dequantized_by(term) for one in self.finder.operands(reference, bindings)]
            if self._note_packed(rule, [one for one in operands if one not in codes]):
                continue
            try:
                entry = self.finder.build(term, bindings, target)
            except MappingError as error:
                failures.append(_Failure(term, target, error, operands))
                continue
            self._claim(rule, term, target, operands, entry)
        return found or bool(failures)

    def _note_packed(self, rule: Rule, operands: Sequence[Operand]) -> bool:
        """Remembers the operands that are packed weights, and tells whether there are any."""
        found = [one for one in operands if one.name in self._packed(one.source)]
        for one in found:
            self.quantized.setdefault(one.source, (rule.mark, {}))[1][one.name] = None
            self.matched.add((one.source, one.name))
        return bool(found)

    def _packed(self, source: str) -> dict[str, Packed]:
        if source not in self.packed:
            self.packed[source] = packed_weights(self.catalogs[source])
        return self.packed[source]

    def _bindings(self, rule: Rule, term: OpTerm, failures: list[_Failure]) -> Iterator[Bindings]:
        try:
            yield from self.finder.bindings(rule, term, self.spent if rule.rest else frozenset())
        except MappingError as error:
            failures.append(_Failure(term, str(rule.target), error))

    @property
    def finder(self) -> Finder:
        """Looks operands up."""
        if self._finder is None:
            names = {source: self._names(source) for source in self.catalogs}
            self._finder = Finder(self.catalogs, defaultdict(tuple, names), self.variables, self.gone)
        return self._finder

    def _target(self, rule: Rule, bindings: Bindings) -> str:
        """Returns the target's name. Only formulas look at anything but the bindings."""
        if not rule.target.formulas:
            return rule.target.format(bindings)
        names = {name for formula in rule.target.formulas for name in formula.names}
        known = {name: value for name in names if isinstance(value := self.variables.get(name), int)}
        return rule.target.format(bindings, known)

    def _names(self, source: str) -> Sequence[str]:
        """Returns the names of a source that rules may take: neither dropped nor merged into a base."""
        if source not in self.names:
            catalog = self.catalogs.get(source)
            every = catalog.names() if catalog else ()
            self.names[source] = [name for name in every if (source, name) not in self.merged]
        return self.names[source]

    def _claim(self, rule: Rule, term: Term, target: str, operands: list[Operand], entry: TensorEntry) -> None:
        first = operands[0] if operands else Operand("", "")
        pairs = tuple((one.source, one.name) for one in operands)
        self.matched.update(pairs)
        if self._is_placeholder(entry, target) and not self.claims.by(rule, target):
            self.placeholders[target] = first.source, first.name
            return
        pinned = isinstance(term, OpTerm) and term.kind.name == "cast"
        self.claims.add(Claim(Assignment(target, first.source, first.name, rule, entry, pinned, term), pairs))

    def _is_placeholder(self, entry: TensorEntry, target: str) -> bool:
        """A tensor without elements does not count where the target wants some."""
        wanted = self.expectation.tensors.get(target) if self.expectation else None
        return wanted is not None and entry.numel == 0 and prod(wanted) > 0

    def finish(self, rules: Sequence[Rule]) -> None:
        """Checks what is left over on either side."""
        self.assignments, clashes = self.claims.settled()
        self.problems += map(_double_claim, clashes)
        self.problems += self._idle_drops()
        adapters = self._adapters()
        if adapters:
            self.problems += [
                _adapter_error(source, names, self.catalogs[source]) for source, names in adapters.items()
            ]
            return  # everything else follows from it
        if self.quantized:
            purpose = "an op" if self.expectation is None or self.expectation.open else "the target"
            self.problems += [
                packed_error(source, list(names), self._packed(source), self._used(source), mark, purpose)
                for source, (mark, names) in self.quantized.items()
            ]
            return  # their shapes, and the scales beside them, would only be more of the same
        missing: list[str] = []
        self.problems += self._unfilled(rules)
        if self.expectation is not None:
            self._drop_tied(self.expectation)
            self._leave_out(self.expectation)
            made = self.failed.union(self.assignments)
            missing = [name for name in self.expectation.tensors if name not in made and not self._unwanted(name)]
            self.problems += self._missing(self.expectation, missing, rules)
            self.problems += self._unexpected(self.expectation)
            self.problems += self._misshapen(self.expectation)
        self.problems += self._idle_rules(missing)
        self.problems += self._unmatched()
        if not self.assignments and not self.problems:
            self.problems.append(self._nothing())

    def _nothing(self) -> MappingError:
        named = (one.source for rule in self.idle for term in rule.candidates for one in references(term))
        away = next((source for source in named if source not in self.catalogs), "")  # declared `required: false`
        hint = f"there is no `{away}`: correct its path under `sources:`" if away else ""
        return MappingError("nothing-matched", "no tensor of any source is used", where=self.user_file, hint=hint)

    def _unfilled(self, rules: Sequence[Rule]) -> Iterator[ShardmergeError]:
        """Placeholders that no other source stands in for. What a closed target lacks is reported with its names."""
        lacking: dict[str, list[str]] = defaultdict(list)
        wanted = self.expectation.tensors if self.expectation and not self.expectation.open else None
        made_by = {target: one.term for target, one in self.assignments.items()}
        for case in unfilled(rules, self.catalogs, made_by):
            if case.target in self.failed or (wanted is not None and case.target not in wanted):
                continue
            self.placeholders.setdefault(case.target, (case.source, case.name))
            if wanted is None or case.target in self.assignments:
                lacking[case.source].append(case.name)
        for source, names in lacking.items():
            once, droppable = list(dict.fromkeys(names)), self.expectation is None
            yield placeholder_error(source, once, self.catalogs[source], droppable=droppable)

    def _adapters(self) -> dict[str, list[str]]:
        """Returns the adapter tensors by source: those no rule uses, and those the target has no place for."""
        pairs = self._left_over()
        if self.expectation is not None and not self.expectation.open:
            made = ((a.source, a.name) for t, a in self.assignments.items() if t not in self.expectation.tensors)
            pairs = [*pairs, *made]
        found: dict[str, list[str]] = defaultdict(list)
        for source, name in pairs:
            if _is_adapter(name):
                found[source].append(name)
        return found

    def _left_over(self) -> list[tuple[str, str]]:
        everything = ((source, name) for source, catalog in self.catalogs.items() for name in catalog.names())
        settled = self.matched | self.merged
        return [pair for pair in everything if pair not in settled]

    def _drop_tied(self, expectation: Expectation) -> None:
        for target in expectation.tied:
            assignment = self.assignments.pop(target, None)
            if assignment is not None and assignment.source:
                self.left_out.add((assignment.source, assignment.name))

    def _leave_out(self, expectation: Expectation) -> None:
        """Takes back what rules made and this directory has no place for, by the target's own word."""
        for source, names in expectation.ignored.items():
            ignored = {(source, name) for name in names} - self.matched
            self.left_out |= ignored
            self.matched |= ignored
        for prefix in expectation.left_out:
            for target in [name for name in self.assignments if name.startswith(prefix)]:
                assignment = self.assignments.pop(target)
                self.left_out.add((assignment.source, assignment.name))

    def _missing(
        self, expectation: Expectation, left: Sequence[str], rules: Sequence[Rule]
    ) -> Iterator[ShardmergeError]:
        for component in expectation.components:
            own = [name for name in left if name.startswith(component.prefix)]
            whole = sum(name.startswith(component.prefix) for name in expectation.tensors)
            if own and len(own) == whole and self.placeholders.keys().isdisjoint(own):
                yield _missing_component(component, len(own), self.user_file, self._taken_away(own[0], rules))
                left = [name for name in left if not name.startswith(component.prefix)]
        if left:
            looked_for = _looked_for(left[0], rules)
            words = [*looked_for, *((source, _leaf(left[0])) for source in self.catalogs)]
            hints = (hint for source, word in words if (hint := self.near(source, word)))
            empty = {self.placeholders[name]: None for name in left if name in self.placeholders}
            hollow = next((placeholder_hint(self.catalogs[source]) for source, _ in empty), "")
            said = self._taken_away(left[0], rules)
            taken_away = _TAKE_BACK if said else ""
            yield TargetError(
                "missing-tensor",
                f"{count(len(left), 'tensor')} of the target without a source: {listed(left)}",
                where=self.user_file,
                found=f"placeholders without data: {listed([':'.join(one) for one in empty])}" if empty else said,
                expected=" or ".join(f"{source}:{name}" for source, name in looked_for),
                hint=hollow or taken_away or next(hints, "add a source that has them, or a rule that names them"),
            )

    def _taken_away(self, target: str, rules: Sequence[Rule]) -> str:
        """Returns which line under ``drop:`` takes the tensor away that would have made a target, or nothing."""
        return next((said for one in _looked_for(target, rules) if (said := self.gone.said(*one))), "")

    def _unexpected(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        extra: dict[tuple[Mark, str], list[Assignment]] = defaultdict(list)
        for name, assignment in self.assignments.items():
            if name not in expectation.tensors and not expectation.open:
                extra[assignment.rule.mark, assignment.source].append(assignment)
        index = NameIndex(expectation.tensors)
        for (mark, source), cases in extra.items():
            lines = drop_lines(source, [a.name for a in cases], self._used(source, without=cases)) if source else []
            near = index.near(cases[0].target)
            yield TargetError(
                "unexpected-target",
                f"{count(len(cases), 'tensor')} that the target does not have: {listed([a.target for a in cases])}",
                where=str(mark),
                found=f"{source}:{cases[0].name}" if source else "",
                expected=f"names such as {', '.join(near)}" if near else "",
                hint=_unwanted_hint(lines, cases, self.assignments.values()),
            )

    def _misshapen(self, expectation: Expectation) -> Iterator[ShardmergeError]:
        wrong: dict[str, list[tuple[Assignment, Misfit]]] = defaultdict(list)
        for name, assignment in self.assignments.items():
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
                hint=shape_hint(misfits, expectation, source),
            )

    def _unwanted(self, target: str) -> bool:
        """Tells whether a target of an open directory, known only since a source has it, is dropped from there."""
        opened = self.expectation is not None and self.expectation.open
        return opened and any((source, target) in self.gone.lines for source in self.catalogs)

    def _idle_drops(self) -> Iterator[ShardmergeError]:
        for drop in self.gone.idle:
            what = f"the drop `{drop.source}:{drop.template}` matches no tensor"
            hint = self.near(drop.source, drop.template.text) or "remove the line"
            yield MappingError("drop-matches-nothing", what, where=str(drop.mark), hint=hint)

    def _idle_rules(self, missing: Sequence[str]) -> Iterator[ShardmergeError]:
        for rule in self.idle:
            if any(rule.target.match(name) is not None for name in missing):
                continue  # the tensors it would have made are already reported missing
            named = [reference for candidate in rule.candidates for reference in references(candidate)]
            if rule.optional or not named or all(reference.source not in self.catalogs for reference in named):
                continue  # a preset's, or the user said that these sources may be absent
            if rule.rest and any(
                r.source == source and r.template.match(name) for r in named for source, name in self.spent
            ):
                continue  # nothing was left for it, and that is what `rest` is for
            yield MappingError(
                "rule-matches-nothing",
                f"no source tensor matches the rule for `{rule.target}`",
                where=str(rule.mark),
                found=", ".join(f"`{r.source}:{r.template}`" for r in named),
                hint=self._idle_hint(named),
            )

    def _idle_hint(self, named: Sequence[Reference]) -> str:
        first = named[0]
        for one in named:
            mine = sorted(name for source, name in self.merged if source == one.source)
            gone = next((name for name in mine if one.template.match(name) is not None), "")
            if gone:
                if gone in self.catalogs[one.source]:
                    text = f"`adapters:` merges {one.source}:{gone} into its base"
                    return f"{text}: remove this rule, or take the base's tensor"
                return f"{one.source}:{gone} is part of the dequantized weight by now: remove this rule"
            lines = (pair for pair in self.gone.lines if pair[0] == one.source)
            lost = next((pair for pair in lines if one.template.match(pair[1]) is not None), None)
            if lost is not None:
                return f"{one.source}:{lost[1]} is {self.gone.said(*lost)}: remove this rule, or that line"
        return self.near(first.source, first.template.text) or self._listing(first.source)

    def _listing(self, source: str) -> str:
        """Returns a hint with the command that lists the names of a source."""
        return f"{inspecting(self.catalogs[source].path)} lists the names" if source in self.catalogs else ""

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


def _unwanted_hint(lines: list[str], cases: list[Assignment], every: Iterable[Assignment]) -> str:
    """A tensor that makes a wanted target too must not be dropped: it is the rule that is one too many."""
    unwanted = {case.target for case in cases}
    elsewhere = {(one.source, one.name) for one in every if one.target not in unwanted}
    if not lines or any((case.source, case.name) in elsewhere for case in cases):
        return f"remove the rule `{cases[0].rule.target}`"
    return f"if not wanted, add under `drop:` {_ticked(lines)}"


def _failed(
    rule: Rule, failures: list[_Failure], near: Callable[[str, str], str], catalogs: Mapping[str, Catalog]
) -> Iterator[MappingError]:
    """One error for all targets that the ops of a rule cannot make for the same reason."""
    groups: dict[str, list[_Failure]] = defaultdict(list)
    for case in failures:
        groups[case.error.code].append(case)
    for code, cases in groups.items():
        first = cases[0].error
        source, _, name = first.what.removesuffix(" is not there").partition(":")
        if code == "missing-operand" and source in catalogs and name in catalogs[source].absent:
            yield placeholder_error(source, [name], catalogs[source])
            continue
        alike = near(source, name) if code == "missing-operand" else ""
        yield MappingError(
            code,
            f"{listed(list(dict.fromkeys(case.target for case in cases)))}: {first.what}",
            where=first.where or str(cases[0].term.mark),
            found=first.found,
            expected=first.expected,
            hint=first.hint or alike,
        )


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


def _ticked(lines: Sequence[str]) -> str:
    return " and ".join(f"`{line}`" for line in lines)


def _adapter_error(source: str, names: list[str], catalog: Catalog) -> MappingError:
    return MappingError(
        "unmerged-adapter",
        f"{source} holds {count(len(names), 'adapter tensor')} that no base takes: {listed(names, 3)}",
        where=catalog.path,
        hint=f"to merge it, add `adapters: [{{from: {source}, onto: BASE}}]`, BASE being what it was trained on",
    )


def _missing_component(component: Component, number: int, file: str, taken_away: str) -> TargetError:
    reason = f": {component.reason}" if component.reason else ""
    return TargetError(
        "missing-component",
        f"{number} tensors of {component.prefix}* have no source{reason}",
        where=file,
        found=taken_away,
        hint=_TAKE_BACK if taken_away else component.remedy,
    )


def _is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER)


def _fits(shape: Shape, wanted: Shape, resize: Resize | None) -> bool:
    if shape == wanted:
        return True
    if resize is None or len(shape) != len(wanted) or not shape or shape[1:] != wanted[1:]:
        return False
    return 0 < shape[0] < wanted[0] or (resize.trim and shape[0] > wanted[0])


def _leaf(name: str) -> str:
    """The part of a name that two layouts are most likely to share."""
    return ".".join(name.split(".")[-4:])
