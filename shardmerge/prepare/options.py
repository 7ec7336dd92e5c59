"""The options of a conversion, and how they are combined with the mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from shardmerge.dtypes import DTYPES, DType
from shardmerge.errors import MappingError, ShardmergeError, UsageError
from shardmerge.mapping.spec import OutputSpec
from shardmerge.plan.memory import opening_peak, target_peak, unpacking_peak
from shardmerge.plan.planner import OutputSettings
from shardmerge.plan.schedule import Schedule, schedule
from shardmerge.plan.shard import PlannedShard
from shardmerge.plan.shards import DEFAULT_SHARD_SIZE
from shardmerge.plan.value import Plan
from shardmerge.prepare.option_values import check_choice, check_flag, check_workers, element_type, no_option, size
from shardmerge.storage.limits import default_budget, default_workers, may_fork
from shardmerge.targets.expectation import FileChoice, FileMode, Format
from shardmerge.tensors import FileStamp

if TYPE_CHECKING:
    from shardmerge.execute.means import Device
    from shardmerge.prepare.loading import Check


# Where accelerate, the Trainer of transformers and Lightning keep the model in a state dict.
_MODEL = "model"

_MASTERS = DTYPES["F32"]

# Who makes the parts of a plan.
Engine: TypeAlias = Literal["here", "ray"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "format": get_args(Format),
    "io": ("pread", "mmap"),
    "files": get_args(FileMode),
    "engine": get_args(Engine),
    "device": ("cpu", "cuda"),
    "check": ("transformers",),
}
_FLAGS = ("optimizer", "download", "sync", "partial", "fresh", "recheck", "overwrite", "sha256")


@dataclass(frozen=True, slots=True)
class Options:
    """Options that override or extend a mapping. Values are those of the command line, or their Python equivalents.

    Attributes
    ----------
    dtype, shard_size
        Override those of the mapping's ``output``. The dtype is any of its names, e.g. ``"bfloat16"``, or
        ``torch.bfloat16``; the size is in bytes or text, ``"5GB"``.
    format, root
        Override the mapping's too: ``safetensors``, ``bin``, ``dcp`` or ``zero-universal``; and for ``dcp`` the keys
        of the model in the state dict.
    optimizer
        Whether to include the Adam state, in a conversion to ``dcp`` or ``zero-universal`` that keeps every name.
    memory, workers
        The memory limit of all processes together, in bytes or text, ``"256MiB"``, and the number of CPUs, 1 to 64.
        None: the limits of the machine.
    download
        Whether hub ids may be downloaded.
    io
        How sources are read.
    sync
        Whether the result is synced to disk before it is published.
    files
        The small files to copy with the weights: ``model``, ``all`` or ``none``. Overrides the mapping's
        ``output.files``.
    device
        ``cuda`` to cast on a GPU, with the same bits. The plan does not include the memory of torch and CUDA.
    partial
        Whether only part of the model that config.json describes is written.
    fresh
        Whether to remove the files of an earlier run instead of resuming it.
    recheck
        Whether all bytes of what an earlier run made are read again, and not some.
    overwrite
        Whether a result of shardmerge at the output path is replaced.
    sha256
        Whether the receipt gets the SHA-256 of every file and tensor.
    engine, address
        Who makes the parts: ``here``, processes of this machine; or ``ray``, tasks of the cluster at this address, None
        for the one that Ray finds. ``memory`` and ``workers`` are then those of each task.
    check
        ``transformers``: what will be written is loaded by its own class on the meta device, in a child process, before
        anything is written.

    Raises
    ------
    UsageError
        ``unknown-dtype``, ``bad-size``; ``bad-option``: another value that the option does not take.
    """

    dtype: DType | str | None = None
    shard_size: int | str | None = None
    format: Format | None = None
    root: str | None = None
    optimizer: bool = False
    memory: int | str | None = None
    workers: int | None = None
    download: bool = False
    io: Literal["pread", "mmap"] = "pread"
    sync: bool = True
    device: Device = "cpu"
    partial: bool = False
    files: FileMode | None = None
    fresh: bool = False
    recheck: bool = False
    overwrite: bool = False
    sha256: bool = False
    engine: Engine = "here"
    address: str | None = None
    check: Check | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        check_workers(self.workers)
        object.__setattr__(self, "dtype", element_type(self.dtype))
        object.__setattr__(self, "shard_size", size(self.shard_size, "shard_size"))
        object.__setattr__(self, "memory", size(self.memory, "memory", binary=True))


def chosen(options: Options | None, choices: Mapping[str, object]) -> Options:
    """Returns options with some replaced by those that a function was given by keyword.

    Raises
    ------
    TypeError
        A keyword that is no option, with the nearest one.
    UsageError
        As ``Options``.
    """
    known = [field.name for field in fields(Options)]
    for name in choices:
        if name not in known:
            raise no_option(name, known)
    return replace(options or Options(), **choices)  # type: ignore[arg-type]  # checked by Options itself


@dataclass(frozen=True, slots=True)
class SavedMapping:
    """Where the mapping of a conversion is written, where that one's result goes, and the command it comes from."""

    path: Path
    out: Path
    command: str = "Written by shardmerge.convert."


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, how it would be carried out here, and where its result goes.

    ``out`` is None if the mapping names no output.
    """

    plan: Plan
    how: Schedule
    out: Path | None

    @classmethod
    def of(cls, plan: Plan, out: Path | None, options: Options) -> Prepared:
        """Returns a plan with what its options grant; raises ``memory-budget`` where that is too little."""
        return cls(plan, granted(plan.shards, options, plan.files(), plan.target), out)


def granted(shards: Sequence[PlannedShard], options: Options, files: Sequence[FileStamp], target: str) -> Schedule:
    """Returns how some parts, made of some files, are carried out with what the caller, else the system, grants.

    Raises
    ------
    ResourceError
        ``memory-budget``.
    """
    workers = options.workers or default_workers()
    budget = size(options.memory, "memory") or default_budget(workers)
    # A CUDA context does not survive a fork, and a task of Ray makes one part.
    forks = options.device == "cpu" and options.engine == "here" and may_fork()
    return schedule(
        shards,
        budget=budget,
        workers=workers,
        processes=workers if forks else 1,
        frames=unpacking_peak(files),
        opening=opening_peak(files) + target_peak(target),
        apart=options.io == "mmap" and forks,
        sha256=options.sha256,
    )


def wanted_dtype(options: Options) -> DType | None:
    """Returns the type that the caller asks for, if he does."""
    return element_type(options.dtype)


def output_settings(spec: OutputSpec | None, options: Options) -> OutputSettings:
    """Returns what the mapping's ``output:`` and the caller say together."""
    form = options.format or (spec.format if spec else None) or "safetensors"
    return OutputSettings(
        _dtype(spec, options, form),
        spec.dtypes if spec else (),
        size(options.shard_size, "shard_size") or (spec.shard_size if spec else None) or DEFAULT_SHARD_SIZE,
        form,
        _root(spec, options, form),
        str(spec.mark) if spec else "",
    )


