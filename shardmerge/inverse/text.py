"""The way back as text: the mapping that undoes another one, as YAML with comments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from shardmerge.formulas import Formula
from shardmerge.inverse.undoing import MadeName, Undoing, Undone, Way, names_of, ranges_of
from shardmerge.inverse.way_back import Fence, Forward, fence
from shardmerge.mapping.spec import Spec
from shardmerge.mapping.variables import ROOMS
from shardmerge.ops.registry import OPS

_MADE = "made"
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.+*/%() -]*")


def made_name(spec: Spec, back: Undoing) -> str:
    """Returns what the way back calls the result of the mapping: a name that no source has whose config is asked."""
    configs = _configs(spec, back, _needed_variables(spec, back))
    return next(name for name in (_MADE, *(f"{_MADE}{i}" for i in range(2, 99))) if name not in configs)


def mapping_lines(spec: Spec, back: Undoing, forward: Forward | None) -> Iterator[str]:
    """Yields the lines of the mapping that leads back."""
    variables = _needed_variables(spec, back)
    configs = _configs(spec, back, variables)
    made = made_name(spec, back)
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


def _section(name: str, ways: Mapping[str, Way], made: str) -> Iterator[str]:
    if ways:
        yield f"{name}:"
    for target, way in ways.items():
        if ranges_of(way):
            yield "  # counted from 0; write {r:02} instead of {r} where the names have leading zeros"
        yield f"  {_quoted(target)}: {_written(way, made)}"


def _fenced(back: Undoing, forward: Forward | None, made: str) -> Fence:
    """Returns what must be dropped: what is known of the rules, or exactly what no rule of the way back needs."""
    if forward is None:
        lines = tuple(f"{_quoted(f'{made}:{text}')}  # {why}" for text, why in back.drops.items())
        return Fence(frozenset(), lines)
    ways = {target: [name.text for name in names_of(way)] for target, way in back.rules.items()}
    return fence(forward, back.source, ways, back.origin, made)


def _remarks(spec: Spec, *, exact: bool) -> Iterator[str]:
    if spec.output and (spec.output.dtype or spec.output.dtypes):
        yield "# The mapping casts; what a narrower type has rounded stays rounded."
    if spec.vocabulary is not None and not exact:
        yield "# Rows that the mapping added to the vocabulary stay, and rows that it cut off are gone."
    for source in spec.sources.values():
        if source.strip:
            yield f"# The names of {source.name} come back without {', '.join(source.strip)}."
    for adapter in spec.adapters:
        yield f"# An adapter of {adapter.source.source}, if there was one, stays merged into {adapter.onto.source}."
    for drop in spec.drops:
        yield f"# Not to be had back, since it was dropped: {drop.source}:{drop.template}"


def _formulas(way: Way) -> Iterator[str]:
    if isinstance(way, Undone):
        for name, text in way.params.items():
            param = next(one for one in OPS[way.op].params if one.name == name)
            if param.kind in ("int", "number", "ints", "numbers"):
                yield from _elements(text)
        yield from way.ranges.values()
        for one in way.of:
            yield from _formulas(one)


def _needed_names(spec: Spec, back: Undoing) -> set[str]:
    """Returns what the formulas of the way back name, through variables too."""
    waiting = [name for way in back.rules.values() for text in _formulas(way) for name in Formula.parse(text).names]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += spec.variables[name].formula.names if name in spec.variables else ()
    return found


def _needed_variables(spec: Spec, back: Undoing) -> list[str]:
    needed = _needed_names(spec, back)
    return [name for name in spec.variables if name in needed]


def _configs(spec: Spec, back: Undoing, variables: list[str]) -> list[str]:
    """Returns the sources whose configs are asked; all, where a formula leaves open which."""
    heads = {name.partition(".")[0] for name in _needed_names(spec, back) if name not in variables}
    if heads & set(ROOMS) - set(spec.sources):
        return list(spec.sources)
    return [name for name in spec.sources if name in heads]


def _written(way: Way, made: str) -> str:
    if isinstance(way, MadeName):
        return _quoted(f"{made}:{way.text}")
    of = [_written(one, made) for one in way.of]
    many = OPS[way.op].many and not (len(of) == 1 and isinstance(way.of[0], MadeName) and way.of[0].many)
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
