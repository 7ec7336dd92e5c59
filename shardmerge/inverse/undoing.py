"""Rules turned around: what makes, of what a mapping made, the tensors of one source again. Pure.

A rename swaps its sides. A chain of ops is undone from the outside in: an op with a ``Mirror`` by the other op, the
parts of a split (``Gathered``) by joining all of them, a join (``Scattered``) by one part for each of its inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.formulas import Formula
from shardmerge.inverse.way_back import Forward
from shardmerge.mapping.captures import Capture
from shardmerge.mapping.pattern import Template, escape
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Rule, Term, references
from shardmerge.ops.contract import Gathered, Mirror, OpKind, Scattered
from shardmerge.ops.registry import OPS

AT_HAND = "put the sources where the mapping says"


@dataclass(frozen=True, slots=True)
class MadeName:
    """A tensor that the mapping made."""

    text: str
    captures: frozenset[str]
    many: bool = False


@dataclass(frozen=True, slots=True)
class Undone:
    """An op of the way back."""

    op: str
    of: tuple[Way, ...]
    params: Mapping[str, str]
    ranges: Mapping[str, str] = field(default_factory=dict)


Way: TypeAlias = MadeName | Undone


@dataclass(slots=True)
class _Siblings:
    """Siblings that are undone together."""

    rule: Rule
    term: OpTerm
    number: int | None
    found: dict[int, Way] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Returns the first parts that no rule takes; a mapping may say that there are 10^15."""
        every = (str(i) for i in range(self.number or 0) if i not in self.found)
        return list(islice(every, 5))