def _dtype(spec: OutputSpec | None, options: Options, form: Format) -> DType | None:
    """Returns the type of all floats; DeepSpeed's optimizer steps from float32, and so does what it is given."""
    said = wanted_dtype(options) or (spec.dtype if spec else None)
    if form != "zero-universal" or said == _MASTERS:
        return said
    if said is not None:
        raise UsageError(
            "unfit-dtype",
            "the weights of a `zero-universal` checkpoint are the fp32 master weights of the optimizer",
            where=str(spec.mark) if spec and options.dtype is None else "",
            found=said.torch,
            expected=_MASTERS.torch,
            hint="leave the dtype out: DeepSpeed makes its 16-bit copy by itself",
        )
    return _MASTERS


def _root(spec: OutputSpec | None, options: Options, form: Format) -> tuple[str, ...]:
    """Returns the keys of the model in a state dict, ``model`` if nobody says them: see decision 28."""
    said = options.root if options.root is not None else spec.root if spec else None
    if form != "dcp":
        if options.root is not None or (said is not None and options.format is None):
            raise _idle_root(spec if options.root is None else None)
        return ()
    return () if said == "" else tuple((_MODEL if said is None else said).split("."))


def _idle_root(spec: OutputSpec | None) -> ShardmergeError:
    what = "is for `format: dcp`: files of other formats have no keys around the model"
    if spec is None:
        return UsageError("no-effect", f"--dcp-root {what}", hint="leave --dcp-root out, or add --format dcp")
    hint = "remove `root`, or write `format: dcp` beside it"
    return MappingError("no-effect", f"`root` {what}", where=str(spec.mark), hint=hint)


def file_choice(spec: OutputSpec | None, options: Options) -> FileChoice | None:
    """Returns what the caller, else the mapping, says of side files."""
    return FileChoice(options.files) if options.files else spec.files if spec else None
