"""mapping.yaml as a value, every part with its place in the file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.sizes import parse_size
from shardmerge.mapping.yaml_nodes import LARGEST_TEXT, QUOTE_BRACES, Items, Mark, Node, Scalar, Table, read_yaml

_SOURCE_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_NOWHERE = Mark("", 1, 1)
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A named source.

    Attributes
    ----------
    name, path
        The path as written: relative to the mapping, absolute, or a hub id.
    required
        Whether it is an error if nothing is there.
    view
        ``fp32`` or ``module``, for DeepSpeed; empty for the default.
    root
        Dotted path of the state dict inside a torch file; empty to find it.
    """

    name: str
    path: str
    required: bool = True
    view: str = ""
    root: str = ""
    mark: Mark = _NOWHERE


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """Where the result goes and how it is written; ``None`` keeps the default."""

    path: str
    dtype: DType | None
    shard_size: int | None
    mark: Mark


@dataclass(frozen=True, slots=True)
class Reference:
    """``source:template``."""

    source: str
    template: Template
    mark: Mark


@dataclass(frozen=True, slots=True)
class Rule:
    """A target template and its candidates, the first that has the tensor winning."""

    target: Template
    candidates: tuple[Reference, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Drop:
    """Source tensors that are not wanted. ``optional`` ones (a preset's) may match nothing."""

    source: str
    template: Template
    mark: Mark
    optional: bool = False


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A target and which source plays which role for it."""

    name: str
    roles: Mapping[str, str]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole mapping."""

    file: str
    sources: dict[str, SourceSpec]
    output: OutputSpec | None
    use: str
    target: TargetSpec | None
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]


