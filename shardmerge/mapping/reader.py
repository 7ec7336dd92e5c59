"""Reads mapping.yaml: text in, a ``Spec`` out, everything that is wrong with it at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.arithmetic import Formula
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.sizes import parse_size
from shardmerge.mapping.spec import (
    ADAPTER_SETTINGS,
    CONFIG_KEYS,
    FILES_KEYS,
    KEYS,
    OUTPUT_KEYS,
    SOURCE_KEYS,
    VOCABULARY_KEYS,
    AdapterSpec,
    Argument,
    Drop,
    OpTerm,
    OutputSpec,
    Reference,
    Rule,
    SourceSpec,
    Spec,
    TargetSpec,
    Term,
    Variable,
    references,
)
from shardmerge.mapping.yaml_nodes import LARGEST_TEXT, QUOTE_BRACES, Items, Mark, Node, Scalar, Table, json_value
from shardmerge.mapping.yaml_text import read_yaml
from shardmerge.ops.contract import OpKind, Param
from shardmerge.ops.row_init import ROW_INITS, row_init
from shardmerge.targets.config_edits import ConfigEdits
from shardmerge.targets.expectation import FILE_MODES, FileChoice, Format, Vocabulary

_SOURCE_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_Value = TypeVar("_Value")


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
    fields = reader.fields(root, KEYS)
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
        (*reader.rules(fields.get("tensors"), known), *reader.rest(fields.get("rest"), known)),
        reader.drops(fields["drop"], known) if "drop" in fields else (),
        reader.variables(fields["let"]) if "let" in fields else {},
        reader.adapters(fields["adapters"], known) if "adapters" in fields else (),
        reader.vocabulary(fields["vocabulary"]) if "vocabulary" in fields else None,
        config=reader.config(fields["config"]) if "config" in fields else ConfigEdits(),
    )
    if not use and not spec.rules and not reader.problems:
        reader.add(
            "no-rules",
            "the mapping says neither `use:` nor `tensors:`",
            root.mark,
            "add `use: PRESET`, one of `shardmerge presets list`",
        )
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
                self.add(
                    "bad-source-name", f"{key.text!r} cannot name a source", key.mark, f"call it `{_plain(key.text)}`"
                )
            found[key.text] = self._source(key, value)
        return found

    def _source(self, key: Scalar, node: Node) -> SourceSpec:
        if isinstance(node, Scalar):
            return SourceSpec(key.text, self.text(node, key.text), mark=node.mark)
        fields = self.fields(self.table(node, f"`{key.text}`"), SOURCE_KEYS)
        if "path" not in fields:
            self.add("no-path", f"the source `{key.text}` has no path", key.mark, "add `path: PATH`")
        view = self.text(fields["view"], "view") if "view" in fields else ""
        if view not in ("", "fp32", "module"):
            self.add(
                "unknown-view",
                f"there is no view {view!r}",
                fields["view"].mark,
                "write `view: module` or `view: fp32`",
            )
        return SourceSpec(
            key.text,
            self.text(fields["path"], "path") if "path" in fields else "",
            self.flag(fields["required"], "required") if "required" in fields else True,
            view,
            self.text(fields["root"], "root") if "root" in fields else "",
            key.mark,
            self.text(fields["strip"], "strip") if "strip" in fields else "",
        )

    def output(self, node: Node) -> OutputSpec | None:
        """Reads ``output:``, a path or a set of keys."""
        if isinstance(node, Scalar):
            return OutputSpec(self.text(node, "output"), None, None, node.mark)
        fields = self.fields(self.table(node, "`output`"), OUTPUT_KEYS)
        path = self.text(fields["path"], "path") if "path" in fields else ""
        dtype = self._said(fields.get("dtype"), "dtype", float_dtype)
        size = self._said(fields.get("shard_size"), "shard_size", parse_size)
        if "path" not in fields:
            self.add("no-path", "`output` has no path", node.mark, "add `path: out/model`")
        dtypes = (*self._kept(fields.get("keep")), *self._dtypes(fields.get("dtypes")))
        partial = self.flag(fields["partial"], "partial") if "partial" in fields else False
        form, files = self._format(fields.get("format")), self._files(fields.get("files"))
        return OutputSpec(path, dtype, size, node.mark, dtypes, form, partial, files)

    def _files(self, node: Node | None) -> FileChoice | None:
        """Reads ``files:``, one word, or patterns of names to include and exclude."""
        if node is None:
            return None
        if isinstance(node, Table):
            fields = self.fields(node, FILES_KEYS)
            lists = {key: self._list(fields.get(key), key) for key in FILES_KEYS}
            return FileChoice("model", *(tuple(self.text(each, key) for each in lists[key]) for key in FILES_KEYS))
        mode = next((mode for mode in FILE_MODES if mode == self.text(node, "files")), None)
        if mode is None:
            what = "`files` is model, all or none, or `{include: [...], exclude: [...]}`"
            self.add("unknown-files", what, node.mark, "write `files: model` or `files: all`")
            return None
        return FileChoice(mode)

    def _kept(self, node: Node | None) -> Iterator[tuple[Template, DType | None]]:
        """Reads ``keep:``: target names whose tensors keep their own type."""
        for item in self._list(node, "keep"):
            template = self._template(self.text(item, "keep"), item.mark)
            if template is not None:
                yield template, None

    def _dtypes(self, node: Node | None) -> Iterator[tuple[Template, DType | None]]:
        """Reads ``dtypes:``: a type for some target names."""
        for key, value in self.table(node, "`dtypes`").entries if node is not None else ():
            template, dtype = self._template(key.text, key.inside), self._said(value, "dtypes", float_dtype)
            if template is not None and dtype is not None:
                yield template, dtype

    def _format(self, node: Node | None) -> Format | None:
        if node is None:
            return None
        text = self.text(node, "format")
        if text == "bin":
            return "bin"
        if text != "safetensors":
            self.add(
                "unknown-format",
                f"there is no format {text!r}",
                node.mark,
                "write `format: safetensors` or `format: bin`",
            )
        return "safetensors"

    def _list(self, node: Node | None, what: str) -> tuple[Node, ...]:
        if node is None:
            return ()
        if not isinstance(node, Items):
            self.add("wrong-kind", f"`{what}` is a list", node.mark, f"write `{what}: [...]`")
            return ()
        return node.nodes

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
            self.add("no-target-name", "`target` has no name", table.mark, "add `name: hf/model`")
        return TargetSpec(texts.pop("name", ""), texts, table.mark)

    def rules(self, node: Node | None, known: frozenset[str] | None, what: str = "tensors") -> tuple[Rule, ...]:
        """Reads ``tensors:``; ``known`` are the sources a reference may name, None for any."""
        entries = self.table(node, f"`{what}`").entries if node is not None else ()
        found = (self._rule(key, value, known) for key, value in entries)
        return tuple(rule for rule in found if rule is not None)

    def rest(self, node: Node | None, known: frozenset[str] | None) -> tuple[Rule, ...]:
        """Reads ``rest:``, rules for what those of ``tensors:`` leave."""
        return tuple(replace(rule, rest=True) for rule in self.rules(node, known, "rest"))

    def _rule(self, key: Scalar, node: Node, known: frozenset[str] | None) -> Rule | None:
        target = self._template(key.text, key.inside)
        nodes = node.nodes if isinstance(node, Items) else (node,)
        terms = [self.term(item, known) for item in nodes]
        if not nodes:
            hint = f'write `"{min(known) if known else "SOURCE"}:{key.text}"`'
            self.add("no-candidates", f"`{key.text}` names no source tensor", key.mark, hint)
        candidates = tuple(term for term in terms if term is not None)
        if target is None or len(candidates) != len(terms) or not candidates:
            return None
        if target.collects:
            self.add("collecting-target", f"`{key.text}` collects, which only the names of an op can", key.mark)
            return None
        ranges = self._ranges(nodes)
        for name in set(ranges) - set(target.captures) - {one for formula in target.formulas for one in formula.names}:
            what = f"`for` counts {{{name}}}, which `{key.text}` does not have"
            self.add("no-effect", what, key.mark, f"write {{{name}}} into the target's name, or remove it from `for`")
        for candidate in candidates:
            self._check_captures(target, candidate, ranges)
        return Rule(target, candidates, key.mark, ranges)

    def term(self, node: Node, known: frozenset[str] | None) -> Term | None:
        """Reads ``source:name``, or ``{op: ..., of: ...}``."""
        if isinstance(node, Table):
            return self._op(node, known)
        if isinstance(node, Items):
            self.add("wrong-kind", "a candidate is one `source:name`, or an op", node.mark)
            return None
        reference = self.reference(node, known)
        if reference is not None and reference.template.formulas:
            what = f"`{node.text}` would have to be solved for several names"
            hint = "write the formula on the side of the target"
            self.add("bad-formula", what, node.mark, hint)
            return None
        return reference

    def _op(self, node: Table, known: frozenset[str] | None) -> OpTerm | None:
        named = {key.text: value for key, value in node.entries}
        word = named.get("op")
        if not isinstance(word, Scalar):  # `[src:{x}]` is valid YAML: a list that holds a table
            hint = QUOTE_BRACES if "op" not in named and len(named) == 1 else "write `{op: NAME, of: source:name}`"
            self.add("wrong-kind", "a candidate is one `source:name`, or an op", node.mark, hint)
            return None
        from shardmerge.ops.registry import OPS  # all ops and what they compute with: only where one is named

        kind = OPS.get(word.text)
        if kind is None:
            hint = did_you_mean(word.text, OPS) or f"there are {', '.join(sorted(OPS))}"
            self.add("unknown-op", f"there is no op `{word.text}`", word.mark, hint)
            return None
        params = {param.name: param for param in kind.params}
        fields = self.fields(node, ("op", "of", "for", *kind.terms, *params))
        self._idle_params(kind, fields)
        inputs = self._inputs(kind, fields, node.mark, known)
        arguments = {
            name: argument
            for name, value in fields.items()
            if name in params and (argument := self._argument(params[name], value)) is not None
        }
        for param in kind.params:
            if param.default is None and not param.optional and param.name not in fields:
                what = f"the op `{kind.name}` needs `{param.name}`: {param.about}"
                self.add("missing-parameter", what, node.mark, f"add `{param.name}: ...`")
        return OpTerm(kind, inputs, arguments, node.mark) if inputs is not None else None

    def _idle_params(self, kind: OpKind, fields: Mapping[str, Node]) -> None:
        """Adds a problem for each parameter that does nothing with the value of another one."""
        for param in kind.params:
            if param.name in fields and param.only_with is not None:
                key, value = param.only_with
                other = fields.get(key)
                if not isinstance(other, Scalar) or other.text != value:
                    what = f"`{param.name}` of `{kind.name}` is for `{key}: {value}`"
                    self.add("no-effect", what, fields[param.name].mark, f"remove it, or say `{key}: {value}`")

    def _inputs(
        self, kind: OpKind, fields: Mapping[str, Node], mark: Mark, known: frozenset[str] | None
    ) -> tuple[Term, ...] | None:
        nodes: list[Node] = []
        for name in kind.terms:
            if name in fields:
                nodes.append(fields[name])
            else:
                self.add("missing-parameter", f"the op `{kind.name}` needs `{name}: source:name`", mark)
        of = fields.get("of")
        if of is None and kind.takes_of:
            self.add("missing-parameter", f"the op `{kind.name}` needs `of: source:name`", mark)
        if isinstance(of, Items) and not kind.many:
            self.add("wrong-kind", f"`of` of the op `{kind.name}` is one tensor", of.mark)
            return None
        if of is not None:
            nodes += of.nodes if isinstance(of, Items) else (of,)
        for table in (node for node in nodes if isinstance(node, Table)):
            for key in (key for key, _ in table.entries if key.text == "for"):
                self.add(
                    "no-effect",
                    "`for` counts at the outside of a rule only",
                    key.mark,
                    "move `for` to the outermost op",
                )
        terms = [self.term(node, known) for node in nodes]
        found = tuple(term for term in terms if term is not None)
        for reference in found if not kind.many else ():
            if isinstance(reference, Reference) and reference.template.collects:
                what = f"`{{{reference.template.collected}*}}` collects several tensors, and `{kind.name}` takes one"
                self.add("collecting-one", what, reference.mark)
                return None
        return found if len(found) == len(terms) and (found or not kind.takes_of) else None

    def _argument(self, param: Param, node: Node) -> Argument | None:
        if param.kind in ("ints", "numbers"):
            items = node.nodes if isinstance(node, Items) else (node,)
            texts = [self.text(item, param.name) for item in items]
            formulas = [self._formula(text, item.mark) for text, item in zip(texts, items, strict=True)]
            found = tuple(formula for formula in formulas if formula is not None)
            text = f"[{', '.join(texts)}]" if isinstance(node, Items) else texts[0]
            return Argument(text, found, node.mark) if len(found) == len(formulas) else None
        text = self.text(node, param.name)
        if param.kind in ("int", "number"):
            formula = self._formula(text, node.mark)
            return Argument(text, (formula,), node.mark) if formula is not None else None
        if param.choices and text not in param.choices:
            self.add("op-value", f"`{param.name}` cannot be {text!r}", node.mark, did_you_mean(text, param.choices))
            return None
        if param.kind == "dtype":
            self._said(node, param.name, float_dtype)
        if param.kind == "flag":
            self.flag(node, param.name)
        return Argument(text, (), node.mark)

    def _formula(self, text: str, mark: Mark) -> Formula | None:
        if not text:
            return None
        try:
            return Formula.parse(text, str(mark))
        except MappingError as error:
            self.problems.append(error)
            return None

    def _ranges(self, nodes: Sequence[Node]) -> dict[str, Formula]:
        """Reads ``for: {r: 8}`` of a rule's candidates, which have to agree."""
        found: dict[str, Formula] = {}
        tables = (node for node in nodes if isinstance(node, Table))
        for counts in (value for table in tables for key, value in table.entries if key.text == "for"):
            for key, value in self.table(counts, "`for`").entries:
                formula = self._formula(self.text(value, key.text), value.mark)
                if formula is not None and found.setdefault(key.text, formula).text != formula.text:
                    what = f"the candidates count {{{key.text}}} to {found[key.text].text} and to {formula.text}"
                    self.add("op-value", what, value.mark, "one rule counts to one number: write the same in both")
        return found

    def variables(self, node: Node) -> dict[str, Variable]:
        """Reads ``let:``, a set of names with formulas."""
        found = {}
        for key, value in self.table(node, "`let`").entries:
            if not key.text.isidentifier():
                self.add(
                    "bad-name",
                    f"{key.text!r} cannot name a number",
                    key.mark,
                    f"call it `{_plain(key.text).replace('-', '_')}`",
                )
                continue
            formula = self._formula(self.text(value, key.text), value.mark)
            if formula is not None:
                found[key.text] = Variable(formula, key.mark)
        return found

    def adapters(self, node: Node, known: frozenset[str] | None, *, optional: bool = False) -> tuple[AdapterSpec, ...]:
        """Reads ``adapters:``, a list of ``{from: source, onto: source}``."""
        found = (self._adapter(item, known, optional=optional) for item in self._list(node, "adapters"))
        adapters = tuple(adapter for adapter in found if adapter is not None)
        seen: dict[tuple[str, ...], Mark] = {}
        for one in adapters:
            key = (one.source.source, one.source.template.text, one.onto.source, one.settings.get("name", ""))
            if key in seen:
                what = f"the adapter `{one.source.source}` is merged into `{one.onto.source}` twice"
                self.add("adapter-twice", what, one.mark, f"remove one of the two; the other is at {seen[key]}")
            seen[key] = one.mark
        return adapters

    def _adapter(self, node: Node, known: frozenset[str] | None, *, optional: bool) -> AdapterSpec | None:
        fields = self.fields(self.table(node, "an adapter"), ("from", "onto", *ADAPTER_SETTINGS))
        for key in ("from", "onto"):
            if key not in fields:
                self.add(
                    "missing-parameter",
                    f"an adapter needs `{key}: source`",
                    node.mark,
                    "write `{from: ADAPTER, onto: BASE}`",
                )
        if "from" not in fields or "onto" not in fields:
            return None
        source, onto = (self._whole(fields[key], key, known) for key in ("from", "onto"))
        if source is None or onto is None:
            return None
        said = {key: self.text(fields[key], key) for key in ADAPTER_SETTINGS if key in fields}
        return AdapterSpec(source, onto, said, node.mark, optional)

    def _whole(self, node: Node, what: str, known: frozenset[str] | None) -> Reference | None:
        """Reads a source's name, or ``source:template`` with one ``{rest...}``."""
        text = self.text(node, what)
        if not text or not isinstance(node, Scalar):
            return None
        reference = self.reference(node if ":" in text else Scalar(f"{text}:{{rest...}}", node.mark, False), known)
        if reference is not None and reference.template.captures != ("rest",):
            self.add(
                "bad-capture",
                f"`{what}` has one capture, `{{rest...}}`",
                node.mark,
                f'write `{text.partition(":")[0]}` alone, or a prefix: `"{text.partition(":")[0]}:llm.{{rest...}}"`',
            )
            return None
        return reference

    def vocabulary(self, node: Node) -> Vocabulary:
        """Reads ``vocabulary:``."""
        fields = self.fields(self.table(node, "`vocabulary`"), VOCABULARY_KEYS)
        numbers = {key: self._count(fields[key], key) for key in ("rows", "multiple", "row", "seed") if key in fields}
        new = self.text(fields["new"], "new") if "new" in fields else "mean"
        how = row_init(new)
        if how is None:
            self.add("op-value", f"`new` cannot be {new!r}", fields["new"].mark, f"one of {', '.join(ROW_INITS)}")
        self._idle_numbers(fields, new, node.mark)
        return Vocabulary(
            numbers.get("rows"),
            max(numbers.get("multiple", 1), 1),
            how or "mean",
            numbers.get("row", 0),
            numbers.get("seed", 0),
            self.flag(fields["trim"], "trim") if "trim" in fields else False,
            tuple(self.text(item, "tokens") for item in self._list(fields.get("tokens"), "tokens")),
            self.text(fields["pad"], "pad") if "pad" in fields else "",
        )

    def _idle_numbers(self, fields: Mapping[str, Node], new: str, mark: Mark) -> None:
        """Adds a problem for each key of ``vocabulary`` that changes nothing beside the others."""
        for key, how in (("row", "copy"), ("seed", "normal")):
            if key in fields and new != how:
                what = f"`{key}` is for `new: {how}`, and does nothing with `new: {new}`"
                self.add("no-effect", what, fields[key].mark, f"remove `{key}`, or say `new: {how}`")
        if "pad" in fields and "tokens" not in fields:
            hint = "add `tokens: [...]`, or remove `pad`"
            self.add("no-effect", "`pad` names one of `tokens`, and there are none", fields["pad"].mark, hint)
        multiple = fields.get("multiple")
        rounded = isinstance(multiple, Scalar) and multiple.text not in ("0", "1")
        tokens = fields.get("tokens")
        if not ("rows" in fields or rounded or (isinstance(tokens, Items) and tokens.nodes)):
            what = "without `rows`, `tokens` or a `multiple` above 1 the vocabulary stays as it is"
            self.add("no-effect", what, mark, "add one of them, or remove `vocabulary`")

    def config(self, node: Node) -> ConfigEdits:
        """Reads ``config:``, what the result's config.json says."""
        fields = self.fields(self.table(node, "`config`"), CONFIG_KEYS)
        values = self.table(fields["set"], "`set`").entries if "set" in fields else ()
        return ConfigEdits(
            self.text(fields["take"], "take") if "take" in fields else "",
            tuple(self.text(item, "remove") for item in self._list(fields.get("remove"), "remove")),
            {key.text: json_value(value) for key, value in values},
            str(node.mark),
        )

    def _count(self, node: Node, what: str) -> int:
        text = self.text(node, what)
        if text.isascii() and text.isdigit() and len(text) < 12:
            return int(text)
        self.add("wrong-kind", f"`{what}` is a whole number", node.mark)
        return 0

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
        return template

    def _check_captures(self, target: Template, term: Term, ranges: Mapping[str, Formula]) -> None:
        """Both sides bind the same captures: else one name would have two sources, or a capture no value."""
        ours = set(target.captures) - (set(ranges) if isinstance(term, OpTerm) else set())
        counted = set(ranges) | {name for formula in target.formulas for name in formula.names}
        for reference in references(term):
            template = reference.template
            theirs = set(template.captures) - {template.collected}
            missing = ours - theirs if isinstance(term, Reference) else set()
            extra = {name for name in theirs - ours - counted if not name.startswith("_")}
            for name in sorted(missing | extra):
                side = "the source name" if name in ours else "the target name"
                self.add(
                    "unbound-capture",
                    f"{{{name}}} is missing in {side}: `{target}` from `{reference.source}:{template}`",
                    reference.mark,
                    "use the same captures on both sides; call it {_x} if it has one value only, or drop the rest",
                )
            if template.collects and isinstance(term, Reference):
                what = f"`{{{template.collected}*}}` collects tensors for an op, e.g. concat or stack"
                self.add("collecting-one", what, reference.mark)
        lacking = [sorted(ours - set(reference.template.captures)) for reference in references(term)]
        fewest = min(lacking, key=len, default=sorted(ours))
        if isinstance(term, OpTerm) and fewest:
            name = fewest[0]
            what = f"no name in the op has all captures of `{target}`: {{{name}}} is missing"
            self.add("unbound-capture", what, term.mark, f"`for: {{{name}: 8}}` counts it from 0 to 7")


def _plain(text: str) -> str:
    """Returns a name near to one that cannot be."""
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).lstrip("0123456789_-") or "model"
