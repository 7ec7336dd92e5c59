"""mapping.yaml: the sources, the output, and what each target tensor is made of."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import MappingError, UsageError
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.rules import (
    SOURCE_NAME,
    Drop,
    Findings,
    Reference,
    Rule,
    TargetSpec,
    as_flag,
    as_table,
    as_text,
    fields,
    parse_drops,
    parse_rules,
    parse_target,
    required_field,
)
from shardmerge.mapping.yaml_nodes import LARGEST_TEXT, Mark, Node, Scalar, Table, read_yaml

__all__ = [
    "Drop", "Mark", "OutputSpec", "Reference", "Rule", "SourceSpec", "Spec", "TargetSpec",
    "load_spec", "parse_size", "parse_spec", "read_text", "unused_sources",
]  # fmt: skip

VERSION = "1"

_KEYS = ("shardmerge", "sources", "output", "use", "target", "tensors", "drop")
_SOURCE_KEYS = ("path", "required", "view", "root")
_OUTPUT_KEYS = ("path", "dtype", "shard_size")
_VIEWS = ("fp32", "module")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(?P<number>[0-9]{1,15}(\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A checkpoint to read.

    Attributes
    ----------
    name
        What references call it.
    path
        As written: a file, a directory, or a hub id. Relative paths are relative to the mapping's directory.
    required
        Whether it is an error if there is nothing at ``path``.
    view
        For DeepSpeed: ``fp32`` master weights or the 16-bit ``module``; ``""`` leaves it to the reader.
    root
        Key of the state dict in the file, or ``""`` to find it.
    mark
        Where the mapping names it.
    """

    name: str
    path: str
    required: bool = True
    view: str = ""
    root: str = ""
    mark: Mark = Mark("", 1, 1)


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The directory to write.

    Attributes
    ----------
    path
        As written.
    dtype
        What floating-point tensors become; None keeps each one's own.
    shard_size
        Largest shard in bytes; None for the default.
    mark
        Where the mapping says so.
    """

    path: str
    dtype: DType | None
    shard_size: int | None
    mark: Mark


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole mapping.

    Attributes
    ----------
    file
        The file's name, as marks carry it.
    sources
        By name.
    output
        None where the file leaves it out.
    use
        The preset's name, or ``""``.
    target
        None if only the rules say what the result is; nothing is then expected of it.
    rules, drops
        In the order written.
    """

    file: str
    sources: Mapping[str, SourceSpec]
    output: OutputSpec | None
    use: str
    target: TargetSpec | None
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]


