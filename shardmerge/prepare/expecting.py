"""What the target of a mapping expects of its sources, and what is said of the output to no effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.codes import leaves_all_codes, odd_company
from shardmerge.mapping.resolution import Resolution
from shardmerge.mapping.spec import Spec, TargetSpec
from shardmerge.mapping.variables import Variables
from shardmerge.prepare.dequantizing import as_plain
from shardmerge.prepare.mapping_checks import target_of
from shardmerge.prepare.merge_card import with_card
from shardmerge.prepare.options import Options
from shardmerge.prepare.ready import Ready
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.changed_config import with_changes
from shardmerge.targets.expectation import Expectation, Format, Request, Target
from shardmerge.tensors import Catalog

# What each format calls its files, where a target does not leave that to the user.
_SUFFIXES: dict[Format, set[str]] = {"safetensors": {".safetensors"}, "bin": {".bin", ".pth"}}


def expectation_of(ready: Ready, catalogs: Mapping[str, Catalog]) -> Expectation | None:
    """Returns what the target expects of these sources, side files and all; None without a target."""
    opened, read = ready.opened, ready.variables.read
    if opened.spec.target is None:
        return None
    target = target_of(opened.spec.target)
    made = with_card(target.expect(_request(ready, opened.spec.target, target, catalogs)), ready)
    return with_changes(with_side_files(made, read, opened.files, opened.output.where), ready.changes, read)


def _request(ready: Ready, said: TargetSpec, target: Target, catalogs: Mapping[str, Catalog]) -> Request:
    return Request(
        roles={role: source for role, source in said.roles.items() if role in target.roles},
        options={key: _option(text, ready.variables) for key, text in said.roles.items() if key in target.options},
        catalogs=catalogs,
        read=ready.variables.read,
        dtype=ready.opened.output.dtype,
        vocabulary=ready.opened.spec.vocabulary,
        where=str(said.mark),
        dropped=frozenset(pair for pair, drop in ready.dropped.lines.items() if not drop.optional),
        command_line=ready.opened.spec.from_options,
    )


def codes_agree(ready: Ready, resolution: Resolution, expectation: Expectation | None) -> Expectation | None:
    """Checks codes beside a config.json that speaks of them; where none of them is written, neither is its word."""
    made = resolution.assignments
    for name in ready.needs.published:
        raise_all(odd_company(made, ready.beside, name, ready.settled.skipped[name]))
        catalog = ready.beside[name]
        if expectation and leaves_all_codes(made.values(), name, catalog):
            plain = expectation_of(ready, {**ready.beside, name: as_plain(catalog)})
            expectation = replace(plain or expectation, warnings=(*expectation.warnings, _left_out(name, catalog)))
    return expectation


def _left_out(name: str, catalog: Catalog) -> str:
    return f"{name}: config.json says {catalog.quantized}, and no tensor is: its quantization_config is left out"


def idle_words(spec: Spec, expectation: Expectation | None) -> Iterator[ShardmergeError]:
    """Yields an error for what is said of the output and has no effect on it."""
    if spec.vocabulary is not None and spec.target is None:
        # Nobody knows which tensors have the vocabulary's rows, and nothing would be resized.
        yield MappingError(
            "no-target",
            "`vocabulary` is for a target, and the mapping has none",
            where=spec.file,
            hint="add `target: {name: hf/llama, text: SOURCE}`, or the op `new_rows` for single tensors",
        )
    if spec.target is None and spec.output is not None and spec.output.card:
        hint = "add `target: {name: hf/model, text: SOURCE}`, or remove `card`"
        yield MappingError("no-effect", "a card is for a target, and the mapping has none", where=spec.file, hint=hint)
    if spec.target is None or expectation is None:
        return
    if spec.vocabulary is not None and not expectation.resized:
        what = f"`vocabulary` has no effect: {spec.target.name} has no tensor over the vocabulary"
        yield MappingError("no-effect", what, where=str(spec.target.mark), hint="remove `vocabulary`")


def with_format_warning(spec: Spec, options: Options, expectation: Expectation | None) -> Expectation | None:
    """Says of a format that the target's own kind of file goes before it: Meta's code reads .pth alone."""
    said = options.format or (spec.output.format if spec.output else None)
    if said is None or expectation is None or spec.target is None:
        return expectation
    suffixes = {group.suffix for group in expectation.groups}
    if "" in suffixes or suffixes & _SUFFIXES.get(said, set()):
        return expectation
    text = f"the format `{said}` has no effect: {spec.target.name} always writes {', '.join(sorted(suffixes))}"
    return replace(expectation, warnings=(*expectation.warnings, text))


def _option(text: str, variables: Variables) -> str:
    """An option of a target may be a number of ``let:``, by its name."""
    return str(variables.get(text)) if text in variables.variables else text
