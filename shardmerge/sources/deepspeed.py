"""DeepSpeed checkpoints of ZeRO stages 0 to 3: a tag directory in, a catalog out.

What stands where: ``model_states`` hold the 16-bit ``module``, shapes, frozen parameters and buffers; ``optim_states``
hold the fp32 master weights, flat and partitioned over the ranks (see ``zero``), and the moments, which are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.sources.deepspeed_files import View, kind_not_yet, list_tag
from shardmerge.sources.deepspeed_ranks import (
    MISFIT,
    OptimState,
    RankReader,
    RankState,
    check_ranks,
    frozen_shares,
    largest,
    named_tensors,
    shape_table,
    tensors,
)
from shardmerge.sources.pickle_vm import TensorRef, Value
from shardmerge.sources.torch_checkpoint import as_dict, training_config
from shardmerge.sources.torch_file import TorchFile, state_dict
from shardmerge.sources.zero import FlatGroup, Fragments, RankChunks, chunk_numel, flat_offsets
from shardmerge.tensors import Catalog, Piece, Shape, TensorEntry


def read_deepspeed(folder: Path, *, view: View = "fp32") -> Catalog:
    """Returns the catalog of a DeepSpeed tag directory.

    Parameters
    ----------
    folder
        The directory that holds the ``*_model_states.pt`` files.
    view
        ``fp32``: the master weights, with frozen parameters and buffers as they were saved. ``module``: the 16-bit
        weights of the forward pass, where the checkpoint has them (stages 0 to 2).

    Raises
    ------
    CheckpointError
        ``kind-not-yet`` (MoE, pipeline, tensor parallel, universal), ``missing-rank``, ``mixed-runs``,
        ``zero-layout``, ``no-module-view``, and what the torch reader raises.
    """
    tag = list_tag(folder)
    reader = RankReader()
    first = reader.file(tag.models[0])
    root = as_dict(first.root)
    if largest(root.get("num_experts")) > 0:
        raise kind_not_yet(folder, "mixture-of-experts (MoE)")
    optims = [reader.optim(rank) for rank in tag.optims]
    stage = optims[0].stage if optims else 0
    frozen = frozen_shares(root, len(tag.models)) if stage == 3 else {}
    states = [reader.model(rank, frozen) for rank in tag.models]
    check_ranks(folder, root.get("dp_world_size"), states, optims)
    builder = _Builder(folder, first, states, optims, stage)
    if view == "module":
        builder.add_module(required=True)
    else:
        builder.add_fp32()
    return builder.catalog(view)


@dataclass(slots=True)
class _Builder:
    """Collects the entries of one checkpoint."""

    folder: Path
    first: TorchFile
    states: list[RankState]
    optims: list[OptimState]
    stage: int
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    @property
    def root(self) -> Mapping[object, Value]:
        """What rank 0's model file holds."""
        return as_dict(self.first.root)

    def module(self) -> dict[str, TensorRef]:
        """Tensors of ``module``, by name; empty where the file has none."""
        return state_dict(self.first.root, key="module").tensors if as_dict(self.root.get("module")) else {}

    def add_fp32(self) -> None:
        """Master weights first, then whatever has none: frozen parameters, buffers, the rest of ``module``."""
        if self.stage == 0:
            self._add_unpartitioned()
        elif self.stage == 3:
            self._add_stage3()
            self._add_frozen_stage3()
        else:
            self._add_stage12()
            self._add_frozen_whole()
        self.add_module(required=False)
        self._add_shared()

    def add_module(self, *, required: bool) -> None:
        """Adds the tensors of ``module`` that are not there yet; shared storages become aliases."""
        module = self.module()
        holders = {name for name, ref in module.items() if ref.shape == (0,) and self.stage == 3}
        if required and (not module or len(holders) > len(module) // 2):
            raise CheckpointError(
                "no-module-view",
                "this checkpoint has no whole 16-bit module: ZeRO-3 saves placeholders of it",
                where=self.first.path,
                hint="use the fp32 view and cast it: --dtype bfloat16",
            )
        owners: dict[object, str] = {}
        for name, ref in module.items():
            key = self.first.alias_key(ref)
            if name in holders:
                if name not in self.entries:
                    self.absent.add(name)
            elif name in self.entries:
                owners.setdefault(key, name)
            elif prod(ref.shape) and key in owners:
                self.aliases[name] = owners[key]
            else:
                owners.setdefault(key, name)
                self.entries[name] = self.first.entry(name, ref, "module, as saved")

    def catalog(self, view: View) -> Catalog:
        files = (*(state.stamp for state in self.states), *(optim.stamp for optim in self.optims))
        return Catalog(
            str(self.folder),
            f"DeepSpeed ZeRO-{self.stage}",
            self.entries,
            {alias: owner for alias, owner in self.aliases.items() if alias not in self.entries},
            files,
            absent=frozenset(self.absent - set(self.aliases)),
            notes=(f"{view} view of {max(len(self.optims), 1)} rank(s)",),
            warnings=tuple(self.warnings),
            training_config=training_config(self.first),
        )

    def _shapes(self) -> list[dict[str, Shape]]:
        groups = self.root.get("param_shapes")
        listed = groups if isinstance(groups, list) else [groups]
        if not all(isinstance(group, dict) for group in listed):
            raise self._layout("the model file has no param_shapes, so the partitions cannot be named")
        return [shape_table(group) for group in listed]

    def _add_stage12(self) -> None:
        shapes = self._shapes()
        self._check_group_count(len(shapes), "parameter groups")
        for index, group in enumerate(shapes):
            flat = FlatGroup.of(self.optims[0].dtypes[index], [optim.partitions[index] for optim in self.optims])
            paddings = self.optims[0].paddings
            offsets = flat_offsets(list(group.values()), paddings[index] if paddings else ())
            self._check_group_size(index, flat.numel, offsets[-1])
            for (name, shape), start in zip(group.items(), offsets, strict=False):
                pieces = flat.pieces(start, prod(shape))
                self._add(name, flat.dtype, shape, pieces, f"fp32 partitions, group {index}")

    def _add_stage3(self) -> None:
        shapes = self._shapes()
        self._check_group_count(len(shapes), "sub-groups")
        for index, group in enumerate(shapes):
            partitions = tuple(optim.partitions[index] for optim in self.optims)
            dtype = self.optims[0].dtypes[index]
            start = 0
            for name, shape in group.items():
                chunks = RankChunks(partitions, dtype.itemsize, start, prod(shape))
                self._add(name, dtype, shape, chunks, f"fp32 partitions, sub-group {index}")
                start += chunk_numel(prod(shape), len(partitions))
            for rank, part in enumerate(partitions):
                if part.numel != start:
                    raise self._layout(
                        f"sub-group {index} of rank {rank} does not hold what param_shapes lists",
                        f"{part.numel} elements",
                        f"{start} elements",
                    )

    def _add_frozen_whole(self) -> None:
        """Stage 2 saves frozen parameters whole, under both names; stage 1 leaves them in ``module``."""
        for name, ref in named_tensors(self.root.get("frozen_param_fragments")).items():
            if name not in self.entries:
                shape = shape_table(self.root.get("frozen_param_shapes")).get(name, ref.shape)
                if prod(shape) != prod(ref.shape):
                    raise self._layout(f"frozen parameter {name!r} has another size than its shape {shape}")
                entry = self.first.entry(name, ref, "frozen parameters")
                self.entries[name] = TensorEntry(name, entry.dtype, shape, entry.pieces, entry.origin)

    def _add_frozen_stage3(self) -> None:
        table = named_tensors(self.root.get("frozen_param_fragments"))
        files = [state.stamp.path for state in self.states]
        offsets = [state.fragments for state in self.states]
        for index, (name, shape) in enumerate(shape_table(self.root.get("frozen_param_shapes")).items()):
            if any(mine[index] == MISFIT for mine in offsets):
                raise self._layout(f"the fragments of the frozen parameter {name!r} do not add up to {shape}")
            dtype = table[name].dtype
            share = Fragments(files, offsets, index, chunk_numel(prod(shape), len(files)), dtype.itemsize)
            self._add(name, dtype, shape, RankChunks(share, dtype.itemsize, 0, prod(shape)), "frozen fragments")

    def _add_shared(self) -> None:
        shared = as_dict(self.root.get("shared_params"))
        for alias, owner in shared.items():
            if isinstance(alias, str) and isinstance(owner, str) and owner in self.entries:
                self.aliases[alias] = owner

    def _add_unpartitioned(self) -> None:
        """Stage 0 keeps nameless fp32 masters in ``optimizer``; they are used only if just one naming fits."""
        optimizer = as_dict(self.root.get("optimizer"))
        buffers = set(_strings(self.root.get("buffer_names")))
        module = {name: ref for name, ref in self.module().items() if name not in buffers}
        masters = _masters(optimizer)
        if masters is None:
            return
        named = _only_naming(module, masters)
        if named is None:
            self.warnings.append("the fp32 masters have no names and fit more than one way: taken from module instead")
            return
        for name, ref in named.items():
            self.entries[name] = self.first.entry(name, ref, "fp32 masters")

    def _add(self, name: str, dtype: DType, shape: Shape, pieces: Sequence[Piece], origin: str) -> None:
        self.entries[name] = TensorEntry(name, dtype, shape, pieces, origin)

    def _check_group_count(self, groups: int, what: str) -> None:
        for optim in self.optims:
            if len(optim.partitions) != groups:
                raise self._layout(
                    f"rank {optim.rank.data_parallel} does not have the {what} that param_shapes lists",
                    f"{len(optim.partitions)} in {optim.rank.path.name}",
                    str(groups),
                )

    def _check_group_size(self, index: int, held: int, needed: int) -> None:
        # The flat group is padded to a multiple of 2 * world before it is cut (stage_1_and_2.py, nccl_start_alignment_
        # factor = 2). Saved parts have lost that padding, except those of BF16_Optimizer.
        align = 2 * len(self.optims)
        if not needed <= held <= -(-needed // align) * align:
            raise self._layout(
                f"the ranks together do not hold parameter group {index}",
                f"{held} elements in {len(self.optims)} files",
                f"{needed} elements, as param_shapes says",
                "a rank file is missing, or files of two runs are mixed",
            )

    def _layout(self, what: str, found: str = "", expected: str = "", hint: str = "") -> CheckpointError:
        return CheckpointError("zero-layout", what, where=str(self.folder), found=found, expected=expected, hint=hint)


def _strings(value: Value) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


def _masters(optimizer: Mapping[object, Value]) -> list[tuple[TensorRef, ...]] | None:
    groups = optimizer.get("fp32_groups")
    if not isinstance(groups, list):
        return None
    found = [tensors(group) for group in groups]
    return [group for group in found if group is not None] if None not in found else None


def _only_naming(module: Mapping[str, TensorRef], groups: Sequence[Sequence[TensorRef]]) -> dict[str, TensorRef] | None:
    """Names the nameless masters if the order of ``module`` and the shapes leave exactly one way.

    A group lists its parameters in the order of the model, frozen ones left out, so its shapes are a subsequence of
    the module's. Several groups interleave: only one group, or every parameter in some group in order, is decidable.
    """
    flat = [ref for group in groups for ref in group]
    names = list(module)
    if len(groups) == 1 and _ways([module[n].shape for n in names], [ref.shape for ref in flat]) == 1:
        return _pair(names, module, flat)
    if len(flat) == len(names) and [module[n].shape for n in names] == [ref.shape for ref in flat]:
        return dict(zip(names, flat, strict=True)) if len(groups) == 1 else None
    return None


def _ways(shapes: list[Shape], wanted: list[Shape]) -> int:
    """Counts the ways (0, 1, or 2 for more) in which ``wanted`` is a subsequence of ``shapes``."""
    ways = [1] + [0] * len(wanted)
    for shape in shapes:
        for index in range(len(wanted) - 1, -1, -1):
            if wanted[index] == shape:
                ways[index + 1] = min(ways[index + 1] + ways[index], 2)
    return ways[-1]


def _pair(names: list[str], module: Mapping[str, TensorRef], refs: list[TensorRef]) -> dict[str, TensorRef]:
    named: dict[str, TensorRef] = {}
    rest = iter(refs)
    ref = next(rest, None)
    for name in names:
        if ref is not None and module[name].shape == ref.shape:
            named[name] = ref
            ref = next(rest, None)
    return named