def load_spec(path: Path) -> Spec:
    """Returns what a mapping file says; paths in it stay as written.

    Raises
    ------
    UsageError
        ``missing-file``.
    MappingError, Problems
        See ``parse_spec``.
    """
    return parse_spec(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Returns the text of a file that is meant to be a mapping."""
    if not path.exists():
        hint = "`shardmerge presets list` shows ready-made mappings"
        raise UsageError("missing-file", "there is no such mapping file", where=str(path), hint=hint)
    if not path.is_file():
        raise UsageError("not-a-file", "a mapping is a YAML file", where=str(path))
    try:
        with path.open("rb") as file:
            # Four bytes a character at the most; one more character shows that the text is too large.
            data = file.read(4 * LARGEST_TEXT + 4)
    except OSError as error:
        what = f"the mapping file cannot be read: {error.strerror}"
        raise UsageError("unreadable-file", what, where=str(path)) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "is this a checkpoint? A mapping is a text file: `shardmerge run mapping.yaml`"
        where = f"{path} byte {error.start}"
        raise MappingError("not-utf8", "a mapping file is UTF-8 text", where=where, hint=hint) from error


def parse_spec(text: str, file: str) -> Spec:
    """Returns what the text of a mapping file says.

    Parameters
    ----------
    text
        The YAML.
    file
        The name that messages give it.

    Raises
    ------
    MappingError, Problems
        All that is wrong with the file at once, each with ``file:line:col``.
    """
    root = as_table(read_yaml(text, file), "a mapping file")
    findings = Findings()
    found = fields(root, _KEYS, "a mapping file", findings)
    with findings.collecting():
        _check_version(root, found)
    with findings.collecting():
        _check_complete(root, found)
    sources = _sources(found.get("sources"), findings)
    spec = _spec(file, found, sources, findings)
    if not findings.errors and not spec.use:
        findings.errors.extend(unused_sources(spec))
    findings.raise_all()
    return spec


def _spec(file: str, found: dict[str, Node], sources: dict[str, SourceSpec], findings: Findings) -> Spec:
    # Names of sources that are wrong themselves count as declared: one mistake, one error.
    declared = _declared(found.get("sources"))
    output: OutputSpec | None = None
    target: TargetSpec | None = None
    rules: tuple[Rule, ...] = ()
    drops: tuple[Drop, ...] = ()
    use = ""
    with findings.collecting():
        output = _output(found["output"], findings) if "output" in found else None
    with findings.collecting():
        use = as_text(found["use"], "`use`").text if "use" in found else ""
    with findings.collecting():
        target = parse_target(found["target"], declared, findings) if "target" in found else None
    with findings.collecting():
        rules = parse_rules(found["tensors"], declared, findings) if "tensors" in found else ()
    with findings.collecting():
        drops = parse_drops(found["drop"], declared, findings) if "drop" in found else ()
    return Spec(file, sources, output, use, target, rules, drops)


def _check_version(root: Table, found: Mapping[str, Node]) -> None:
    if "shardmerge" not in found:
        what = "a mapping file begins with the version of its language"
        raise MappingError("missing-version", what, where=str(root.mark), hint="shardmerge: 1")
    version = as_text(found["shardmerge"], "`shardmerge`")
    if version.text != VERSION:
        raise MappingError(
            "unknown-version",
            "this version of shardmerge reads mappings of version 1",
            where=str(version.mark),
            found=version.text[:40],
            expected=VERSION,
            hint="shardmerge: 1",
        )


def _check_complete(root: Table, found: Mapping[str, Node]) -> None:
    required_field(found, "sources", "a mapping file", root)
    if "use" not in found and "tensors" not in found:
        what = "the mapping says nothing about tensors"
        hint = "name a preset (`use: xtuner/llava-to-hf`) or write rules under `tensors:`"
        raise MappingError("nothing-to-do", what, where=str(root.mark), hint=hint)


# --- sources ---


def _declared(node: Node | None) -> tuple[str, ...]:
    return tuple(key.text for key, _ in node.entries) if isinstance(node, Table) else ()


def _sources(node: Node | None, findings: Findings) -> dict[str, SourceSpec]:
    sources: dict[str, SourceSpec] = {}
    if node is None:
        return sources
    with findings.collecting():
        for key, value in as_table(node, "`sources`").entries:
            with findings.collecting():
                sources[key.text] = _source(key, value, findings)
    return sources


def _source(key: Scalar, value: Node, findings: Findings) -> SourceSpec:
    if not SOURCE_NAME.fullmatch(key.text):
        what = f"`{key.text[:80]}` cannot be the name of a source"
        hint = "lower-case letters, digits, `_` and `-`, beginning with a letter"
        raise MappingError("bad-source-name", what, where=str(key.mark), hint=hint)
    what = f"the source `{key.text}`"
    if isinstance(value, Scalar):
        return SourceSpec(key.text, as_text(value, what).text, mark=key.mark)
    found = fields(value, _SOURCE_KEYS, what, findings)
    path = as_text(required_field(found, "path", what, value), f"the path of {what}").text
    required = as_flag(found["required"], "`required`") if "required" in found else True
    root = as_text(found["root"], "`root`").text if "root" in found else ""
    return SourceSpec(key.text, path, required, _view(found.get("view")), root, key.mark)


def _view(node: Node | None) -> str:
    if node is None:
        return ""
    view = as_text(node, "`view`")
    if view.text not in _VIEWS:
        what = f"there is no view `{view.text[:40]}`"
        raise MappingError(
            "unknown-view", what, where=str(view.mark), expected="fp32 (master weights) or module (16-bit)",
            hint=did_you_mean(view.text, _VIEWS),
        )  # fmt: skip
    return view.text


def unused_sources(spec: Spec, also_known: Iterable[str] = ()) -> list[MappingError]:
    """Returns an error for each source that no rule, drop or role names; ``also_known`` helps the hints."""
    used = {reference.source for rule in spec.rules for reference in rule.candidates}
    used.update(drop.source for drop in spec.drops)
    used.update(spec.target.roles.values() if spec.target else ())
    free = {*used, *also_known} - set(spec.sources)
    return [_unused(source, free) for name, source in spec.sources.items() if name not in used]


def _unused(source: SourceSpec, free: Collection[str]) -> MappingError:
    what = f"the source `{source.name}` is declared, and nothing is taken from it"
    hint = did_you_mean(source.name, free) or "remove it, or name it in a rule under `tensors:`"
    return MappingError("unused-source", what, where=str(source.mark), hint=hint)


# --- output ---


def _output(node: Node, findings: Findings) -> OutputSpec:
    if isinstance(node, Scalar):
        return OutputSpec(as_text(node, "`output`").text, None, None, node.mark)
    found = fields(node, _OUTPUT_KEYS, "`output`", findings)
    dtype, size = None, None
    with findings.collecting():
        dtype = _dtype(found["dtype"]) if "dtype" in found else None
    with findings.collecting():
        size = _shard_size(found["shard_size"]) if "shard_size" in found else None
    path = as_text(required_field(found, "path", "`output`", node), "the path of `output`").text
    return OutputSpec(path, dtype, size, node.mark)


def _dtype(node: Node) -> DType:
    scalar = as_text(node, "`dtype`")
    try:
        return float_dtype(scalar.text)
    except UsageError as error:
        raise _at(scalar, error) from error


def _shard_size(node: Node) -> int:
    scalar = as_text(node, "`shard_size`")
    try:
        return parse_size(scalar.text)
    except UsageError as error:
        raise _at(scalar, error) from error


def _at(scalar: Scalar, error: UsageError) -> MappingError:
    return MappingError(
        error.code, error.what, where=str(scalar.mark), expected=error.expected, hint=error.hint
    )


def parse_size(text: str) -> int:
    """Returns the bytes that ``5GB``, ``500 MB`` or ``1000000`` stand for; units are decimal.

    Raises
    ------
    UsageError
        ``bad-size``: not a size, a binary unit, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match["unit"] if match else ""
    if match is None or unit not in _UNITS:
        what = f"{text[:40]!r} is not a size"
        hint = _size_hint(match["number"], unit) if match else ""
        raise UsageError("bad-size", what, expected="bytes, or a number with KB, MB, GB or TB", hint=hint)
    size = int(Fraction(match["number"]) * _UNITS[unit])
    if size < 1:
        raise UsageError("bad-size", "a size is at least one byte", expected="for example 5GB")
    return size


def _size_hint(number: str, unit: str) -> str:
    if unit.upper() in _BINARY_UNITS:
        megabytes = -(-Fraction(number) * _BINARY_UNITS[unit.upper()] // _UNITS["MB"])
        return f"sizes are decimal (1GB is 1,000,000,000 bytes): {number}{unit} is about {megabytes}MB"
    return f"did you mean `{number}{unit.upper()}`?" if unit.upper() in _UNITS else ""
