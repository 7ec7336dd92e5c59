"""The way back: a mapping that makes, of what another mapping made, one of the sources again. Pure.

A rename swaps its sides. A chain of ops is undone from the outside in: an op with a ``Mirror`` by the other op, the
parts of a split (``Gathered``) by joining all of them, a join (``Scattered``) by one part for each of its inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.arithmetic import Formula
from shardmerge.mapping.narrower import is_narrower
from shardmerge.mapping.near import did_you_mean, listed
from shardmerge.mapping.pattern import Capture, Template, escape
from shardmerge.mapping.spec import Argument, OpTerm, Reference, Rule, Spec, Term, references
from shardmerge.mapping.way_back import Fence, Forward, check, fence
from shardmerge.ops.contract import Gathered, Mirror, OpKind, Scattered
from shardmerge.ops.registry import OPS

_MADE = "made"
_AT_HAND = "put the sources where the mapping says"
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.+*/%() -]*")
# The rooms of `mapping.variables`: a formula may name them without a source, and then the first that answers counts.
_ROOMS = ("config", "params", "adapter", "facts", "cfg")


@dataclass(frozen=True, slots=True)
class _Name:
    """A tensor that the mapping made."""

    text: str
    captures: frozenset[str]
    many: bool = False


@dataclass(frozen=True, slots=True)
class _Undone:
    """An op of the way back."""

    op: str
    of: tuple[_Way, ...]
    params: Mapping[str, str]
    ranges: Mapping[str, str] = field(default_factory=dict)


_Way: TypeAlias = _Name | _Undone


@dataclass(slots=True)
class _Siblings:
    """Siblings that are undone together."""

    rule: Rule
    term: OpTerm
    number: int | None
    found: dict[int, _Way] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)

    def missing(self) -> list[str]:
        """Returns the first parts that no rule takes; a mapping may say that there are 10^15."""
        every = (str(i) for i in range(self.number or 0) if i not in self.found)
        return list(islice(every, 5))


@dataclass(slots=True)
class _Back:
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
    rules: dict[str, _Way] = field(default_factory=dict)
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
            self.refuse(rule, "which of its candidates made a tensor is only known with the sources at hand", _AT_HAND)

    def candidate(self, rule: Rule, term: Term) -> None:
        """Undoes one candidate of a rule."""
        if rule.target.formulas:
            self.refuse(rule, "its name is computed of several numbers, which cannot be told apart again")
        else:
            self.undo(rule, term, _Name(rule.target.text, frozenset(rule.target.captures)))

    def undo(self, rule: Rule, term: Term, way: _Way) -> None:
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

    def _arrive(self, rule: Rule, reference: Reference, way: _Way) -> None:
        template = reference.template
        if reference.source != self.source:
            self.others.update((name.text, reference.source) for name in _names(way))
            return
        bound = set().union(*(name.captures for name in _names(way))) - set(_ranges(way))
        odd = bound ^ (set(template.captures) - set(_ranges(way)))
        if odd:
            self.refuse(rule, f"`{template}` stands for one tensor where the rule makes several, by {_braced(odd)}")
        elif _loses_zeros(rule.target, template):
            self.refuse(
                rule, "whether the number had leading zeros is not known", "write the same {x:02} on both sides"
            )
        elif template.text in self.rules:
            for name in _names(way):
                self.drops.setdefault(name.text, f"the same as what {template} is taken from already")
        else:
            self.rules[template.text] = way

    def _mirror(self, rule: Rule, term: OpTerm, mirror: Mirror, way: _Way) -> None:
        params = mirror.params(_texts(term))
        kind = OPS[mirror.name]
        unknown = [p.name for p in kind.params if p.default is None and not p.optional and not params.get(p.name)]
        if unknown:
            forgotten = [p.name for p in term.kind.params if p.optional and p.name not in term.arguments]
            hint = f"add `{forgotten[0]}: ...`" if forgotten else ""
            self.refuse(rule, f"the {', '.join(unknown)} to go back to is not known", hint)
        elif any(name.many for name in _names(way)):
            self.refuse(rule, f"`{mirror.name}` cannot undo several tensors at once")
        else:
            self.undo(rule, term.inputs[0], _Undone(mirror.name, (way,), _known(params, kind)))

    def _gather(self, rule: Rule, term: OpTerm, way: _Way) -> None:
        """Waits for the other parts; a part counted by ``for`` is all of them at once."""
        texts = _texts(term)
        take = texts.pop("take", "")
        number = _number_of_parts(term)
        if take in rule.ranges and isinstance(way, _Name):
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
        self._joined(rule, term, (_Name("".join(pieces), captures, many=True),))

    def cut_off(self, forward: Forward) -> None:
        """Takes off the rows that a vocabulary added, by a rule for each such tensor."""
        for target, one, rows, now in forward.resized(self.source):
            if now < rows or not isinstance(one.term, Reference):
                self.refuse(one.rule, f"{rows} rows became {now} in {target}")
                continue
            made = _Name(escape(target), frozenset())
            self.rules[escape(one.name)] = _Undone("slice", (made,), {"stop": str(rows)})
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
        used = {name.text for way in self.rules.values() for name in _names(way)}
        self.drops |= {text: f"comes from {source}" for text, source in self.others.items() if text not in used}

    def _joined(self, rule: Rule, term: OpTerm, ways: tuple[_Way, ...]) -> None:
        assert isinstance(term.kind.inverse, Gathered)
        texts = _texts(term)
        texts.pop("take", None)
        name = term.kind.inverse.name
        self.undo(rule, term.inputs[0], _Undone(name, ways, _known(texts, OPS[name])))

    def _scatter(self, rule: Rule, term: OpTerm, inverse: Scattered, way: _Way) -> None:
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
            self.undo(rule, one, _Undone(name, (way,), params))

    def _scatter_collected(
        self, rule: Rule, reference: Reference, params: Mapping[str, str], name: str, number: str, way: _Way
    ) -> None:
        each = reference.template.collected
        text = reference.template.text.replace(f"{{{each}*}}", f"{{{each}}}")
        undone = _Undone(name, (way,), {**params, "take": each}, {each: number})
        self._arrive(rule, replace(reference, template=Template.parse(text)), undone)


def invert_spec(spec: Spec, source: str = "", forward: Forward | None = None) -> str:
    """Returns the mapping that leads back, as YAML with comments.

    Parameters
    ----------
    spec
        A mapping, its preset combined with it.
    source
        The source to get back; empty for the first. What comes from others is dropped by name.
    forward
        What the mapping came to, if its sources are at hand. The way back is then checked against it: it brings back
        every tensor of the source that was used, and no other.

    Raises
    ------
    MappingError
        ``no-inverse``: one for every rule that has none, with the reason.
    UsageError
        ``unknown-source``.
    """
    source = source or next(iter(spec.sources))
    if source not in spec.sources:
        hint = did_you_mean(source, spec.sources)
        raise UsageError("unknown-source", f"there is no source `{source}`", where=spec.file, hint=hint)
    back = _Back(source)
    if forward is None:
        raise_all(_overlapping(spec))
        for rule in spec.rules:
            back.rule(rule)
    elif source in forward.catalogs:
        for rule, term in forward.taken(source):
            back.candidate(rule, term)
    back.finish()
    if forward is not None:
        back.cut_off(forward)
    raise_all([*back.problems, *_merged(spec, source, forward)])
    if not back.rules:
        what = f"no rule takes anything from `{source}` alone"
        other = next((r.source for rule in spec.rules for one in rule.candidates for r in references(one)), "")
        hint = f"get back another one: `--source {other}`" if other else ""
        raise MappingError("no-inverse", what, where=spec.file, hint=hint)
    text = "\n".join(_lines(spec, back, forward)) + "\n"
    if forward is not None:
        check(text, forward, source, _made_name(spec, back))
    return text


def _overlapping(spec: Spec) -> Iterator[MappingError]:
    """Of two rules for a name the narrower one makes it if it can, and that is not known without the sources."""
    wide = [rule for rule in spec.rules if rule.target.captures]
    for rule in wide:
        if rule.rest or any(is_narrower(one.target, rule.target) for one in spec.rules):
            what = f"what is left to the rule for `{rule.target}` is only known with the sources at hand"
            yield MappingError("no-inverse", what, where=str(rule.mark), hint=_AT_HAND)


def _merged(spec: Spec, source: str, forward: Forward | None) -> Iterator[MappingError]:
    what = "an adapter that is merged into its base cannot be taken out again"
    for adapter in spec.adapters:
        if not adapter.optional:
            yield MappingError("no-inverse", what, where=str(adapter.mark))
            return
    names = forward.merged(source) if forward is not None and source in forward.catalogs else []
    if names:
        yield MappingError("no-inverse", what, where=spec.file, found=f"{source}: {listed(names)}")


# --- looking at terms ---


def _texts(term: OpTerm) -> dict[str, str]:
    return {name: argument.text for name, argument in term.arguments.items()}


def _known(params: Mapping[str, str], kind: OpKind) -> dict[str, str]:
    """Leaves out what the other op has no parameter for, and what is not said."""
    return {param.name: params[param.name] for param in kind.params if params.get(param.name)}


def _number_of_parts(term: OpTerm) -> int | None:
    sizes: Argument | None = term.arguments.get("sizes")
    if sizes is not None:
        return len(sizes.formulas) if sizes.text.startswith("[") else None
    text = term.arguments["chunks"].text if "chunks" in term.arguments else ""
    return int(text) if text.isdigit() else None


def _names(way: _Way) -> Iterator[_Name]:
    if isinstance(way, _Name):
        yield way
        return
    for one in way.of:
        yield from _names(one)


def _ranges(way: _Way) -> dict[str, str]:
    return dict(way.ranges) if isinstance(way, _Undone) else {}


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


# --- writing ---


def _made_name(spec: Spec, back: _Back) -> str:
    configs = _configs(spec, back, _needed_variables(spec, back))
    return next(name for name in (_MADE, *(f"{_MADE}{i}" for i in range(2, 99))) if name not in configs)


def _lines(spec: Spec, back: _Back, forward: Forward | None) -> Iterator[str]:
    variables = _needed_variables(spec, back)
    configs = _configs(spec, back, variables)
    made = _made_name(spec, back)
    path = spec.output.path if spec.output else "OUT"
    fenced = _fenced(back, forward, made)
    yield f"# The way back from what {spec.file.rsplit('/', 1)[-1]} makes to its source `{back.source}`."
    yield from _remarks(spec, exact=forward is not None)
    yield "shardmerge: 1"
    yield "sources:"
    for name in configs:
        yield f"  {name}: {_quoted(spec.sources[name].path)}  # for the numbers in its config only"
    yield f"  {made}: {_quoted(path)}"
    yield f"output: {{path: {_quoted(path + '-back')}}}"
    if variables:
        yield "let:"
        yield from (f"  {name}: {_value(spec.variables[name].formula.text)}" for name in variables)
    for section in ("tensors", "rest"):
        ways = {target: way for target, way in back.rules.items() if (target in fenced.rest) == (section == "rest")}
        yield from _section(section, ways, made)
    # A source without tensors, such as a config alone, has nothing to be dropped.
    configs = [name for name in configs if forward is None or forward.has_tensors(name)]
    if fenced.drops or configs:
        yield "drop:"
        yield from (f"  - {line}" for line in fenced.drops)
        yield from (f"  - {_quoted(f'{name}:{{rest...}}')}  # nothing but its config is wanted" for name in configs)


def _section(name: str, ways: Mapping[str, _Way], made: str) -> Iterator[str]:
    if ways:
        yield f"{name}:"
    for target, way in ways.items():
        if _ranges(way):
            yield "  # counted from 0; write {r:02} instead of {r} where the names have leading zeros"
        yield f"  {_quoted(target)}: {_written(way, made)}"


def _fenced(back: _Back, forward: Forward | None, made: str) -> Fence:
    """Returns what must be dropped: what is known of the rules, or exactly what no rule of the way back needs."""
    if forward is None:
        lines = tuple(f"{_quoted(f'{made}:{text}')}  # {why}" for text, why in back.drops.items())
        return Fence(frozenset(), lines)
    ways = {target: [name.text for name in _names(way)] for target, way in back.rules.items()}
    return fence(forward, back.source, ways, back.origin, made)


def _remarks(spec: Spec, *, exact: bool) -> Iterator[str]:
    if spec.output and (spec.output.dtype or spec.output.dtypes):
        yield "# The mapping casts; what a narrower type has rounded stays rounded."
    if spec.vocabulary is not None and not exact:
        yield "# Rows that the mapping added to the vocabulary stay, and rows that it cut off are gone."
    for source in spec.sources.values():
        if source.strip:
            yield f"# The names of {source.name} come back without {source.strip!r}."
    for adapter in spec.adapters:
        yield f"# An adapter of {adapter.source.source}, if there was one, stays merged into {adapter.onto.source}."
    for drop in spec.drops:
        yield f"# Not to be had back, since it was dropped: {drop.source}:{drop.template}"


def _formulas(way: _Way) -> Iterator[str]:
    if isinstance(way, _Undone):
        for name, text in way.params.items():
            param = next(one for one in OPS[way.op].params if one.name == name)
            if param.kind in ("int", "number", "ints", "numbers"):
                yield from _elements(text)
        yield from way.ranges.values()
        for one in way.of:
            yield from _formulas(one)


def _needed_names(spec: Spec, back: _Back) -> set[str]:
    """Returns what the formulas of the way back name, through variables too."""
    waiting = [name for way in back.rules.values() for text in _formulas(way) for name in Formula.parse(text).names]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += spec.variables[name].formula.names if name in spec.variables else ()
    return found


def _needed_variables(spec: Spec, back: _Back) -> list[str]:
    needed = _needed_names(spec, back)
    return [name for name in spec.variables if name in needed]


def _configs(spec: Spec, back: _Back, variables: list[str]) -> list[str]:
    """Returns the sources whose configs are asked; all, where a formula leaves open which."""
    heads = {name.partition(".")[0] for name in _needed_names(spec, back) if name not in variables}
    if heads & set(_ROOMS) - set(spec.sources):
        return list(spec.sources)
    return [name for name in spec.sources if name in heads]


def _written(way: _Way, made: str) -> str:
    if isinstance(way, _Name):
        return _quoted(f"{made}:{way.text}")
    of = [_written(one, made) for one in way.of]
    many = OPS[way.op].many and not (len(of) == 1 and isinstance(way.of[0], _Name) and way.of[0].many)
    fields = [f"op: {way.op}", f"of: [{', '.join(of)}]" if many else f"of: {of[0]}"]
    fields += [f"{name}: {_value(text)}" for name, text in way.params.items()]
    if way.ranges:
        fields.append(f"for: {{{', '.join(f'{name}: {_value(text)}' for name, text in way.ranges.items())}}}")
    return "{" + ", ".join(fields) + "}"


def _elements(text: str) -> list[str]:
    return text[1:-1].split(", ") if text.startswith("[") and text.endswith("]") else [text]


def _value(text: str) -> str:
    """Returns a parameter as YAML; lists stay lists."""
    items = [item if _PLAIN.fullmatch(item) else _quoted(item) for item in _elements(text)]
    return f"[{', '.join(items)}]" if text.startswith("[") else items[0]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
