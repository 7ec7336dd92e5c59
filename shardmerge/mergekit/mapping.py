"""A mapping for a merge configuration of mergekit: sources, rules, drops, target."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from shardmerge.mapping.near import listed
from shardmerge.mapping.pattern import escape
from shardmerge.mergekit.config import (
    MergeConfig,
    MergeInput,
    MergeSlice,
    ModelName,
    ParameterCase,
    not_sayable,
    read_mergekit,
)
from shardmerge.mergekit.terms import Moment, Written, method_of, term
from shardmerge.mergekit.text import MergeSources, written
from shardmerge.mergekit.vocabulary import JointVocabulary
from shardmerge.recognition.proposal import Proposal
from shardmerge.tensors import Catalog
from shardmerge.tensors.natural_order import natural_key

# Opens a model by its path as the configuration writes it.
Open = Callable[[str], Catalog]
Joined = Callable[[MergeConfig, Mapping[str, Catalog]], JointVocabulary]
# Returns the chat template that a merge asks for, from its models.
Templated = Callable[[MergeConfig, Mapping[str, Catalog]], str]
_LAYER = re.compile(r"^(.*?)\.(\d{1,9})\.(.+)$")
_EMBEDDING = re.compile(r"emb|wte|wpe")
_ALL = "{rest...}"


def propose_merge(  # three functions read files, which this room does not
    text: str,
    file: str,
    paths: Callable[[str], str],
    opened: Open,
    joined: Joined,
    templated: Templated,
    out: str = "out/merged",
) -> Proposal:
    """Returns the mapping that makes what mergekit makes of a configuration.

    Parameters
    ----------
    text, file
        The configuration, and its name for messages.
    paths
        Returns how the mapping writes a path.
    opened
        Opens a model; called only where layers or tokenizers are named.
    joined
        Returns the vocabulary of a merge that asks for one, from its models by the names they have there.
    templated
        Returns the chat template of a merge that asks for one, likewise.

    Raises
    ------
    ShardmergeError
        As ``read_mergekit``; ``not-sayable``.
    """
    configs = read_mergekit(text, file)
    named = {config.name: config for config in configs if config.name}
    wanted = [config for config in configs if not _is_used(config, configs)]
    if len(wanted) != 1:
        names = [config.name or "one without a name" for config in wanted]
        raise not_sayable(f"{len(wanted)} results: {listed(names)}", configs[-1].mark, "write a file for each of them")
    for config in configs:
        _check_tokenizer(config, alone=len(configs) == 1)
    writer = _Writer(wanted[0], named, MergeSources(paths), opened, joined)
    rules = dict(writer.rules())
    template = templated(wanted[0], writer.catalogs()) if wanted[0].chat_template is not None else ""
    lines = [
        "# Written by `shardmerge init` from a configuration of mergekit. `shardmerge plan` shows what it does.",
        *(f"# Look at this: {note}" for note in writer.notes),
        "shardmerge: 1",
        *writer.sources.lines(),
        f"output: {{path: {json.dumps(out)}{writer.dtype()}{writer.card()}}}",
        f"target: {{name: hf/model, text: {writer.donor(wanted[0])}{_template(template)}}}",
        *([writer.vocabulary] if writer.vocabulary else []),
        "tensors:",
        *(line for target, made in rules.items() for line in written(json.dumps(target, ensure_ascii=False), made, 1)),
        *writer.drops(),
    ]
    return Proposal("\n".join(lines) + "\n", tuple(writer.notes))


def _check_tokenizer(config: MergeConfig, *, alone: bool) -> None:
    for key, node in (("chat_template", config.chat_template), ("tokenizer", config.tokenizer)):
        if node is not None and not alone:
            raise not_sayable(f"`{key}` in one of several merges", node.mark, "run them one by one")


def _template(text: str) -> str:
    """Returns the key of a chat template, in quotes that keep its lines; nothing where there is none."""
    return f", chat_template: {json.dumps(text, ensure_ascii=False)}" if text else ""


def _is_used(config: MergeConfig, configs: Sequence[MergeConfig]) -> bool:
    models = {one.model for other in configs for part in other.slices for one in part.inputs}
    return bool(config.name) and config.name in models | {other.base for other in configs}


@dataclass(slots=True)
class _Writer:
    config: MergeConfig
    named: Mapping[str, MergeConfig]
    sources: MergeSources
    opened: Open
    joined: Joined
    notes: list[str] = field(default_factory=list)
    vocabulary: str = ""
    _used: dict[str, set[str]] = field(default_factory=dict)
    _taken: dict[str, set[int]] = field(default_factory=dict)

    def dtype(self) -> str:
        """Returns the type of the output as a key, nothing where none is said."""
        word = self.config.out_dtype or self.config.dtype
        return f", dtype: {word}" if word else ""

    def card(self) -> str:
        """Returns the key that asks for a card where no op says that models are merged."""
        return ", card: true" if not method_of(self.config).op else ""

    def donor(self, config: MergeConfig) -> str:
        """Returns the source whose config.json and tokenizer the result has: the base, else the first model."""
        model = config.base or config.slices[0].inputs[0].model
        return self.donor(self.named[model]) if model in self.named else self.sources.name(model)

    def rules(self) -> Iterator[tuple[str, Written]]:
        """Yields target templates and what they are made of."""
        self._note(self.config)
        parts = self._whole(self.config)
        if parts is not None:
            yield _ALL, term(self.config, parts, self._refer, Moment())
            yield from self._embeddings(parts)
            return
        if self.config.tokenizer is not None:
            raise not_sayable("`tokenizer` of a merge of layers", self.config.tokenizer.mark, "leave it out")
        yield from self._layers()

    def catalogs(self) -> dict[str, Catalog]:
        """Returns all models of the merge, the base first."""
        inputs = (one.model for part in self.config.slices for one in part.inputs)
        order = dict.fromkeys((*([self.config.base] if self.config.base else []), *inputs))
        return {model: self.opened(ModelName.of(model).path) for model in order}

    def _embeddings(self, part: MergeSlice) -> Iterator[tuple[str, Written]]:
        """Yields rules for the tensors over the vocabulary, where the models' tokenizers are made one."""
        if self.config.tokenizer is None:
            return
        catalogs = self.catalogs()
        joint = self.joined(self.config, catalogs)
        if not joint.changes:
            return
        names = {model: self.sources.name(model) for model in catalogs}
        for name in joint.models[joint.origin].tensors:
            refer = partial(joint.embedding, name=name, source=names)
            made = term(self.config, part, refer, Moment(name, 0.0))
            yield escape(name), made
        rows = joint.models[joint.origin].rows
        trim = ", trim: true" if joint.rows < rows else ""
        tokens = f", tokens: {json.dumps(list(joint.new), ensure_ascii=False)}" if joint.new else ""
        self.vocabulary = f"vocabulary: {{rows: {joint.rows}{trim}{tokens}}}"
        if joint.new:
            self.notes.append("tokens that the base lacks are added to its tokenizer as special ones")

    def _note(self, config: MergeConfig) -> None:
        op = method_of(config).op
        if op in ("dare", "della"):
            self.notes.append(
                "what is kept at random is drawn by `seed`: other elements than mergekit's, by the same law"
            )
        if op == "arcee_fusion":
            self.notes.append("quartiles are exact: mergekit draws a million elements where there are more")

    def _whole(self, config: MergeConfig) -> MergeSlice | None:
        """Returns the one slice that holds all layers of all its models, or None."""
        if config.whole:
            return config.slices[0]
        if len(config.slices) > 1:
            return None
        (part,) = config.slices
        every = all(one.layers == (0, _count(self._catalog(one), one)) for one in part.inputs)
        return MergeSlice(tuple(_without_layers(part.inputs)), part.base, part.parameters, part.mark) if every else None

    def _catalog(self, one: MergeInput) -> Catalog:
        if one.model in self.named:
            what = f"layers of the merge `{one.model}`"
            raise not_sayable(what, one.mark, "run that merge by itself, and name its directory here")
        return self.opened(ModelName.of(one.model).path)

    def _refer(self, model: str, name: str = _ALL) -> Written:
        """Returns a tensor of a model, or of a merge, rounded to the type in which mergekit would have written it."""
        if model not in self.named:
            self._used.setdefault(model, set()).add(name)
            return f"{self.sources.name(model)}:{name}"
        inner = self.named[model]
        self._note(inner)
        part = self._whole(inner)
        if part is None:
            what = f"the merge `{model}` of layers as a model of another one"
            raise not_sayable(what, inner.mark, "run that merge by itself, and name its directory here")
        made = term(inner, part, self._refer, Moment())
        word = inner.out_dtype or inner.dtype
        return {"op": "cast", "of": made, "dtype": word} if word else made

    # ---- layers of several models

    def _layers(self) -> Iterator[tuple[str, Written]]:
        first = self._catalog(self.config.slices[0].inputs[0])
        prefix = _stack(first, self.config.slices[0].inputs[0])
        loose = [name for name in first.names() if _LAYER.match(name) is None]
        for name in (name for name in loose if _EMBEDDING.search(name)):
            yield escape(name), self._one(self.config.slices[0], name)
        start = 0
        for part in self.config.slices:
            yield from self._slice(part, prefix, start)
            start += _length(part)
        for name in (name for name in loose if not _EMBEDDING.search(name)):
            yield escape(name), self._one(self.config.slices[-1], name)

    def _one(self, part: MergeSlice, name: str) -> Written:
        return term(self.config, part, lambda model: self._refer(model, escape(name)), Moment(name, 0.0))

    def _slice(self, part: MergeSlice, prefix: str, start: int) -> Iterator[tuple[str, Written]]:
        length = _length(part)
        lead = part.inputs[0]
        if any(re.search(r"\d", case.filter) for case in _cases(part, self.config)):
            what = "a filter with a number, where layers get other numbers"
            raise not_sayable(what, part.mark)
        for one in part.inputs:
            catalog = self._catalog(one)
            if _stack(catalog, one) != prefix:
                raise not_sayable(f"layers called otherwise than `{prefix}.N`", one.mark)
            if _bounds(one)[1] > _count(catalog, one):
                what = f"layers beyond the {_count(catalog, one)} of {one.model}"
                raise not_sayable(what, one.mark, f"write `layer_range: [{_bounds(one)[0]}, {_count(catalog, one)}]`")
            self._taken.setdefault(one.model, set()).update(range(*_bounds(one)))
        low = _bounds(lead)[0]
        if length == 1 or any(len(case.points) > 1 for case in _cases(part, self.config)):
            for step in range(length):
                yield self._layer(part, prefix, start + step, step)
            return
        names = self._names(lead, prefix, low, low + length)
        taken = "|".join(str(low + step) for step in range(length))

        def index(at: int) -> str:
            return f"{{i:{taken}}}" if at == low else _shifted(at - low)

        made = term(self.config, part, self._at(part, prefix, index), Moment("", None, names))
        yield f"{prefix}.{_shifted(start - low)}.{{rest...}}", made

    def _layer(self, part: MergeSlice, prefix: str, number: int, step: int) -> tuple[str, Written]:
        """Returns the rule of one layer of the result, whose parameters are numbers of its own."""
        length, low = _length(part), _bounds(part.inputs[0])[0] + step
        place = step / (length - 1) if length > 1 else 1.0
        names = self._names(part.inputs[0], prefix, low, low + 1)
        refer = self._at(part, prefix, lambda at: str(at + step))
        return f"{prefix}.{number}.{{rest...}}", term(self.config, part, refer, Moment("", place, names))

    def _at(self, part: MergeSlice, prefix: str, index: Callable[[int], str]) -> Callable[[str], Written]:
        lows = {one.model: _bounds(one)[0] for one in part.inputs}
        return lambda model: self._refer(model, f"{prefix}.{index(lows[model])}.{{rest...}}")

    def _names(self, one: MergeInput, prefix: str, low: int, high: int) -> tuple[str, ...]:
        found = []
        for name in self._catalog(one).names():
            match = _LAYER.match(name)
            if match is not None and match[1] == prefix and low <= int(match[2]) < high:
                found.append(name)
        return tuple(found)

    def drops(self) -> Iterator[str]:
        """Yields what of the models no slice takes."""
        lines = []
        for model, names in self._used.items() if _ALL not in next(iter(self._used.values()), {_ALL}) else ():
            taken = self._taken.get(model, set())
            gone: dict[str, list[int]] = {}
            for name in self.opened(ModelName.of(model).path).names():
                match = _LAYER.match(name)
                if match is None and escape(name) not in names:
                    lines.append(f"{self.sources.name(model)}:{escape(name)}")
                elif match is not None and int(match[2]) not in taken:
                    gone.setdefault(match[1], []).append(int(match[2]))
            for prefix, numbers in gone.items():
                one, *others = every = sorted(set(numbers))
                index = f"{{i:{'|'.join(map(str, every))}}}" if others else str(one)
                lines.append(f"{self.sources.name(model)}:{prefix}.{index}.{{rest...}}")
        if lines:
            yield "drop:"
            yield from (f"  - {json.dumps(line, ensure_ascii=False)}" for line in sorted(lines, key=natural_key))


