"""A mapping as text: YAML as a person would write it, with what is not the default. For mappings without ops."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from shardmerge.mapping.spec import OutputSpec, Reference, Rule, SourceSpec, Spec

# Stands in YAML as it is, in flow lists and tables too.
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*|[0-9]+", re.ASCII)
_UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def spec_lines(spec: Spec, output: OutputSpec) -> Iterator[str]:
    """Yields the lines of a mapping whose rules take tensors as they are; ``output`` is what it says of its result."""
    yield "shardmerge: 1"
    yield "sources:"
    yield from (f"  {name}: {_source(source)}" for name, source in spec.sources.items())
    yield "output:"
    yield from (f"  {key}: {value}" for key, value in _output(output))
    if spec.use:
        yield f"use: {spec.use}"
    if spec.variables:
        yield "let:"
        yield from (f"  {name}: {_text(one.formula.text)}" for name, one in spec.variables.items())
    if spec.target is not None:
        roles = "".join(f", {role}: {source}" for role, source in spec.target.roles.items())
        yield f"target: {{name: {spec.target.name}{roles}}}  # its config.json, tokenizer and other files go along"
    if spec.rules:
        yield "tensors:"
        yield from (_rule(one) for one in spec.rules)
    if spec.drops:
        yield "drop:"
        yield from (f"  - {_text(f'{one.source}:{one.template}')}" for one in spec.drops)


def _source(source: SourceSpec) -> str:
    strip = f"[{', '.join(map(_text, source.strip))}]" if source.strip else ""
    view = source.view if source.view != "fp32" else ""
    said = {"view": view, "root": _text(source.root) if source.root else "", "strip": strip}
    more = "".join(f", {key}: {value}" for key, value in said.items() if value)
    return f"{{path: {_text(source.path)}{more}}}" if more else _text(source.path)


def _output(output: OutputSpec) -> Iterator[tuple[str, str]]:
    yield "path", _text(output.path)
    if output.dtype is not None:
        yield "dtype", output.dtype.torch
    if output.shard_size is not None:
        yield "shard_size", _size(output.shard_size)
    if output.format is not None:
        yield "format", output.format
    if output.root is not None:
        yield "root", _text(output.root)
    if output.files is not None:
        yield "files", output.files.mode
    if output.partial:
        yield "partial", "true"
    if output.optimizer:
        yield "optimizer", "true"


def _size(size: int) -> str:
    unit = next((unit for unit, factor in _UNITS.items() if size % factor == 0), "")
    return f"{size // _UNITS[unit]}{unit}" if unit else str(size)


def _rule(rule: Rule) -> str:
    """Returns a line for a rule with one candidate, a tensor as it is."""
    (taken,) = rule.candidates
    assert isinstance(taken, Reference)
    return f"  {_text(rule.target.text)}: {_text(f'{taken.source}:{taken.template}')}"


def _text(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
