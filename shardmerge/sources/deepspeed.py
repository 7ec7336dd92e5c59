"""DeepSpeed checkpoints of ZeRO stages 0 to 3: a tag directory in, a catalog out.

What stands where: ``model_states`` hold the 16-bit ``module``, shapes, frozen parameters and buffers; ``optim_states``
hold the fp32 master weights, flat and partitioned over the ranks (see ``zero``), and the moments, which are never read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.sources.deepspeed_files import RankFile, kind_not_yet, list_tag
from shardmerge.sources.pickle_vm import Opaque, TensorRef, Value
from shardmerge.sources.torch_checkpoint import as_dict, training_config
from shardmerge.sources.torch_file import TorchFile, read_torch_file, state_dict
from shardmerge.sources.zero import FlatGroup, Partition, RankChunks, chunk_numel, flat_offsets
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Extent, Piece, Shape, Strided, TensorEntry

View: TypeAlias = Literal["fp32", "module"]


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
    states = [_RankState(read_torch_file(rank.path), rank) for rank in tag.models]
    first = states[0]
    if "num_experts" in first.root and _largest(first.root["num_experts"]) > 0:
        raise kind_not_yet(folder, "mixture-of-experts (MoE)")
    optims = [_OptimState.of(read_torch_file(rank.path), rank) for rank in tag.optims]
    _check_ranks(folder, states, optims)
    stage = _stage(optims)
    builder = _Builder(folder, states, optims, stage)
    if view == "module":
        builder.add_module(required=True)
    else:
        builder.add_fp32()
    return builder.catalog(view)


@dataclass(frozen=True, slots=True)
class _RankState:
    """One ``model_states`` file."""

    file: TorchFile
    rank: RankFile

    @property
    def root(self) -> Mapping[object, Value]:
        return as_dict(self.file.root)

    def module(self) -> dict[str, TensorRef]:
        """Tensors of ``module``, by name; empty where the file has none."""
        return state_dict(self.file.root, key="module").tensors if as_dict(self.root.get("module")) else {}


@dataclass(frozen=True, slots=True)
class _OptimState:
    """One ``optim_states`` file, reduced to what the layout needs.

    Attributes
    ----------
    stage
        ZeRO stage, 1 for BF16_Optimizer, which writes none (its layout is that of stage 1).
    flats
        The rank's flat fp32 tensors: one a parameter group (stages 1, 2) or one a sub-group (stage 3).
    world
        Ranks that share the partitions, as the file says; 0 if it does not.
    """

    file: TorchFile
    rank: RankFile
    stage: int
    flats: tuple[TensorRef, ...]
    world: int
    paddings: tuple[tuple[int, ...], ...]
    settings: Value
    step: float | None

    @staticmethod
    def of(file: TorchFile, rank: RankFile) -> _OptimState:
        state = as_dict(as_dict(file.root).get("optimizer_state_dict"))
        stage = _stage_number(state.get("zero_stage"))
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        flats = _tensors(state.get(key))
        if flats is None:
            raise CheckpointError(
                "zero-layout",
                f"the optimizer file has no {key}",
                where=file.path,
                found=", ".join(str(name) for name in state) or "no optimizer_state_dict",
                hint="shardmerge reads the files of DeepSpeed 0.9 to 0.19, ZeRO stages 0 to 3",
            )
        return _OptimState(
            file,
            rank,
            stage,
            flats,
            _largest(state.get("partition_count")),
            _paddings(state.get("param_alignment_paddings")),
            as_dict(file.root).get("ds_config"),
            _first_step(file, state),
        )

    def partition(self, index: int) -> Partition:
        return _partition(self.file, self.flats[index])


@dataclass(slots=True)
class _Builder:
    """Collects the entries of one checkpoint."""

    folder: Path
    states: list[_RankState]
    optims: list[_OptimState]
    stage: int
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> _RankState:
        return self.states[0]

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
        module = self.first.module()
        holders = {name for name, ref in module.items() if ref.shape == (0,) and self.stage == 3}
        if required and (not module or len(holders) > len(module) // 2):
            raise CheckpointError(
                "no-module-view",
                "this checkpoint has no whole 16-bit module: ZeRO-3 saves placeholders of it",
                where=self.first.file.path,
                hint="use the fp32 view and cast it: --dtype bfloat16",
            )
        owners: dict[object, str] = {}
        for name, ref in module.items():
            key = self.first.file.alias_key(ref)
            if name in holders:
                if name not in self.entries:
                    self.absent.add(name)
            elif name in self.entries:
                owners.setdefault(key, name)
            elif prod(ref.shape) and key in owners:
                self.aliases[name] = owners[key]
            else:
                owners.setdefault(key, name)
                self.entries[name] = self.first.file.entry(name, ref, "module, as saved")

    def catalog(self, view: View) -> Catalog:
        files = (*(state.file.stamp for state in self.states), *(optim.file.stamp for optim in self.optims))
        return Catalog(
            str(self.folder),
            f"DeepSpeed ZeRO-{self.stage}",
            self.entries,
            {alias: owner for alias, owner in self.aliases.items() if alias not in self.entries},
            files,
            absent=frozenset(self.absent - set(self.aliases)),
            notes=(*self.notes, f"{view} view of {max(len(self.optims), 1)} rank(s)"),
            training_config=training_config(self.first.file),
        )

    def _shapes(self) -> list[dict[str, Shape]]:
        groups = self.first.root.get("param_shapes")
        listed = groups if isinstance(groups, list) else [groups]
        if not all(isinstance(group, dict) for group in listed):
            raise self._layout("the model file has no param_shapes, so the partitions cannot be named")
        return [_shape_table(group) for group in listed]

    def _add_stage12(self) -> None:
        shapes = self._shapes()
        self._check_group_count(len(shapes), "parameter groups")
        for index, group in enumerate(shapes):
            flat = FlatGroup.of(self.optims[0].flats[index].dtype, [o.partition(index) for o in self.optims])
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
            partitions = tuple(optim.partition(index) for optim in self.optims)
            dtype = self.optims[0].flats[index].dtype
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
        for name, ref in _named_tensors(self.first.root.get("frozen_param_fragments")).items():
            if name not in self.entries:
                shape = _shape_table(self.first.root.get("frozen_param_shapes")).get(name, ref.shape)
                if prod(shape) != prod(ref.shape):
                    raise self._layout(f"frozen parameter {name!r} has another size than its shape {shape}")
                entry = self.first.file.entry(name, ref, "frozen parameters")
                self.entries[name] = TensorEntry(name, entry.dtype, shape, entry.pieces, entry.origin)

    def _add_frozen_stage3(self) -> None:
        tables = [_named_tensors(state.root.get("frozen_param_fragments")) for state in self.states]
        shapes = _shape_table(self.first.root.get("frozen_param_shapes"))
        for name, shape in shapes.items():
            parts = [
                _partition(state.file, table[name])
                for state, table in zip(self.states, tables, strict=True)
                if name in table
            ]
            chunk = chunk_numel(prod(shape), len(self.states))
            if len(parts) != len(self.states) or any(part.numel != chunk for part in parts):
                raise self._layout(f"the fragments of the frozen parameter {name!r} do not add up to {shape}")
            dtype = tables[0][name].dtype
            chunks = RankChunks(tuple(parts), dtype.itemsize, 0, prod(shape))
            self._add(name, dtype, shape, chunks, "frozen fragments")

    def _add_shared(self) -> None:
        shared = as_dict(self.first.root.get("shared_params"))
        for alias, owner in shared.items():
            if isinstance(alias, str) and isinstance(owner, str) and owner in self.entries:
                self.aliases[alias] = owner

    def _add_unpartitioned(self) -> None:
        """Stage 0 keeps nameless fp32 masters in ``optimizer``; they are used only if just one naming fits."""
        optimizer = as_dict(self.first.root.get("optimizer"))
        buffers = set(_strings(self.first.root.get("buffer_names")))
        module = {name: ref for name, ref in self.first.module().items() if name not in buffers}
        masters = _masters(optimizer)
        if masters is None:
            return
        named = _only_naming(module, masters)
        if named is None:
            self.notes.append("the fp32 masters have no names and fit more than one way: taken from module instead")
            return
        for name, ref in named.items():
            self.entries[name] = self.first.file.entry(name, ref, "fp32 masters")

    def _add(self, name: str, dtype: DType, shape: Shape, pieces: Sequence[Piece], origin: str) -> None:
        self.entries[name] = TensorEntry(name, dtype, shape, pieces, origin)

    def _check_group_count(self, groups: int, what: str) -> None:
        for optim in self.optims:
            if len(optim.flats) != groups:
                raise self._layout(
                    f"rank {optim.rank.data_parallel} does not have the {what} that param_shapes lists",
                    f"{len(optim.flats)} in {optim.rank.path.name}",
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


def _tensors(value: Value) -> tuple[TensorRef, ...] | None:
    if not isinstance(value, (list, tuple)):
        return None
    found = tuple(item for item in value if isinstance(item, TensorRef))
    return found if len(found) == len(value) else None


def _named_tensors(value: Value) -> dict[str, TensorRef]:
    pairs = as_dict(value).items()
    return {name: ref for name, ref in pairs if isinstance(name, str) and isinstance(ref, TensorRef)}


def _shape_table(value: Value) -> dict[str, Shape]:
    table: dict[str, Shape] = {}
    for name, shape in as_dict(value).items():
        if isinstance(name, str) and isinstance(shape, tuple):
            table[name] = tuple(n for n in shape if isinstance(n, int))
    return table


def _partition(file: TorchFile, ref: TensorRef) -> Partition:
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


def _stage(optims: list[_OptimState]) -> int:
    return optims[0].stage if optims else 0


def _largest(value: Value) -> int:
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


def _check_ranks(folder: Path, states: list[_RankState], optims: list[_OptimState]) -> None:
    raise_all([*_missing_ranks(folder, states, optims), *_mixed_runs(folder, states, optims)])


def _missing_ranks(folder: Path, states: list[_RankState], optims: list[_OptimState]) -> Iterator[ShardmergeError]:
    claims = [optim.world for optim in optims]
    saved_world = states[0].root.get("dp_world_size")
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


def _mixed_runs(folder: Path, states: list[_RankState], optims: list[_OptimState]) -> Iterator[ShardmergeError]:
    facts: list[tuple[str, list[tuple[Path, object]]]] = [
        ("ZeRO stage", [(o.rank.path, o.stage) for o in optims]),
        ("world size", [(o.rank.path, o.world) for o in optims]),
        ("optimizer step", [(o.rank.path, o.step) for o in optims if o.step is not None]),
        ("ds_config", [(o.rank.path, repr(o.settings)) for o in optims]),
        ("param_shapes", [(s.rank.path, repr(s.root.get("param_shapes"))) for s in states]),
        ("global_steps", [(s.rank.path, s.root.get("global_steps")) for s in states]),
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


def _masters(optimizer: Mapping[object, Value]) -> list[tuple[TensorRef, ...]] | None:
    groups = optimizer.get("fp32_groups")
    if not isinstance(groups, list):
        return None
    found = [_tensors(group) for group in groups]
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