@dataclass(slots=True)
class Undoing:
    """A way back in the making.

    Attributes
    ----------
    rules
        Of the result: a source's template, and what it is made of.
    drops
        Made tensors that lead nowhere, with the reason.
    others
        Made tensors that lead to another source, some of them only in part.
    origin
        For a made name that collects: the target that it was before.
    """

    source: str
    rules: dict[str, Way] = field(default_factory=dict)
    drops: dict[str, str] = field(default_factory=dict)
    parts: dict[str, _Siblings] = field(default_factory=dict)
    problems: list[ShardmergeError] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def refuse(self, rule: Rule, why: str, hint: str = "") -> None:
        """Remembers a rule that has no way back."""
        what = f"the rule for `{rule.target}` has no inverse: {why}"
        self.problems.append(MappingError("no-inverse", what, where=str(rule.mark), hint=hint))

    def rule(self, rule: Rule) -> None:
        """Undoes a rule by itself, where nobody knows what it came to: so it must have one candidate only."""
        own = [one for one in rule.candidates if any(r.source == self.source for r in references(one))]
        if not own:
            others = sorted({r.source for one in rule.candidates for r in references(one)})
            self.drops[rule.target.text] = f"comes from {', '.join(others)}" if others else "made of nothing"
            return
        before = len(self.problems)
        self.candidate(rule, own[0])
        if len(rule.candidates) > 1 and len(self.problems) == before:
            self.refuse(rule, "which of its candidates made a tensor is only known with the sources at hand", AT_HAND)

    def candidate(self, rule: Rule, term: Term) -> None:
        """Undoes one candidate of a rule."""
        if rule.target.formulas:
            self.refuse(rule, "its name is computed of several numbers, which cannot be told apart again")
        else:
            self.undo(rule, term, MadeName(rule.target.text, frozenset(rule.target.captures)))

    def undo(self, rule: Rule, term: Term, way: Way) -> None:
        """Goes one step in: ``way`` makes what ``term`` stands for."""
        if isinstance(term, Reference):
            self._arrive(rule, term, way)
        elif isinstance(term.kind.inverse, Mirror):
            self._mirror(rule, term, term.kind.inverse, way)
        elif isinstance(term.kind.inverse, Gathered):
            self._gather(rule, term, way)
        elif isinstance(term.kind.inverse, Scattered):
            self._scatter(rule, term, term.kind.inverse, way)
        else:
            self.refuse(rule, f"`{term.kind.name}` is lossy: {term.kind.lossy or 'it forgets what it was made of'}")

    def _arrive(self, rule: Rule, reference: Reference, way: Way) -> None:
        template = reference.template
        if reference.source != self.source:
            self.others.update((name.text, reference.source) for name in names_of(way))
            return
        bound = set().union(*(name.captures for name in names_of(way))) - set(ranges_of(way))
        odd = bound ^ (set(template.captures) - set(ranges_of(way)))
        if odd:
            self.refuse(rule, f"`{template}` stands for one tensor where the rule makes several, by {_braced(odd)}")
        elif _loses_zeros(rule.target, template):
            self.refuse(
                rule, "whether the number had leading zeros is not known", "write the same {x:02} on both sides"
            )
        elif template.text in self.rules:
            for name in names_of(way):
                self.drops.setdefault(name.text, f"the same as what {template} is taken from already")
        else:
            self.rules[template.text] = way

    def _mirror(self, rule: Rule, term: OpTerm, mirror: Mirror, way: Way) -> None:
        params = mirror.params(_texts(term))
        kind = OPS[mirror.name]
        unknown = [p.name for p in kind.params if p.default is None and not p.optional and not params.get(p.name)]
        if unknown:
            forgotten = [p.name for p in term.kind.params if p.optional and p.name not in term.arguments]
            hint = f"add `{forgotten[0]}: ...`" if forgotten else ""
            self.refuse(rule, f"the {', '.join(unknown)} to go back to is not known", hint)
        elif any(name.many for name in names_of(way)):
            self.refuse(rule, f"`{mirror.name}` cannot undo several tensors at once")
        else:
            self.undo(rule, term.inputs[0], Undone(mirror.name, (way,), _known(params, kind)))

    def _gather(self, rule: Rule, term: OpTerm, way: Way) -> None:
        """Waits for the other parts; a part counted by ``for`` is all of them at once."""
        texts = _texts(term)
        take = texts.pop("take", "")
        number = _number_of_parts(term)
        if take in rule.ranges and isinstance(way, MadeName):
            self._gather_counted(rule, term, take, number)
            return
        key = json.dumps([term.kind.name, texts, _shown(term.inputs[0])])
        parts = self.parts.setdefault(key, _Siblings(rule, term, number))
        if not take.isdigit():
            self.refuse(rule, f"which part it takes is only known as `{take}`")
        parts.found[int(take) if take.isdigit() else -1] = way
        parts.targets.append(rule.target.text)

    def _gather_counted(self, rule: Rule, term: OpTerm, take: str, number: int | None) -> None:
        count = rule.ranges[take].text
        chunks = term.arguments.get("chunks")
        if count != str(number) and (chunks is None or chunks.text != count):
            self.refuse(rule, f"`for` counts to {count}, and that need not be all parts")
            return
        pieces = [_piece(part, take) for part in rule.target.parts]
        captures = frozenset(rule.target.captures) - {take}
        self.origin["".join(pieces)] = rule.target.text
        self._joined(rule, term, (MadeName("".join(pieces), captures, many=True),))

    def cut_off(self, forward: Forward) -> None:
        """Takes off the rows that a vocabulary added, by a rule for each such tensor."""
        for target, one, rows, now in forward.resized(self.source):
            if now < rows or not isinstance(one.term, Reference):
                self.refuse(one.rule, f"{rows} rows became {now} in {target}")
                continue
            made = MadeName(escape(target), frozenset())
            self.rules[escape(one.name)] = Undone("slice", (made,), {"stop": str(rows)})
            self.origin[made.text] = one.rule.target.text

    def finish(self) -> None:
        """Joins parts, the innermost last: joining some may complete others."""
        while self.parts:
            key = next(iter(self.parts))
            parts = self.parts.pop(key)
            missing = parts.missing()
            if parts.number is None or missing:
                lacking = f"part {', '.join(missing)} of it" if missing else "how many parts there are"
                why = f"`{parts.term.kind.name}` takes a part, and no rule says {lacking}"
                hint = "" if missing else "write the number of parts as a number"
                self.refuse(parts.rule, why, hint)
                continue
            self._joined(parts.rule, parts.term, tuple(parts.found[i] for i in range(parts.number)))
        used = {name.text for way in self.rules.values() for name in names_of(way)}
        self.drops |= {text: f"comes from {source}" for text, source in self.others.items() if text not in used}

    def _joined(self, rule: Rule, term: OpTerm, ways: tuple[Way, ...]) -> None:
        assert isinstance(term.kind.inverse, Gathered)
        texts = _texts(term)
        texts.pop("take", None)
        name = term.kind.inverse.name
        self.undo(rule, term.inputs[0], Undone(name, ways, _known(texts, OPS[name])))

    def _scatter(self, rule: Rule, term: OpTerm, inverse: Scattered, way: Way) -> None:
        texts = _texts(term)
        name, sizes = inverse.name, term.arguments.get(inverse.needs)
        if sizes is None and "chunks" in texts:
            name = "chunk"  # equal parts: their number is enough
        elif sizes is None:
            self.refuse(
                rule, f"the sizes of what `{term.kind.name}` joins are not known", f"add `{inverse.needs}: [...]`"
            )
            return
        only = term.inputs[0]
        if isinstance(only, Reference) and only.template.collects and len(term.inputs) == 1:
            number = texts["chunks"] if sizes is None else str(len(sizes.formulas))
            self._scatter_collected(rule, only, _known(texts, OPS[name]), name, number, way)
            return
        if any(isinstance(one, Reference) and one.template.collects for one in term.inputs):
            self.refuse(rule, "how many tensors `{x*}` stands for is not known among others")
            return
        for index, one in enumerate(term.inputs):
            params = {**_known(texts, OPS[name]), "take": str(index)}
            self.undo(rule, one, Undone(name, (way,), params))

    def _scatter_collected(
        self, rule: Rule, reference: Reference, params: Mapping[str, str], name: str, number: str, way: Way
    ) -> None:
        each = reference.template.collected
        text = reference.template.text.replace(f"{{{each}*}}", f"{{{each}}}")
        undone = Undone(name, (way,), {**params, "take": each}, {each: number})
        self._arrive(rule, replace(reference, template=Template.parse(text)), undone)


