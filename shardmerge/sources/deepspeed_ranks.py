"""The rank files of a ZeRO checkpoint, each reduced to what the layout needs and what tells whose it is.

A run of 1,024 ranks has 2,048 files with a thousand tensors in half of them. Every header is read and checked, but
nothing that is kept of a file grows with its tensors, except eight bytes for each frozen one.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims, largest, read_claims, text_of
from shardmerge.sources.deepspeed_files import DeepSpeedRankFile
from shardmerge.sources.deepspeed_moments import moment_flats
from shardmerge.sources.deepspeed_settings import base_state, first_step, plain_digest, zero_optimizer
from shardmerge.sources.pickle_values import Opaque, PickleValue, TensorRef
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import KnownPickles, TorchFile, read_torch_file
from shardmerge.sources.value_digest import value_digest
from shardmerge.tensors import Extent, FileStamp, Shape
from shardmerge.tensors.optimizer import OptimizerState
from shardmerge.tensors.ranks import Partition, chunk_numel

# Where a rank has no fragment of a frozen parameter, or one of another size or element type than its share.
MISFIT = -1
# Of a frozen parameter: how many elements each rank holds, and of which type. ``None``: rank 0 holds none.
FrozenShare: TypeAlias = tuple[int, DType | None]


@dataclass(frozen=True, slots=True)
class RankState:
    """What is kept of one ``model_states`` file.

    Attributes
    ----------
    claims
        What it states; one object for all ranks whose files say the same.
    saved_as
        The name that the file was saved under, where that is another's; else ``""``.
    fragments
        Offsets in bytes of the rank's fragments of the frozen parameters, in the order of rank 0's
        ``frozen_param_shapes``, or ``MISFIT``.
    """

    rank: DeepSpeedRankFile
    stamp: FileStamp
    claims: DeepSpeedClaims
    saved_as: str
    fragments: array[int]


def _fragment(file: TorchFile, ref: TensorRef | None, share: FrozenShare) -> int:
    if ref is None or (prod(ref.shape), ref.dtype) != share:
        return MISFIT
    return partition(file, ref).extent.offset


def frozen_shares(root: Mapping[object, PickleValue], world: int) -> dict[str, FrozenShare]:
    """Returns what a rank holds of each frozen parameter; ``root`` is what rank 0's file holds."""
    shapes = shape_table(root.get("frozen_param_shapes"))
    held = named_tensors(root.get("frozen_param_fragments"))
    types = {name: ref.dtype for name, ref in held.items()}
    return {name: (chunk_numel(prod(shape), world), types.get(name)) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class OptimState:
    """What is kept of one ``optim_states`` file.

    Attributes
    ----------
    stage
        ZeRO stage; ``None`` for BF16_Optimizer, which writes none. Its layout is that of stage 1.
    dtypes, partitions
        Of the rank's flat fp32 tensors: one a parameter group (stages 1, 2) or one a sub-group (stage 3).
    world, counts
        Ranks that share the partitions, as the file says, 0 if it does not; group by group, which differ for experts.
    settings, version
        Digest of ``ds_config``, one object for all ranks that agree; ``ds_version``.
    paddings
        ``param_alignment_paddings``.
    step, groups
        The optimizer's step counter, ``None`` where it has none; digest of the plain values in its ``param_groups``:
        learning rates, betas, weight decay.
    saved_as
        The name that the file was saved under, where that is another's; else ``""``.
    """

    rank: DeepSpeedRankFile
    stamp: FileStamp
    stage: int | None
    dtypes: tuple[DType, ...]
    partitions: tuple[Partition, ...]
    world: int
    counts: tuple[int, ...]
    paddings: tuple[tuple[int, ...], ...]
    settings: str
    version: str
    step: float | None
    groups: str
    saved_as: str


class RankReader:
    """Reads rank files one by one. Most have one pickle, up to the number of a GPU: it is interpreted once."""

    def __init__(self) -> None:
        self._pickles = KnownPickles()
        self._claims: dict[str, DeepSpeedClaims] = {}

    def file(self, rank: DeepSpeedRankFile) -> TorchFile:
        """Returns a whole file."""
        return read_torch_file(rank.path, self._pickles)

    def model(self, rank: DeepSpeedRankFile, frozen: Mapping[str, FrozenShare]) -> RankState:
        """Returns what is kept of a model file; ``frozen`` has a rank's share of each frozen parameter."""
        file = self.file(rank)
        root = as_dict(file.root)
        table = named_tensors(root.get("frozen_param_fragments")) if frozen else {}
        fragments = array("q", (_fragment(file, table.get(name), share) for name, share in frozen.items()))
        return RankState(rank, file.stamp, self._stated(file), rank.saved_as(file.archive), fragments)

    def optim(self, rank: DeepSpeedRankFile, moment: str = "") -> OptimState:
        """Returns what is kept of an optimizer file; with the partitions of a moment in the place of the masters'."""
        file = self.file(rank)
        root = as_dict(file.root)
        state = as_dict(root.get("optimizer_state_dict"))
        stage = _stage_number(state.get("zero_stage"))
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        flats = tensors(state.get(key))
        if flats is None:
            raise CheckpointError(
                "zero-layout",
                f"the optimizer file has no {key}",
                where=file.path,
                found=shown(list(state)) if state else "no optimizer_state_dict",
                expected=f"{key}, as DeepSpeed 0.9 to 0.19 write it for ZeRO stages 0 to 3",
            )
        base = base_state(state)
        step = first_step(file, base, sum(prod(flat.shape) for flat in flats))
        flats = moment_flats(file, base, flats, moment) if moment else flats
        return OptimState(
            rank,
            file.stamp,
            stage,
            tuple(flat.dtype for flat in flats),
            tuple(partition(file, flat) for flat in flats),
            largest(state.get("partition_count")),
            _counts(state.get("partition_count")),
            _paddings(state.get("param_alignment_paddings")),
            sys.intern(value_digest(root.get("ds_config"))),
            text_of(root.get("ds_version")),
            step,
            plain_digest(base),
            rank.saved_as(file.archive),
        )

    def optimizer(
        self, folder: Path, ranks: Iterable[DeepSpeedRankFile], named: Sequence[Collection[str]]
    ) -> OptimizerState:
        """Returns the steps and settings of the optimizer; ``named``: the weights in each of its flat groups."""
        return zero_optimizer(folder, (self.file(rank) for rank in ranks), named)

    def _stated(self, file: TorchFile) -> DeepSpeedClaims:
        """Returns what a model file states, read once for all files of one pickle."""
        claims = self._claims.get(file.stamp.header)
        if claims is None:
            claims = self._claims[file.stamp.header] = read_claims(as_dict(file.root))
        return claims


def shape_table(value: PickleValue) -> dict[str, Shape]:
    """Returns the shapes of a dict, by name."""
    table: dict[str, Shape] = {}
    for name, shape in as_dict(value).items():
        if isinstance(name, str) and isinstance(shape, tuple):
            table[name] = tuple(n for n in shape if isinstance(n, int))
    return table


def tensors(value: PickleValue) -> tuple[TensorRef, ...] | None:
    """Returns the tensors of a list, or None if it is no list of nothing else."""
    if not isinstance(value, (list, tuple)):
        return None
    found = tuple(item for item in value if isinstance(item, TensorRef))
    return found if len(found) == len(value) else None


def named_tensors(value: PickleValue) -> dict[str, TensorRef]:
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


def _stage_number(value: PickleValue) -> int | None:
    """ZeroStageEnum is pickled as a call with one int (``runtime/zero/config.py``); older files hold the int."""
    if isinstance(value, Opaque) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, int) else None


def _counts(value: PickleValue) -> tuple[int, ...]:
    return tuple(n for n in value if isinstance(n, int)) if isinstance(value, list) else ()


def _paddings(value: PickleValue) -> tuple[tuple[int, ...], ...]:
    groups = value if isinstance(value, list) else []
    return tuple(tuple(n for n in group if isinstance(n, int)) for group in groups if isinstance(group, list))