def load_spec(path: Path) -> Spec:
    """Reads a mapping file.

    Raises
    ------
    UsageError
        ``missing-path``: no such file. ``unreadable-mapping``: the system refused, or it is not UTF-8.
    MappingError
        Everything that is wrong with it, at once.
    """
    try:
        with path.open("rb") as file:
            # A checkpoint given by mistake is not read to its end; what is too long is refused with the YAML.
            text = file.read(4 * LARGEST_TEXT + 4).decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise UsageError("missing-path", "no such mapping", where=str(path), hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("unreadable-mapping", f"cannot read the mapping: {error}", where=str(path)) from error
    return parse_spec(text, str(path))


def parse_spec(text: str, file: str) -> Spec:
    """Returns the mapping that a YAML text says; ``file`` is its name in messages.

    Raises
    ------
    MappingError
        As ``load_spec``.
    """
    reader = Reader(file)
    root = reader.table(read_yaml(text, file), "the mapping")
    fields = reader.fields(root, ("shardmerge", "sources", "output", "use", "target", "tensors", "drop"))
    reader.version(fields.get("shardmerge"), "shardmerge", root.mark)
    sources = reader.sources(fields.get("sources"), root.mark)
    use = reader.text(fields["use"], "use") if "use" in fields else ""
    known = None if use else frozenset(sources)  # a preset may bring sources of its own
    spec = Spec(
        file,
        sources,
        reader.output(fields["output"]) if "output" in fields else None,
        use,
        reader.target(fields["target"]) if "target" in fields else None,
        reader.rules(fields["tensors"], known) if "tensors" in fields else (),
        reader.drops(fields["drop"], known) if "drop" in fields else (),
    )
    if not use and not spec.rules and not reader.problems:
        reader.add("no-rules", "the mapping says neither `use:` nor `tensors:`", root.mark, "add `use: PRESET`")
    raise_all(reader.problems)
    return spec


@dataclass(slots=True)
class Reader:
    """Turns nodes into values and collects what is wrong with them."""

    file: str
    problems: list[ShardmergeError] = field(default_factory=list)

    def add(self, code: str, what: str, mark: Mark, hint: str = "") -> None:
        """Remembers a problem."""
        self.problems.append(MappingError(code, what, where=str(mark), hint=hint))

    def table(self, node: Node, what: str) -> Table:
        """Returns the node as a mapping, an empty one if it is something else."""
        if isinstance(node, Table):
            return node
        self.add("wrong-kind", f"{what} is a set of `key: value` lines", node.mark)
        return Table((), node.mark)

    def fields(self, table: Table, known: tuple[str, ...]) -> dict[str, Node]:
        """Returns the values by key; unknown keys are problems."""
        for key, _ in table.entries:
            if key.text not in known:
                self.add("unknown-key", f"unknown key `{key.text}`", key.mark, did_you_mean(key.text, known))
        return {key.text: node for key, node in table.entries if key.text in known}

    def text(self, node: Node, what: str) -> str:
        """Returns the node's text, or ``""`` with a problem."""
        if isinstance(node, Scalar) and not node.empty:
            return node.text
        self.add("wrong-kind", f"`{what}` is a piece of text", node.mark)
        return ""

    def flag(self, node: Node, what: str) -> bool:
        """Returns true or false; YAML 1.1's yes and no are not taken."""
        if isinstance(node, Scalar) and not node.quoted and node.text in ("true", "false"):
            return node.text == "true"
        self.add("wrong-kind", f"`{what}` is true or false", node.mark)
        return False

    def version(self, node: Node | None, key: str, mark: Mark) -> None:
        """Checks ``shardmerge: 1``."""
        if node is None:
            self.add("no-version", f"the first line says `{key}: 1`", mark, f"add `{key}: 1`")
        elif not isinstance(node, Scalar) or node.text != "1":
            self.add("unknown-version", f"this shardmerge reads `{key}: 1`", node.mark, f"write `{key}: 1`")

    def sources(self, node: Node | None, mark: Mark) -> dict[str, SourceSpec]:
        """Reads ``sources:``."""
        if node is None:
            self.add("no-sources", "the mapping has no `sources:`", mark, "add `sources: {trained: PATH}`")
            return {}
        found = {}
        for key, value in self.table(node, "`sources`").entries:
            if not _SOURCE_NAME.fullmatch(key.text):
                self.add("bad-source-name", f"{key.text!r} cannot name a source", key.mark, "use a-z, 0-9, _ and -")
            found[key.text] = self._source(key, value)
        return found

    def _source(self, key: Scalar, node: Node) -> SourceSpec:
        if isinstance(node, Scalar):
            return SourceSpec(key.text, self.text(node, key.text), mark=node.mark)
        fields = self.fields(self.table(node, f"`{key.text}`"), ("path", "required", "view", "root"))
        if "path" not in fields:
            self.add("no-path", f"the source `{key.text}` has no path", key.mark, "add `path: ...`")
        view = self.text(fields["view"], "view") if "view" in fields else ""
        if view not in ("", "fp32", "module"):
            self.add("unknown-view", f"there is no view {view!r}", fields["view"].mark, "fp32 or module")
        return SourceSpec(
            key.text,
            self.text(fields["path"], "path") if "path" in fields else "",
            self.flag(fields["required"], "required") if "required" in fields else True,
            view,
            self.text(fields["root"], "root") if "root" in fields else "",
            key.mark,
        )

    def output(self, node: Node) -> OutputSpec | None:
        """Reads ``output:``, a path or a set of keys."""
        if isinstance(node, Scalar):
            return OutputSpec(self.text(node, "output"), None, None, node.mark)
        fields = self.fields(self.table(node, "`output`"), ("path", "dtype", "shard_size"))
        path = self.text(fields["path"], "path") if "path" in fields else ""
        dtype = self._said(fields.get("dtype"), "dtype", float_dtype)
        size = self._said(fields.get("shard_size"), "shard_size", parse_size)
        if "path" not in fields:
            self.add("no-path", "`output` has no path", node.mark, "add `path: out/model`")
        return OutputSpec(path, dtype, size, node.mark)

    def _said(self, node: Node | None, what: str, read: Callable[[str], _Value]) -> _Value | None:
        """Returns what ``read`` makes of the text; its error gets the place in the file."""
        if node is None:
            return None
        try:
            return read(self.text(node, what))
        except UsageError as error:
            self.problems.append(
                MappingError(error.code, error.what, where=str(node.mark), expected=error.expected, hint=error.hint)
            )
            return None

    def target(self, node: Node) -> TargetSpec | None:
        """Reads ``target:``: a name, and the source of each role."""
        if isinstance(node, Scalar):
            return TargetSpec(self.text(node, "target"), {}, node.mark)
        table = self.table(node, "`target`")
        texts = {key.text: self.text(value, key.text) for key, value in table.entries}
        if "name" not in texts:
            self.add("no-target-name", "`target` has no name", table.mark, "add `name: hf/llava`")
        return TargetSpec(texts.pop("name", ""), texts, table.mark)

    def rules(self, node: Node, known: frozenset[str] | None) -> tuple[Rule, ...]:
        """Reads ``tensors:``; ``known`` are the sources a reference may name, None for any."""
        found = (self._rule(key, value, known) for key, value in self.table(node, "`tensors`").entries)
        return tuple(rule for rule in found if rule is not None)

    def _rule(self, key: Scalar, node: Node, known: frozenset[str] | None) -> Rule | None:
        target = self._template(key.text, key.inside)
        nodes = node.nodes if isinstance(node, Items) else (node,)
        references = [self._candidate(item, known) for item in nodes]
        if not nodes:
            self.add("no-candidates", f"`{key.text}` names no source tensor", key.mark, "[trained:{rest...}]")
        candidates = tuple(reference for reference in references if reference is not None)
        if target is None or len(candidates) != len(references) or not candidates:
            return None
        for reference in candidates:
            self._check_captures(target, reference)
        return Rule(target, candidates, key.mark)

    def _candidate(self, node: Node, known: frozenset[str] | None) -> Reference | None:
        if isinstance(node, Table):
            ops = [value.text for name, value in node.entries if name.text == "op" and isinstance(value, Scalar)]
            if not ops:  # `[src:{x}]` is valid YAML: a list that holds a table
                self.add("wrong-kind", "a candidate is one `source:name`", node.mark, QUOTE_BRACES)
                return None
            what = f"the op `{ops[0]}` is not part of this version, which renames and casts"
            self.add("op-not-yet", what, node.mark)
            return None
        if isinstance(node, Items):
            self.add("wrong-kind", "a candidate is one `source:name`", node.mark)
            return None
        return self.reference(node, known)

    def reference(self, node: Scalar, known: frozenset[str] | None) -> Reference | None:
        """Reads ``source:template``."""
        source, colon, text = node.text.partition(":")
        if not colon or not _SOURCE_NAME.fullmatch(source):
            hint = f"write `{next(iter(sorted(known)))}:{node.text}`" if known else "write `source:name`"
            self.add("no-source", f"`{node.text}` does not say which source it is of", node.mark, hint)
            return None
        if known is not None and source not in known:
            self.add("unknown-source", f"there is no source `{source}`", node.mark, did_you_mean(source, known))
            return None
        template = self._template(text, node.inside.right(len(source) + 1))
        return Reference(source, template, node.mark) if template else None

    def drops(self, node: Node, known: frozenset[str] | None, *, optional: bool = False) -> tuple[Drop, ...]:
        """Reads ``drop:``, a list of references."""
        if not isinstance(node, Items):
            self.add("wrong-kind", "`drop` is a list of `- source:name` lines", node.mark)
            return ()
        return tuple(self._drops(node, known, optional=optional))

    def _drops(self, items: Items, known: frozenset[str] | None, *, optional: bool) -> Iterator[Drop]:
        for node in items.nodes:
            if not isinstance(node, Scalar):
                self.add("wrong-kind", "a drop is one `source:name`", node.mark)
                continue
            reference = self.reference(node, known)
            if reference is not None:
                yield Drop(reference.source, reference.template, reference.mark, optional)

    def _template(self, text: str, mark: Mark) -> Template | None:
        try:
            template = Template.parse(text, mark)
        except MappingError as error:
            self.problems.append(error)
            return None
        if template.collects:
            self.add("op-not-yet", "`{e*}` collects names for an op, and ops are not part of this version", mark)
            return None
        return template

    def _check_captures(self, target: Template, reference: Reference) -> None:
        """Both sides bind the same captures: else one name would have two sources, or a capture no value."""
        ours, theirs = set(target.captures), set(reference.template.captures)
        for name in sorted(ours ^ theirs):
            side = "the source name" if name in ours else "the target name"
            self.add(
                "unbound-capture",
                f"{{{name}}} is missing in {side}: `{target}` from `{reference.source}:{reference.template}`",
                reference.mark,
                "use the same captures on both sides; fix the value with {x:a} or drop what is left over",
            )
