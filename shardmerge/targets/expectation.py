"""What a target promises, as a value: the planner checks the resolved mapping against it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from shardmerge.dtypes import DType
from shardmerge.ops.row_init import RowInit
from shardmerge.tensors import Catalog, Extent, ReadSideFile, Shape, SideFile


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the model, to say in one line what a hundred missing tensors have in common.

    Attributes
    ----------
    pattern
        The target names' common prefix, e.g. ``vision_tower.``.
    reason
        Why the checkpoint may lack it, or ``""``: "the checkpoint was trained with the visual encoder frozen".
    remedy
        What to add: "Add `vision: openai/clip-vit-large-patch14-336`".
    """

    prefix: str
    reason: str
    remedy: str


def described_by(prefix: str, where: str) -> Component:
    """Returns the part that a config describes as a whole: without a tensor of it, it is that of another model."""
    remedy = f"name a source that has them, or put the config.json of these weights in the place of {where}"
    return Component(prefix, "", remedy)


FileMode: TypeAlias = Literal["model", "all", "none"]
FILE_MODES: tuple[FileMode, ...] = get_args(FileMode)
Format: TypeAlias = Literal["safetensors", "bin", "dcp", "zero-universal"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the user wants of the vocabulary: ``vocabulary:`` of the mapping.

    Attributes
    ----------
    rows
        Rows of embedding and head; None to keep what the text model's config says.
    multiple
        Round up to a multiple of this; 1 for no rounding.
    new
        How new rows are made: the mean of the old ones, zeros, a copy of row ``row``, or drawn from a normal
        distribution with the old rows' mean and deviation and ``seed``.
    trim
        Whether rows may be cut off.
    tokens
        Added to the tokenizer, in order; ``pad`` names the padding token among them.
    """

    rows: int | None = None
    multiple: int = 1
    new: RowInit = "mean"
    row: int = 0
    seed: int = 0
    trim: bool = False
    tokens: tuple[str, ...] = ()
    pad: str = ""


@dataclass(frozen=True, slots=True)
class FileChoice:
    """What the user says of side files: ``output.files`` of the mapping, ``--files``.

    Attributes
    ----------
    mode
        ``model``: what is part of the model. ``all``: every small file beside the weights. ``none``: only what the
        target makes, and config.json.
    include, exclude
        Patterns of names (``*``, ``?``) that go along, or stay behind, in spite of that.
    """

    mode: FileMode = "model"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What a target is asked for.

    Attributes
    ----------
    roles
        Which source plays which role.
    options
        The target's own settings, as written.
    catalogs
        All sources by name.
    read
        Reads a side file.
    dtype
        Float type of the output; None where every tensor keeps its own.
    vocabulary
        As the mapping says, None where it does not.
    where
        The mapping's line, for messages.
    dropped
        (source, name) of what the user drops: a target that is as large as its source does not ask for it.
    command_line
        Whether sources are named by options, and not by lines of a file.
    """

    roles: Mapping[str, str]
    options: Mapping[str, str]
    catalogs: Mapping[str, Catalog]
    read: ReadSideFile
    dtype: DType | None = None
    vocabulary: Vocabulary | None = None
    where: str = ""
    dropped: frozenset[tuple[str, str]] = frozenset()
    command_line: bool = False

    def naming(self, source: str, path: str) -> str:
        """Returns how a user names a source: a line of ``sources:``, or an option."""
        from shlex import quote  # noqa: PLC0415  # for an error alone

        return f"--base {source}={quote(path)}" if self.command_line else f"{source}: {_yaml_scalar(path)}"

    def gone(self, role: str) -> frozenset[str]:
        """Returns the names that the user drops of the source that plays a role."""
        source = self.roles.get(role, role)
        return frozenset(name for owner, name in self.dropped if owner == source)


@dataclass(frozen=True, slots=True)
class Resize:
    """The rows (dim 0) of a target tensor need not be those of its source.

    Attributes
    ----------
    how, row, seed
        New rows, as in ``Vocabulary``.
    trim
        Whether the source may have more rows; the last ones are cut off.
    """

    how: RowInit = "mean"
    row: int = 0
    seed: int = 0
    trim: bool = False


@dataclass(frozen=True, slots=True)
class FileGroup:
    """Target tensors that share files. A tensor belongs to the first group whose prefix its name has.

    Attributes
    ----------
    prefix
        Of the target names; it is not part of the names in the files.
    folder
        Inside the output directory, ``""`` for the directory itself.
    stem, suffix
        Of the files: ``model`` and ``.safetensors`` give ``model.safetensors``, or ``model-00001-of-00002.safetensors``
        with an index. An empty suffix leaves it to the user's ``output.format``, whose ``bin`` files are then called
        ``pytorch_model`` where the stem is ``model``, and whose ``dcp`` files ``__0_0.distcp`` and so on, in a
        checkpoint for each folder. ``.pth`` and ``.bin`` are torch files.
    sharded
        Whether it may be cut into several files.
    """

    prefix: str = ""
    folder: str = ""
    stem: str = "model"
    suffix: str = ""
    sharded: bool = True


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the finished directory must hold.

    Attributes
    ----------
    tensors
        Every target name with its final shape; nothing more and nothing less is written, unless ``open``.
    resized
        Names whose source may have another number of rows (dim 0) than the final shape, and what happens then.
    tied
        Names that are not written although a source may have them, with the name they are tied to.
    left_out
        Prefixes of names that rules may make and that are not part of this directory, with the reason.
    side_files
        config.json, tokenizer files and so on.
    beside
        All small files that lie beside the weights of the source that describes the model, by name.
    same_model
        Whether the result is that model, so that everything beside it goes along; ``targets.beside`` adds it.
    left_behind
        Names of ``beside`` that are not written, with the reason.
    components
        For the messages about missing tensors.
    warnings
        Things a user must see although nothing stops.
    groups
        How tensors are spread over files; every tensor belongs to one.
    keep
        Names that keep the type of their source whatever ``output.dtype`` says.
    ignored
        By source: names that are no part of this directory and need no ``drop:``, such as a frozen base in a dump.
    open
        The architecture is not known: ``tensors`` lists only names whose shape is known, and any other name that a
        rule makes is written too, with the shape it has. At least one tensor must come out.
    """

    tensors: Mapping[str, Shape]
    resized: Mapping[str, Resize] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    beside: Mapping[str, Extent] = field(default_factory=dict)
    same_model: bool = False
    left_behind: tuple[tuple[str, str], ...] = ()
    components: tuple[Component, ...] = ()
    warnings: tuple[str, ...] = ()
    groups: tuple[FileGroup, ...] = (FileGroup(),)
    keep: frozenset[str] = frozenset()
    ignored: Mapping[str, frozenset[str]] = field(default_factory=dict)
    open: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of finished directory, as mapping.yaml names it.

    Attributes
    ----------
    name
        ``hf/llava``, ...
    about
        One sentence for the documentation.
    roles
        Which sources it looks at, with a line about each.
    options
        Its own settings, with a line about each.
    expect
        Says what such a directory holds; raises TargetError.
    codes
        Whether quantized weights may be copied into it as they are: its config.json is then that of its source.
    """

    name: str
    about: str
    roles: Mapping[str, str]
    options: Mapping[str, str]
    expect: Callable[[Request], Expectation]
    codes: bool = False


def _yaml_scalar(text: str) -> str:
    """Returns the text as YAML reads it back: plain where it is a path or hub id, else quoted as in JSON."""
    return text if re.fullmatch(r"[\w.~/<][\w./<> -]*", text) else json.dumps(text)