def _texts(term: OpTerm) -> dict[str, str]:
    return {name: argument.text for name, argument in term.arguments.items()}


def _known(params: Mapping[str, str], kind: OpKind) -> dict[str, str]:
    """Leaves out what the other op has no parameter for, and what is not said."""
    return {param.name: params[param.name] for param in kind.params if params.get(param.name)}


def _number_of_parts(term: OpTerm) -> int | None:
    sizes: Argument | None = term.arguments.get("sizes")
    if sizes is not None:
        return len(sizes.formulas) if sizes.text.startswith("[") else None
    text = next((term.arguments[name].text for name in ("chunks", "count") if name in term.arguments), "")
    return int(text) if text.isdigit() else None


def names_of(way: Way) -> Iterator[MadeName]:
    """Yields the made tensors that a way goes by."""
    if isinstance(way, MadeName):
        yield way
        return
    for one in way.of:
        yield from names_of(one)


def ranges_of(way: Way) -> dict[str, str]:
    """Returns what a way counts, by capture: ``for:`` of its rule."""
    return dict(way.ranges) if isinstance(way, Undone) else {}


def _piece(part: str | Capture | Formula, collected: str) -> str:
    """Returns a part of a template as text, one of its captures collecting."""
    if isinstance(part, str):
        return part.replace("{", "{{").replace("}", "}}")
    if isinstance(part, Formula):
        return f"{{{part.text}}}"
    if part.name == collected:
        return f"{{{collected}*}}"
    if part.shift:
        return f"{{{part.name} {'+' if part.shift > 0 else '-'} {abs(part.shift)}}}"
    kinds = {
        "int": ":int",
        "rest": "...",
        "each": "*",
        "digits": f":0{part.width}",
        "choice": ":" + "|".join(part.choices),
    }
    return f"{{{part.name}{kinds.get(part.kind, '')}}}"


def _loses_zeros(made: Template, source: Template) -> bool:
    """Tells whether a number was padded with zeros that its source need not have."""
    padded = {part.name for part in made.parts if isinstance(part, Capture) and part.kind == "digits"}
    return any(isinstance(p, Capture) and p.name in padded and p.kind != "digits" for p in source.parts)


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _shown(term: Term) -> str:
    """Returns a term as text: equal text, equal tensors."""
    if isinstance(term, Reference):
        return f"{term.source}:{term.template}"
    return json.dumps([term.kind.name, _texts(term), [_shown(one) for one in term.inputs]], sort_keys=True)
