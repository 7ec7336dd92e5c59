"""mapping.yaml as a value, every part with its place in the file. ``reader`` makes it of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.formulas import Formula
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.renaming import Renamings
from shardmerge.mapping.settings import Varying
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.ops.contract import OpKind
from shardmerge.targets.config_edits import ConfigEdits
from shardmerge.targets.expectation import FileChoice, Format, Vocabulary

_NOWHERE = Mark("", 1, 1)
# Stands for the place in a file where options say what is done.
COMMAND_LINE = Mark("command line", 0, 0)


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
    strip
        Taken off the names that begin with it, one after the other: ``module.`` of DistributedDataParallel. A word
        of torch's own wrappers (``_orig_mod.``) is taken out wherever it stands.
    usual
        Prefixes that a preset knows: where nothing is said, the first that every name has is taken off.
    """

    name: str
    path: str
    required: bool = True
    view: str = ""
    root: str = ""
    mark: Mark = _NOWHERE
    strip: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """Where the result goes and how it is written; ``None`` keeps the default.

    Attributes
    ----------
    dtypes
        Float types of some target names, the first template that matches deciding; None keeps the tensor's own.
    format
        ``safetensors``, ``bin``, ``dcp`` or ``zero-universal``.
    partial
        Whether only a part of the model that config.json describes is wanted.
    files
        Which side files go along.
    root
        For ``dcp``: the keys under which a state dict holds the model, with dots between them; empty for none.
    card
        Whether a README.md says what was merged; None for where an op merges several sources.
    optimizer
        Whether Adam's state goes along.
    """

    path: str
    dtype: DType | None
    shard_size: int | None
    mark: Mark
    dtypes: tuple[tuple[Template, DType | None], ...] = ()
    format: Format | None = None
    partial: bool = False
    files: FileChoice | None = None
    root: str | None = None
    card: bool | None = None
    optimizer: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """``source:template``."""

    source: str
    template: Template
    mark: Mark


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter of an op as written.

    Attributes
    ----------
    formulas
        What it holds where it is a number or a list of them.
    settings
        One a number, where it differs from tensor to tensor; then ``formulas`` are all that stand in them.
    """

    text: str
    formulas: tuple[Formula, ...]
    mark: Mark
    settings: tuple[Varying, ...] = ()


@dataclass(frozen=True, slots=True)
class OpTerm:
    """An op over terms.

    Attributes
    ----------
    inputs
        The op's own tensor parameters first, then those of ``of``.
    arguments
        As written; absent ones have their default.
    """

    kind: OpKind
    inputs: tuple[Term, ...]
    arguments: Mapping[str, Argument]
    mark: Mark


Term: TypeAlias = Reference | OpTerm


def references(term: Term) -> Iterator[Reference]:
    """Yields every reference of a term, in order."""
    if isinstance(term, Reference):
        yield term
        return
    for one in term.inputs:
        yield from references(one)


def ops_of(term: Term) -> Iterator[OpTerm]:
    """Yields every op of a term, the outer ones first."""
    if isinstance(term, OpTerm):
        yield term
        for one in term.inputs:
            yield from ops_of(one)


def dequantized_by(term: Term) -> Iterator[Reference]:
    """Yields the references that an op ``dequantize`` of a term reads: codes are what it is for."""
    inputs = (one for op in ops_of(term) if op.kind.name == "dequantize" for one in op.inputs)
    return (one for one in inputs if isinstance(one, Reference))


def formulas_of(term: Term) -> Iterator[Formula]:
    """Yields every formula that a parameter of a term's ops is."""
    return (formula for op in ops_of(term) for argument in op.arguments.values() for formula in argument.formulas)


@dataclass(frozen=True, slots=True)
class Rule:
    """A target template and its candidates, the first that has the tensor winning.

    Attributes
    ----------
    ranges
        Captures of the target that count from 0 to a number (``for:``).
    optional
        Whether it may match nothing: rules of a preset, which serves several variants of a layout.
    rest
        Whether it stands under ``rest:``: it takes source tensors that no rule of ``tensors:`` uses, for targets that
        none of them makes.
    """

    target: Template
    candidates: tuple[Term, ...]
    mark: Mark
    ranges: Mapping[str, Formula] = field(default_factory=dict)
    optional: bool = False
    rest: bool = False


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter to be merged into a base before any rule sees the base.

    Attributes
    ----------
    source, onto
        Where its tensors are, by the names that peft gives them inside of a ``{rest...}`` template, and whose they are.
    settings
        ``r``, ``alpha``, ``rslora``, ``fan_in_fan_out``, ``name``, ``weight``, ``combination_type``: what
        the user says of it, as written.
    optional
        Whether it may find nothing to merge: a preset's.
    renames
        How its names are called in the base, where the user says it.
    """

    source: Reference
    onto: Reference
    settings: Mapping[str, str]
    mark: Mark
    optional: bool = False
    renames: Renamings = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """Source tensors that are not wanted. ``optional`` ones (a preset's) may match nothing."""

    source: str
    template: Template
    mark: Mark
    optional: bool = False


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A target and what is said of it: which source plays which role, and its options."""

    name: str
    roles: Mapping[str, str]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Variable:
    """A named number of the mapping: ``let: {heads: llm.config.num_attention_heads}``."""

    formula: Formula
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
    variables: Mapping[str, Variable] = field(default_factory=dict)
    adapters: tuple[AdapterSpec, ...] = ()
    vocabulary: Vocabulary | None = None
    notes: tuple[str, ...] = ()
    config: ConfigEdits = field(default_factory=ConfigEdits)

    @property
    def from_options(self) -> bool:
        """Whether options of a command make it up, and no file: a hint names options then."""
        return self.file == COMMAND_LINE.file


# What a mapping.yaml may say.
KEYS = (
    "shardmerge", "sources", "output", "use", "target", "let", "adapters", "vocabulary", "config", "tensors", "rest",
    "drop",
)  # fmt: skip
# What its parts may say; `mapping.schema` has a line about each.
SOURCE_KEYS = ("path", "required", "view", "root", "strip")
OUTPUT_KEYS = (
    "path",
    "dtype",
    "shard_size",
    "format",
    "dtypes",
    "keep",
    "partial",
    "files",
    "root",
    "card",
    "optimizer",
)
FILES_KEYS = ("include", "exclude")
ADAPTER_KEYS = ("from", "onto", "rename")
ADAPTER_SETTINGS = ("r", "alpha", "rslora", "fan_in_fan_out", "name", "weight", "combination_type")
CONFIG_KEYS = ("take", "remove", "set")
VOCABULARY_KEYS = ("rows", "multiple", "new", "row", "seed", "trim", "tokens", "pad")
