"""Rules put to the tensors of sources, one rule after the other: what each of them would make, and of what.

A rule's first candidate that really has a tensor wins. Rules of ``rest:`` come last and take what the others left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.claims import Claim, Claims
from shardmerge.mapping.dropping import Dropped
from shardmerge.mapping.near import NameIndex, listed
from shardmerge.mapping.refusals import placeholder_error
from shardmerge.mapping.resolution import Assignment
from shardmerge.mapping.spec import OpTerm, Reference, Rule, Term, dequantized_by, references
from shardmerge.mapping.terms import Bindings, Finder, Operand
from shardmerge.mapping.variables import Variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.targets.expectation import Expectation
from shardmerge.tensors import Catalog, TensorEntry, of_source
from shardmerge.tensors.packed import Packed, packed_weights


@dataclass(frozen=True, slots=True)
class _Failure:
    """A target that an op cannot make."""

    term: OpTerm
    target: str
    error: MappingError
    operands: Sequence[Operand] = ()


@dataclass(slots=True)
class Matching:
    """What rules made of the sources so far.

    Attributes
    ----------
    catalogs, gone
        The sources without what is dropped; and what that is.
    expectation
        What the target must hold; None if the mapping alone decides.
    merged
        (source, name) of tensors that are part of others by now, which no rule may take.
    spent
        (source, name) of what rules of ``tensors:`` matched, before those of ``rest:`` are put to the sources.
    claims, matched
        Of the rules so far: their claims, and (source, name) of every tensor that one of them has a use for.
    placeholders
        By target, the (source, name) of a tensor without elements that would have made it.
    idle
        Rules that found nothing.
    failed
        Targets that an op could not make; ``problems`` says why.
    quantized
        By source, the packed weights that rules take for numbers, and the first such rule.
    """

    catalogs: Mapping[str, Catalog]
    gone: Dropped
    expectation: Expectation | None
    variables: Variables
    merged: frozenset[tuple[str, str]] = frozenset()
    spent: frozenset[tuple[str, str]] = frozenset()
    claims: Claims = field(default_factory=Claims)
    matched: set[tuple[str, str]] = field(default_factory=set)
    placeholders: dict[str, tuple[str, str]] = field(default_factory=dict)
    idle: list[Rule] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    problems: list[ShardmergeError] = field(default_factory=list)
    quantized: dict[str, tuple[Mark, dict[str, None]]] = field(default_factory=dict)
    _failures: list[tuple[Rule, list[_Failure]]] = field(default_factory=list)
    _names: dict[str, Sequence[str]] = field(default_factory=dict)
    _indexes: dict[str, NameIndex] = field(default_factory=dict)
    _packed: dict[str, dict[str, Packed]] = field(default_factory=dict)
    _finder: Finder | None = None

    def near(self, source: str, word: str) -> str:
        """Returns a hint with the names of a source that are like a word."""
        if source not in self.catalogs:  # declared `required: false`, and not there
            return ""
        if source not in self._indexes:
            self._indexes[source] = NameIndex(self.catalogs[source].names())
        found = self._indexes[source].near(word)
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
            self.matched.update((operand.source, operand.name) for operand in one.operands)
        if left:
            self._failures.append((rule, left))
        if not found:
            self.idle.append(rule)

    def settle_failures(self) -> None:
        """Once all rules are applied: what an op cannot make is a problem where no narrower rule makes it."""
        for rule, failures in self._failures:
            left = [one for one in failures if not self.claims.beaten(rule, one.target)]
            self.failed.update(one.target for one in left)
            self.problems += _failed(left, self.near, self.catalogs)

    def _take(self, rule: Rule, reference: Reference) -> bool:
        """Claims a target for every tensor that the reference matches."""
        found = False
        template = reference.template
        check = not rule.target.surely_fits(template)
        aside = self._aside(rule, reference.source)
        # Most names fail at once: the inline test saves a call for each of them.
        for name in [name for name in self.names(reference.source) if name.startswith(template.head)]:
            bindings = template.match(name)
            if bindings is None or (check and not rule.target.fits(bindings)):
                continue
            found = True
            if name in aside or (rule.rest and (reference.source, name) in self.spent):
                continue
            if self.expectation is not None and not self.expectation.open:
                self._note_packed(rule, [Operand(reference.source, name)])
            entry = of_source(self.catalogs[reference.source][name], reference.source)
            self._claim(rule, reference, self._target(rule, bindings), [Operand(reference.source, name)], entry)
        return found

    def _aside(self, rule: Rule, source: str) -> Collection[str]:
        """Returns names that a preset's rules leave alone: what the target itself has no place for."""
        return self.expectation.ignored.get(source, ()) if self.expectation is not None and rule.optional else ()

    def _make(self, rule: Rule, term: OpTerm, failures: list[_Failure]) -> bool:
        """Claims a target for every combination of captures that the op finds its first tensors for."""
        found = False
        for bindings in self._bindings(rule, term, failures):
            if not rule.target.fits(bindings):
                continue
            found = True
            target = self._target(rule, bindings)
            operands = [one for reference in references(term) for one in self._found.operands(reference, bindings)]
            codes = [one for reference in dequantized_by(term) for one in self._found.operands(reference, bindings)]
            if self._note_packed(rule, [one for one in operands if one not in codes]):
                continue
            try:
                entry = self._found.build(term, bindings, target)
            except MappingError as error:
                failures.append(_Failure(term, target, error, operands))
                continue
            self._claim(rule, term, target, operands, entry)
        return found or bool(failures)

    def _note_packed(self, rule: Rule, operands: Sequence[Operand]) -> bool:
        """Remembers the operands that are packed weights, and tells whether there are any."""
        found = [one for one in operands if one.name in self.packed_in(one.source)]
        for one in found:
            self.quantized.setdefault(one.source, (rule.mark, {}))[1][one.name] = None
            self.matched.add((one.source, one.name))
        return bool(found)

    def packed_in(self, source: str) -> dict[str, Packed]:
        """Returns the packed weights of a source by name."""
        if source not in self._packed:
            self._packed[source] = packed_weights(self.catalogs[source])
        return self._packed[source]

    def _bindings(self, rule: Rule, term: OpTerm, failures: list[_Failure]) -> Iterator[Bindings]:
        try:
            yield from self._found.bindings(rule, term, self.spent if rule.rest else frozenset())
        except MappingError as error:
            failures.append(_Failure(term, str(rule.target), error))

    @property
    def used_cases(self) -> set[int]:
        """The ids of the cases of settings that decided for a tensor."""
        return self._finder.used_cases if self._finder is not None else set()

    @property
    def _found(self) -> Finder:
        """Looks operands up."""
        if self._finder is None:
            names = {source: self.names(source) for source in self.catalogs}
            self._finder = Finder(self.catalogs, defaultdict(tuple, names), self.variables, self.gone)
        return self._finder

    def _target(self, rule: Rule, bindings: Bindings) -> str:
        """Returns the target's name. Only formulas look at anything but the bindings."""
        if not rule.target.formulas:
            return rule.target.format(bindings)
        names = {name for formula in rule.target.formulas for name in formula.names}
        known = {name: value for name in names if isinstance(value := self.variables.get(name), int)}
        return rule.target.format(bindings, known)

    def names(self, source: str) -> Sequence[str]:
        """Returns the names of a source that rules may take: neither dropped nor merged into a base."""
        if source not in self._names:
            catalog = self.catalogs.get(source)
            every = catalog.names() if catalog else ()
            self._names[source] = [name for name in every if (source, name) not in self.merged]
        return self._names[source]

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

    def used(self, source: str, without: Collection[Assignment] = ()) -> set[str]:
        """Returns the names of a source that rules match, but for those of some assignments."""
        return {name for owner, name in self.matched if owner == source} - {a.name for a in without}


def _failed(
    failures: list[_Failure], near: Callable[[str, str], str], catalogs: Mapping[str, Catalog]
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
