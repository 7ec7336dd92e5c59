"""What ZeRO's partitions hold, by name: masters or moments, in groups of stages 1 and 2 and sub-groups of stage 3.

What names them is ``param_shapes`` of the model file: for each group the parameters in the order of the flat data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import ONE_SAVE, Tag
from shardmerge.sources.deepspeed_experts import ExpertWeights, is_expert
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.sources.deepspeed_ranks import MISFIT, OptimState, named_tensors, shape_table
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import TorchFile
from shardmerge.sources.zero import FlatGroup, flat_offsets
from shardmerge.tensors import Shape, TensorEntry
from shardmerge.tensors.ranks import Fragments, RankChunks, chunk_numel

Entries = dict[str, TensorEntry]


def layout_error(folder: Path, what: str, found: str = "", expected: str = "", hint: str = "") -> CheckpointError:
    """Returns the error for partitions that are not what the model file says."""
    return CheckpointError("zero-layout", what, where=str(folder), found=found, expected=expected, hint=hint)


def listed_groups(tag: Tag, root: Mapping[object, PickleValue]) -> list[dict[str, Shape]]:
    """Returns the shapes of the trained parameters, group by group, which the ``root`` of a model file lists.

    Raises
    ------
    CheckpointError
        ``zero-layout``: it lists none.
    """
    groups = root.get("param_shapes")
    listed = groups if isinstance(groups, list) else [groups]
    if not all(isinstance(group, dict) for group in listed):
        what = "the model file has no param_shapes, so the partitions cannot be named"
        raise layout_error(tag.folder, what)
    return [shape_table(group) for group in listed]


@dataclass(frozen=True, slots=True)
class _Share:
    """A group of parameters, or the part of it that some of the experts are, and the ranks that it is cut over."""

    index: int
    optims: Sequence[OptimState]
    shapes: Mapping[str, Shape]


def flat_masters(
    tag: Tag, groups: Sequence[Mapping[str, Shape]], experts: ExpertWeights | None = None, view: DeepSpeedView = "fp32"
) -> Entries:
    """Returns the masters of stages 1 and 2, or a moment of theirs, which lies as they do.

    Parameters
    ----------
    tag
        With the optimizer files.
    groups
        Shapes of the parameters, group by group, by name.
    experts
        Which ranks share the groups of experts.
    view
        What the partitions of ``tag`` are, in words of the entries' origin.

    Raises
    ------
    CheckpointError
        ``zero-layout``: the partitions are not those that the groups list.
    """
    _check_groups(tag, len(groups), "parameter groups")
    entries: Entries = {}
    for share in (share for index, group in enumerate(groups) for share in _shares(tag, index, group, experts)):
        index, first = share.index, share.optims[0]
        flat = FlatGroup.of(first.dtypes[index], [optim.partitions[index] for optim in share.optims])
        offsets = flat_offsets(list(share.shapes.values()), _paddings(tag, first, index, len(share.shapes)))
        _check_group_size(tag, share, flat.numel, offsets[-1])
        for (name, shape), start in zip(share.shapes.items(), offsets, strict=False):
            pieces = flat.pieces(start, prod(shape))
            entries[name] = TensorEntry(name, flat.dtype, shape, pieces, f"{view} partitions, group {index}")
    return entries


def _shares(tag: Tag, index: int, group: Mapping[str, Shape], experts: ExpertWeights | None) -> Iterator[_Share]:
    if experts is None or not any(is_expert(name) for name in group):
        yield _Share(index, tag.optims, group)
        return
    parts = expert_parts(tag, index)
    for part in range(parts):
        named = {experts.whole_name(name, part, parts): shape for name, shape in group.items()}
        shapes = {name: shape for name, shape in named.items() if name is not None}
        if len(shapes) != len(group):
            raise layout_error(
                tag.folder,
                f"the parameters of group {index} are not those of the experts' files",
                shown([name for name in group if experts.whole_name(name, part, parts) is None]),
                f"one of {parts} equal parts of all experts",
                ONE_SAVE,
            )
        yield _Share(index, experts.sharing(tag.optims, part, parts), shapes)


def expert_parts(tag: Tag, index: int) -> int:
    """Returns how many parts the experts of a group are spread in: as often as the ranks hold other ones."""
    world = len(tag.optims)
    counts = {optim.counts[index] if index < len(optim.counts) else 0 for optim in tag.optims}
    sharing = counts.pop()
    if counts or sharing < 1 or world % sharing:
        raise layout_error(
            tag.folder,
            f"the optimizer files do not say how many ranks share the experts of group {index}",
            f"partition_count {shown(list(tag.optims[0].counts))} in {tag.optims[0].rank.path.name}",
            f"a divisor of {world}, in all files the same",
            ONE_SAVE,
        )
    return world // sharing


def _paddings(tag: Tag, optim: OptimState, index: int, parameters: int) -> tuple[int, ...]:
    """Elements to skip after each parameter of a group, empty for none."""
    mine = optim.paddings[index] if index < len(optim.paddings) else ()
    if optim.paddings and len(mine) != parameters:
        raise layout_error(
            tag.folder,
            f"the optimizer files have other parameters in group {index} than the model file",
            f"{len(mine)} in param_alignment_paddings of {optim.rank.path.name}",
            f"{parameters}, as param_shapes says",
            ONE_SAVE,
        )
    return mine


def _check_groups(tag: Tag, groups: int, what: str) -> None:
    """All ranks have as many groups as are listed, each of one element type: theirs are read as the first rank's."""
    types = [dtype.name for dtype in tag.optims[0].dtypes]
    for optim in tag.optims:
        if len(optim.partitions) != groups:
            raise layout_error(
                tag.folder,
                f"rank {optim.rank.data_parallel} does not have the {what} that param_shapes lists",
                f"{len(optim.partitions)} in {optim.rank.path.name}",
                str(groups),
                ONE_SAVE,
            )
        if (mine := [dtype.name for dtype in optim.dtypes]) != types:
            raise layout_error(
                tag.folder,
                f"rank {optim.rank.data_parallel} has {what} of other element types than rank 0",
                f"{shown(mine)} in {optim.rank.path.name}",
                shown(types),
                ONE_SAVE,
            )


