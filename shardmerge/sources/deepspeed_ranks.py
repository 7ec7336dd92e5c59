"""The rank files of a ZeRO checkpoint, each reduced to what the layout needs, and the checks that they belong together.

A run of 1,024 ranks has 2,048 files with a thousand tensors in half of them. Every header is read and checked, but
nothing that is kept of a file grows with its tensors, except eight bytes for each frozen one.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.sources.deepspeed_files import RankFile
from shardmerge.sources.pickle_vm import Opaque, TensorRef, Value
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import KnownPickles, TorchFile, read_torch_file
from shardmerge.sources.zero import Partition, chunk_numel
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, FileStamp, Shape, Strided

# Where a rank has no fragment of a frozen parameter, or one of another size than its share.
MISFIT = -1


@dataclass(frozen=True, slots=True)
class RankState:
    """What is kept of one ``model_states`` file.

    Attributes
    ----------
    shapes
        ``param_shapes`` as text, to be compared; one object for all ranks that agree.
    steps
        ``global_steps``.
    fragments
        Offsets in bytes of the rank's fragments of the frozen parameters, in the order of rank 0's
        ``frozen_param_shapes``, or ``MISFIT``.
    """

    rank: RankFile
    stamp: FileStamp
    shapes: str
    steps: Value
    fragments: Sequence[int]


def _fragment(file: TorchFile, ref: TensorRef | None, share: int) -> int:
    part = partition(file, ref) if ref is not None else None
    return part.extent.offset if part is not None and part.numel == share else MISFIT


def frozen_shares(root: Mapping[object, Value], world: int) -> dict[str, int]:
    """Returns how many elements of each frozen parameter a rank holds."""
    shapes = shape_table(root.get("frozen_param_shapes"))
    return {name: chunk_numel(prod(shape), world) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class OptimState:
    """What is kept of one ``optim_states`` file.

    Attributes
    ----------
    stage
        ZeRO stage, 1 for BF16_Optimizer, which writes none (its layout is that of stage 1).
    dtypes, partitions
        Of the rank's flat fp32 tensors: one a parameter group (stages 1, 2) or one a sub-group (stage 3).
    world
        Ranks that share the partitions, as the file says; 0 if it does not.
    settings
        ``ds_config`` as text; one object for all ranks that agree.
    paddings, step
        ``param_alignment_paddings``, and the optimizer's step counter.
    """

    rank: RankFile
    stamp: FileStamp
    stage: int
    dtypes: tuple[DType, ...]
    partitions: tuple[Partition, ...]
    world: int
    paddings: tuple[tuple[int, ...], ...]
    settings: str
    step: float | None


class RankReader:
    """Reads rank files one by one. Most have one pickle, up to the number of a GPU: it is interpreted once."""

    def __init__(self) -> None:
        self._pickles = KnownPickles()
        self._texts: dict[str, str] = {}

    def file(self, rank: RankFile) -> TorchFile:
        """Returns a whole file."""
        return read_torch_file(rank.path, self._pickles)

    def model(self, rank: RankFile, frozen: Mapping[str, int]) -> RankState:
        """Returns what is kept of a model file; ``frozen`` has a rank's share of each frozen parameter, in elements."""
        file = self.file(rank)
        root = as_dict(file.root)
        table = named_tensors(root.get("frozen_param_fragments")) if frozen else {}
        fragments = array("q", (_fragment(file, table.get(name), share) for name, share in frozen.items()))
        shapes = self._text(file, root.get("param_shapes"))
        return RankState(rank, file.stamp, shapes, root.get("global_steps"), fragments)

    def optim(self, rank: RankFile) -> OptimState:
        """Returns what is kept of an optimizer file."""
        file = self.file(rank)
        state = as_dict(as_dict(file.root).get("optimizer_state_dict"))
        stage = _stage_number(state.get("zero_stage"))
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        flats = tensors(state.get(key))
        if flats is None:
            raise CheckpointError(
                "zero-layout",
                f"the optimizer file has no {key}",
                where=file.path,
                found=", ".join(str(name) for name in state) or "no optimizer_state_dict",
                hint="shardmerge reads the files of DeepSpeed 0.9 to 0.19, ZeRO stages 0 to 3",
            )
        return OptimState(
            rank,
            file.stamp,
            stage,
            tuple(flat.dtype for flat in flats),
            tuple(partition(file, flat) for flat in flats),
            largest(state.get("partition_count")),
            _paddings(state.get("param_alignment_paddings")),
            self._text(file, as_dict(file.root).get("ds_config")),
            _first_step(file, state),
        )

    def _text(self, file: TorchFile, value: Value) -> str:
        """Returns a value as text, the same object for all that are equal."""
        header = file.stamp.header
        if header not in self._texts:
            self._texts[header] = sys.intern(repr(value))
        return self._texts[header]


def shape_table(value: Value) -> dict[str, Shape]:
    """Returns the shapes of a dict, by name."""
    table: dict[str, Shape] = {}
    for name, shape in as_dict(value).items():
        if isinstance(name, str) and isinstance(shape, tuple):
            table[name] = tuple(n for n in shape if isinstance(n, int))
    return table


