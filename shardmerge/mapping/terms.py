"""Terms of a rule against catalogs: which tensors an op finds for one target name, and the entry it makes of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.formulas import Formula
from shardmerge.mapping.dropping import Dropped
from shardmerge.mapping.settings import LayerPlaces, value_of
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Rule, Term, references
from shardmerge.mapping.variables import Variables
from shardmerge.ops.contract import Param, ParamValue
from shardmerge.tensors import Catalog, TensorEntry, of_source
from shardmerge.tensors.natural_order import natural_key

Bindings = Mapping[str, str]

# `for: {r: N}` counts ranks, experts, layers; a rule makes no more targets by it than the largest models have tensors:
# each takes some 500 bytes and 15 us to plan.
_MOST_COUNTED = _MOST_TARGETS = 1 << 16
_MOST_TARGETS_OF_ALL = 1 << 17


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a term uses."""

    source: str
    name: str


@dataclass(slots=True)
class Finder:
    """Finds operands by bindings; the names of a source are read once for each collecting template.

    ``used_cases`` are the ids of cases of settings that decided for a tensor.
    """

    catalogs: Mapping[str, Catalog]
    names: Mapping[str, Sequence[str]]
    variables: Variables
    gone: Dropped
    used_cases: set[int] = field(default_factory=set)
    _groups: dict[int, dict[tuple[tuple[str, str], ...], list[tuple[str, str]]]] = field(default_factory=dict)
    _counts: dict[str, dict[str, int]] = field(default_factory=dict)
    _targets: dict[int, int] = field(default_factory=dict)

    @property
    def _layers(self) -> LayerPlaces:
        return LayerPlaces(self.names, self._counts)

    def bindings(
        self, rule: Rule, term: OpTerm, spent: Collection[tuple[str, str]] = frozenset()
    ) -> Iterator[Bindings]:
        """Yields what the captures of the target can be, each combination once, in the order of the names.

        ``spent`` are tensors that do not count, for a rule of ``rest:``: others have taken them.

        Raises
        ------
        MappingError
            ``op-value``: ``for`` counts to what is no number, or too far. ``too-many-targets``.
        """
        wanted = set(rule.target.captures) - set(rule.ranges)
        wanted |= {n for formula in rule.target.formulas for n in formula.names if self.variables.get(n) is None}
        wanted -= set(rule.ranges)
        if rule.optional and self._is_elsewhere(term):
            return
        seen: set[tuple[tuple[str, str], ...]] = set()
        counted = [dict(zip(rule.ranges, values, strict=True)) for values in self._counted(rule)]
        for found in self._driven(term, wanted, spent):
            key = tuple(sorted(found.items()))
            if key not in seen:
                seen.add(key)
                if rule.ranges:
                    self._charge(rule, len(seen) * len(counted))
                yield from ({**found, **more} for more in counted)

    def _is_elsewhere(self, term: OpTerm) -> bool:
        """Tells whether none of the tensors is there that an op of a preset names: they are those of another model."""
        named = [(one.template, self.names[one.source]) for one in references(term)]
        return bool(named) and not any(
            name.startswith(template.head) and template.match(name) is not None
            for template, names in named
            for name in names
        )

    def _driven(self, term: OpTerm, wanted: set[str], spent: Collection[tuple[str, str]]) -> Iterator[dict[str, str]]:
        """Yields bindings from the first reference that has all captures."""
        if not wanted and not any(r.template.captures for r in references(term)):
            yield {}
            return
        driver = next((r for r in references(term) if wanted <= set(r.template.captures)), None)
        if driver is None:
            return
        for name in self.names[driver.source]:
            found = driver.template.match(name)
            if found is not None and (driver.source, name) not in spent:
                found.pop(driver.template.collected, None)
                yield found

    def _counted(self, rule: Rule) -> Iterator[tuple[str, ...]]:
        counts = [self._count(formula, rule) for formula in rule.ranges.values()]
        self._charge(rule, prod(counts))
        combinations: list[tuple[str, ...]] = [()]
        for count in counts:
            combinations = [(*before, str(i)) for before in combinations for i in range(count)]
        yield from combinations

    def _charge(self, rule: Rule, targets: int) -> None:
        """Takes off what a rule makes by counting, from its own budget and from that of all rules."""
        _within_budget(rule, targets, _MOST_TARGETS)
        self._targets[id(rule)] = targets
        _within_budget(rule, sum(self._targets.values()), _MOST_TARGETS_OF_ALL)

    def _count(self, formula: Formula, rule: Rule) -> int:
        value = self.variables.number(formula, str(rule.mark))
        if not isinstance(value, int) or not 0 < value <= _MOST_COUNTED:
            raise MappingError(
                "op-value", f"`for` counts to {value!r}", where=str(rule.mark), expected="a whole number"
            )
        return value

    def operands(self, reference: Reference, bindings: Bindings) -> list[Operand]:
        """Returns the tensors that a reference means: one, or all that ``{e*}`` collects; none if they are absent."""
        template = reference.template
        if reference.source not in self.catalogs:
            return []
        if not template.collects:
            name = template.format(bindings)
            return [Operand(reference.source, name)] if name in self.catalogs[reference.source] else []
        groups = self._collected(reference)
        key = tuple(sorted((n, bindings[n]) for n in template.captures if n != template.collected))
        return [Operand(reference.source, name) for _, name in groups.get(key, [])]

    def _collected(self, reference: Reference) -> dict[tuple[tuple[str, str], ...], list[tuple[str, str]]]:
        if id(reference) not in self._groups:
            template, groups = reference.template, defaultdict(list)
            for name in self.names[reference.source]:
                found = template.match(name)
                if found is not None:
                    each = found.pop(template.collected)
                    groups[tuple(sorted(found.items()))].append((each, name))
            for members in groups.values():
                members.sort(key=lambda pair: natural_key(pair[0]))
            self._groups[id(reference)] = dict(groups)
        return self._groups[id(reference)]

    def leaf(self, operand: Operand) -> TensorEntry:
        """Returns an operand's entry, marked with its source."""
        return of_source(self.catalogs[operand.source][operand.name], operand.source)

    def build(self, term: Term, bindings: Bindings, target: str) -> TensorEntry:
        """Returns the entry that a term makes.

        Raises
        ------
        MappingError
            ``missing-operand``: a tensor of the op is not there. ``op-shape``, ``op-value``, ``bad-formula``: from the
            op and its parameters.
        """
        if isinstance(term, Reference):
            (entry,) = self._entries(term, bindings)
            return entry
        inputs = [entry for one in term.inputs for entry in self._several(one, bindings, target)]
        return compose(term.kind.build(self._values(term, bindings, target)), inputs)

    def _several(self, term: Term, bindings: Bindings, target: str) -> list[TensorEntry]:
        if isinstance(term, Reference):
            return self._entries(term, bindings)
        return [self.build(term, bindings, target)]

    def _entries(self, reference: Reference, bindings: Bindings) -> list[TensorEntry]:
        found = self.operands(reference, bindings)
        if not found:
            shown = f"{reference.source}:{_shown(reference, bindings)}"
            said = self._said(reference, bindings)
            hint = "take that line out of `drop`, or add a candidate for where the tensor is dropped" if said else ""
            what = f"{shown} is {said or 'not there'}"
            raise MappingError("missing-operand", what, where=str(reference.mark), hint=hint)
        return [self.leaf(operand) for operand in found]

    def _said(self, reference: Reference, bindings: Bindings) -> str:
        """Returns which line dropped the tensors that a reference means, ``""`` if they were never there."""
        if not reference.template.collects:
            return self.gone.said(reference.source, reference.template.format(bindings))
        return next((self.gone.said(*pair) for pair in self.gone.lines if self._means(reference, bindings, pair)), "")

    @staticmethod
    def _means(reference: Reference, bindings: Bindings, pair: tuple[str, str]) -> bool:
        found = reference.template.match(pair[1]) if pair[0] == reference.source else None
        return found is not None and all(found[name] == bindings[name] for name in found if name in bindings)

    def _values(self, term: OpTerm, bindings: Bindings, target: str) -> dict[str, ParamValue]:
        """Returns the op's parameters as numbers and texts; the salt makes random draws of two targets differ."""
        values: dict[str, ParamValue] = {"salt": hashlib.sha256(target.encode()).hexdigest()[:16]}
        values |= {name: name in term.arguments for name in term.kind.optional_terms}
        for param in term.kind.params:
            argument = term.arguments.get(param.name)
            if argument is not None and argument.settings:
                values[param.name] = self._varying(param, argument, term, bindings, target)
            elif argument is not None:
                values[param.name] = self._value(param, argument, bindings)
            elif param.default is not None:
                values[param.name] = param.default
        return values

    def _varying(self, param: Param, argument: Argument, term: OpTerm, bindings: Bindings, target: str) -> ParamValue:
        """Returns the numbers of one tensor; its layer is that of the first tensor that the op takes."""
        first = next((one for one in references(term) if not one.template.collects), None)
        place = self._layers.place(first.source, first.template.format(bindings)) if first is not None else 0.0
        mark, numbers = str(argument.mark), []
        for setting in argument.settings:
            number, case = value_of(
                setting, target, place, lambda one: self.variables.number(one, mark, bindings), param.name
            )
            self.used_cases.add(id(case))
            numbers.append(float(number))
        return tuple(numbers) if param.kind == "numbers" else numbers[0]

    def _value(self, param: Param, argument: Argument, bindings: Bindings) -> ParamValue:
        if param.kind in ("text", "dtype"):
            return argument.text
        if param.kind == "flag":
            return argument.text == "true"
        numbers = [self.variables.number(formula, str(argument.mark), bindings) for formula in argument.formulas]
        if param.kind in ("int", "ints"):
            whole = tuple(_whole(number, param, argument) for number in numbers)
            return whole if param.kind == "ints" else whole[0]
        return tuple(float(number) for number in numbers) if param.kind == "numbers" else numbers[0]


def _within_budget(rule: Rule, targets: int, most: int) -> None:
    if targets > most:
        raise MappingError(
            "too-many-targets",
            f"the rule for `{rule.target}` brings the tensors to {targets:,} or more",
            where=str(rule.mark),
            expected=f"at most {most:,}",
            hint="count fewer under `for`",
        )


def _whole(number: float, param: Param, argument: Argument) -> int:
    if isinstance(number, int) or number.is_integer():
        return int(number)
    what = f"`{param.name}: {argument.text}` is {number}, and a whole number is needed"
    hint = "write `//` in the place of `/`: it divides without a rest"
    raise MappingError("op-value", what, where=str(argument.mark), hint=hint)


def _shown(reference: Reference, bindings: Bindings) -> str:
    known = {name: bindings.get(name, "*") for name in reference.template.captures}
    known[reference.template.collected] = "*"
    return reference.template.format({name: value if value != "*" else "0" for name, value in known.items()})