def _check_group_size(tag: Tag, share: _Share, held: int, needed: int) -> None:
    # The flat group is padded to a multiple of 2 * ranks before it is cut (stage_1_and_2.py, nccl_start_alignment_
    # factor = 2). Saved parts have lost that padding, except those of BF16_Optimizer.
    align = 2 * len(share.optims)
    if not needed <= held <= -(-needed // align) * align:
        raise layout_error(
            tag.folder,
            f"the ranks together do not hold parameter group {share.index}",
            f"{held} elements in {len(share.optims)} files",
            f"{needed} elements, as param_shapes says",
            ONE_SAVE,
        )


def chunked_masters(tag: Tag, groups: Sequence[Mapping[str, Shape]], view: DeepSpeedView) -> Entries:
    """Returns the masters of stage 3, or a moment of theirs; as ``flat_masters``.

    Raises
    ------
    CheckpointError
        ``zero-layout``, as ``flat_masters``.
    """
    _check_groups(tag, len(groups), "sub-groups")
    entries: Entries = {}
    for index, group in enumerate(groups):
        partitions = tuple(optim.partitions[index] for optim in tag.optims)
        dtype = tag.optims[0].dtypes[index]
        start = 0
        for name, shape in group.items():
            chunks = RankChunks(partitions, dtype.itemsize, start, prod(shape))
            entries[name] = TensorEntry(name, dtype, shape, chunks, f"{view} partitions, sub-group {index}")
            start += chunk_numel(prod(shape), len(partitions))
        for rank, part in enumerate(partitions):
            if part.numel != start:
                raise layout_error(
                    tag.folder,
                    f"sub-group {index} of rank {rank} does not hold what param_shapes lists",
                    f"{part.numel} elements",
                    f"{start} elements",
                )
    return entries


def frozen_chunks(tag: Tag, root: Mapping[object, PickleValue]) -> Entries:
    """Returns the frozen parameters of stage 3, of which every rank holds a fragment.

    Raises
    ------
    CheckpointError
        ``zero-layout``: fragments do not add up to the parameter.
    """
    table = named_tensors(root.get("frozen_param_fragments"))
    files = tuple(state.stamp.path for state in tag.states)
    offsets = tuple(state.fragments for state in tag.states)
    entries: Entries = {}
    for index, (name, shape) in enumerate(shape_table(root.get("frozen_param_shapes")).items()):
        if any(mine[index] == MISFIT for mine in offsets):
            what = f"the fragments of the frozen parameter {name!r} do not add up to {shape}"
            raise layout_error(tag.folder, what)
        dtype = table[name].dtype
        share = Fragments(files, offsets, index, chunk_numel(prod(shape), len(files)), dtype.itemsize)
        chunks = RankChunks(share, dtype.itemsize, 0, prod(shape))
        entries[name] = TensorEntry(name, dtype, shape, chunks, "frozen fragments")
    return entries


def frozen_whole(tag: Tag, file: TorchFile, taken: Collection[str]) -> Entries:
    """Returns the frozen parameters that no partition has (``taken``) from the model file of stage 2.

    It has them whole, under both names; stage 1 leaves them in ``module``.

    Raises
    ------
    CheckpointError
        ``zero-layout``: one has another size than is stated.
    """
    root = as_dict(file.root)
    shapes = shape_table(root.get("frozen_param_shapes"))
    entries: Entries = {}
    for name, ref in named_tensors(root.get("frozen_param_fragments")).items():
        if name not in taken:
            shape = shapes.get(name, ref.shape)
            if prod(shape) != prod(ref.shape):
                what = f"frozen parameter {name!r} has another size than its shape {shape}"
                raise layout_error(tag.folder, what)
            entry = file.entry(name, ref, "frozen parameters")
            entries[name] = TensorEntry(name, entry.dtype, shape, entry.pieces, entry.origin)
    return entries