def tensors(value: Value) -> tuple[TensorRef, ...] | None:
    """Returns the tensors of a list, or None if it is no list of nothing else."""
    if not isinstance(value, (list, tuple)):
        return None
    found = tuple(item for item in value if isinstance(item, TensorRef))
    return found if len(found) == len(value) else None


def named_tensors(value: Value) -> dict[str, TensorRef]:
    """Returns the tensors of a dict, by name."""
    pairs = as_dict(value).items()
    return {name: ref for name, ref in pairs if isinstance(name, str) and isinstance(ref, TensorRef)}


def partition(file: TorchFile, ref: TensorRef) -> Partition:
    """Returns where a flat tensor lies; raises ``zero-layout`` if it is not contiguous."""
    pieces = file.entry("partition", ref).pieces
    if not pieces:
        return Partition(Extent(file.path, 0, 0), 0)
    held = pieces[0].held
    if not isinstance(held, Extent):
        raise CheckpointError("zero-layout", "a flat partition is not contiguous", where=file.path)
    return Partition(held, prod(ref.shape))


def _stage_number(value: Value) -> int:
    """ZeroStageEnum is pickled as a call with one int (``runtime/zero/config.py``); older files hold the int."""
    if isinstance(value, Opaque) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, int) else 1


def largest(value: Value) -> int:
    """Returns a count, or the largest of a list of them (one a parameter group, or one a MoE layer); 0 for neither."""
    counts = value if isinstance(value, list) else [value]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _paddings(value: Value) -> tuple[tuple[int, ...], ...]:
    groups = value if isinstance(value, list) else []
    return tuple(tuple(n for n in group if isinstance(n, int)) for group in groups if isinstance(group, list))


def _first_step(file: TorchFile, state: Mapping[object, Value]) -> float | None:
    """Returns the optimizer's step counter: four bytes that tell two runs, or two moments of one run, apart."""
    base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
    moments = as_dict(as_dict(base).get("state"))
    first = next(iter(moments.values()), None)
    step = as_dict(first).get("step")
    if isinstance(step, (int, float)):
        return float(step)
    if isinstance(step, TensorRef) and step.dtype.name == "F32" and prod(step.shape) == 1:
        return _read_float(file, step)
    return None


def _read_float(file: TorchFile, ref: TensorRef) -> float:
    held = file.entry("step", ref).pieces[0].held
    extent = held.extent if isinstance(held, Strided) else held
    assert isinstance(extent, Extent)  # a checkpoint's own tensors are not made of others
    with SourceFile(extent.file) as source:
        number: float = struct.unpack("<f", source.read(extent.offset, 4))[0]
    return number


def check_ranks(folder: Path, world: Value, states: list[RankState], optims: list[OptimState]) -> None:
    """Raises what is wrong with a set of rank files; ``world`` is the number of ranks that the model file says.

    Raises
    ------
    CheckpointError
        ``missing-rank``, ``mixed-runs``; all at once.
    """
    raise_all([*_missing_ranks(folder, world, states, optims), *_mixed_runs(folder, states, optims)])


def _missing_ranks(
    folder: Path, saved_world: Value, states: list[RankState], optims: list[OptimState]
) -> Iterator[ShardmergeError]:
    claims = [optim.world for optim in optims]
    if isinstance(saved_world, int) and optims:
        claims.append(saved_world)
    world = max(claims, default=1)
    groups = [("optimizer", [o.rank.data_parallel for o in optims])] if optims else []
    if optims and optims[0].stage == 3:
        groups.append(("model", [s.rank.data_parallel for s in states]))
    for what, ranks in groups:
        missing = sorted(set(range(world)) - set(ranks))
        if missing:
            yield CheckpointError(
                "missing-rank",
                f"the {what} files of rank {', '.join(map(str, missing[:8]))} are missing",
                where=str(folder),
                found=f"{len(ranks)} files",
                expected=f"{world} files, one a rank",
                hint="every node writes its own ranks: gather the files of all nodes in one directory",
            )
        if max(ranks) >= world:
            yield CheckpointError(
                "mixed-runs",
                f"there are more {what} files than ranks",
                where=str(folder),
                found=f"rank {max(ranks)}",
                expected=f"{world} ranks (partition_count)",
                hint="files of an earlier run with more ranks lie in the same directory",
            )


def _mixed_runs(folder: Path, states: list[RankState], optims: list[OptimState]) -> Iterator[ShardmergeError]:
    facts: list[tuple[str, list[tuple[Path, object]]]] = [
        ("ZeRO stage", [(o.rank.path, o.stage) for o in optims]),
        ("world size", [(o.rank.path, o.world) for o in optims]),
        ("optimizer step", [(o.rank.path, o.step) for o in optims if o.step is not None]),
        ("ds_config", [(o.rank.path, o.settings) for o in optims]),
        ("param_shapes", [(s.rank.path, s.shapes) for s in states]),
        ("global_steps", [(s.rank.path, s.steps) for s in states]),
    ]
    for what, values in facts:
        other = next((pair for pair in values if pair[1] != values[0][1]), None)
        if other is not None:
            yield CheckpointError(
                "mixed-runs",
                f"the rank files are not of one run: they differ in {what}",
                where=str(folder),
                found=f"{_short(other[1])} in {other[0].name}",
                expected=f"{_short(values[0][1])}, as in {values[0][0].name}",
                hint="copy the files of one save into a directory of their own",
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
