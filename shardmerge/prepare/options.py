"""What a caller may say of a conversion, and what the mapping and the caller say together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.dtypes import DType, float_dtype
from shardmerge.mapping.spec import OutputSpec
from shardmerge.plan.planner import OutputSettings
from shardmerge.plan.shards import DEFAULT_SHARD_SIZE
from shardmerge.plan.value import Plan
from shardmerge.storage.limits import default_budget, default_workers
from shardmerge.storage.reading import IoMode
from shardmerge.targets.expectation import FileChoice, FileMode, Format

if TYPE_CHECKING:
    from shardmerge.execute.engine import Device
    from shardmerge.prepare.loading import Check


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may override or add to a mapping.

    Attributes
    ----------
    dtype, shard_size
        Instead of those of the mapping's ``output``; the dtype by any of its names, e.g. ``"bfloat16"``.
    format
        ``safetensors`` or ``bin``, likewise.
    memory, workers
        Budget in bytes and threads; None for the defaults of ``storage.limits``.
    download
        Whether hub ids may be downloaded.
    io
        How sources are read.
    sync
        Whether the result is made durable before it is published.
    files
        Which small files beside the weights go along, instead of what the mapping's ``output.files`` says: ``model``,
        ``all`` or ``none``.
    device
        ``cuda`` to make casts on a GPU; the bits are the same. torch and CUDA take memory that no plan counts.
    partial
        Whether a part of the model that config.json describes is what is wanted.
    check
        ``transformers``: what will be written is loaded by its own class on the meta device, in a child process, before
        anything is written.
    """

    dtype: DType | str | None = None
    shard_size: int | None = None
    format: Format | None = None
    memory: int | None = None
    workers: int | None = None
    download: bool = False
    io: IoMode = "pread"
    sync: bool = True
    device: Device = "cpu"
    partial: bool = False
    files: FileMode | None = None
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and where its result goes; ``out`` is None if the mapping names no output."""

    plan: Plan
    out: Path | None


def wanted_dtype(options: Options) -> DType | None:
    """Returns the type that the caller asks for, None for whatever each tensor has."""
    return float_dtype(options.dtype) if isinstance(options.dtype, str) else options.dtype


def output_settings(spec: OutputSpec | None, options: Options) -> OutputSettings:
    """Returns what the mapping's ``output:`` and the caller say together."""
    return OutputSettings(
        wanted_dtype(options) or (spec.dtype if spec else None),
        spec.dtypes if spec else (),
        options.shard_size or (spec.shard_size if spec else None) or DEFAULT_SHARD_SIZE,
        options.format or (spec.format if spec else None) or "safetensors",
        options.memory or default_budget(),
        options.workers or default_workers(),
        str(spec.mark) if spec else "",
    )


def file_choice(spec: OutputSpec | None, options: Options) -> FileChoice | None:
    """Returns what the caller, else the mapping, says of side files."""
    return FileChoice(options.files) if options.files else spec.files if spec else None