def _without_layers(inputs: Sequence[MergeInput]) -> Iterator[MergeInput]:
    return (MergeInput(one.model, None, one.parameters, one.mark) for one in inputs)


def _bounds(one: MergeInput) -> tuple[int, int]:
    assert one.layers is not None  # a slice names them
    return one.layers


def _length(part: MergeSlice) -> int:
    lengths = {_bounds(one)[1] - _bounds(one)[0] for one in part.inputs}
    if len(lengths) != 1:
        raise not_sayable("a slice of unequal numbers of layers", part.mark, "take as many layers of each model")
    return lengths.pop()


def _stack(catalog: Catalog, one: MergeInput) -> str:
    """Returns what stands before the number of a layer."""
    found = {match[1] for name in catalog.names() if (match := _LAYER.match(name)) is not None}
    if len(found) != 1:
        what = f"`slices` of a model with {len(found)} stacks of layers: {listed(sorted(found))}"
        raise not_sayable(what, one.mark, "write a merge with `models`")
    return found.pop()


def _count(catalog: Catalog, one: MergeInput) -> int:
    prefix = _stack(catalog, one)
    numbers = (match for name in catalog.names() if (match := _LAYER.match(name)) is not None)
    return 1 + max(int(match[2]) for match in numbers if match[1] == prefix)


def _shifted(by: int) -> str:
    return "{i}" if not by else f"{{i {'+' if by > 0 else '-'} {abs(by)}}}"


def _cases(part: MergeSlice, config: MergeConfig) -> Iterator[ParameterCase]:
    scopes = (config.parameters, part.parameters, *(one.parameters for one in part.inputs))
    return (case for scope in scopes for parameter in scope.values() for case in parameter.cases)
