"""DeepSpeed checkpoints of ZeRO stages 0 to 3: a tag directory in, a catalog out.

What stands where: ``model_states`` hold the 16-bit ``module``, shapes, frozen parameters and buffers; ``optim_states``
hold the fp32 master weights, flat and partitioned over the ranks (see ``zero``), and the moments, which are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import (
    ONE_SAVE,
    Tag,
    check_kind,
    check_masters,
    check_module,
    check_tag,
    step_of,
)
from shardmerge.sources.deepspeed_claims import read_claims
from shardmerge.sources.deepspeed_files import DeepSpeedView, list_tag
from shardmerge.sources.deepspeed_masters import has_masters, name_masters
from shardmerge.sources.deepspeed_ranks import (
    MISFIT,
    OptimState,
    RankReader,
    frozen_shares,
    named_tensors,
    shape_table,
)
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_checkpoint import as_dict, training_config
from shardmerge.sources.torch_file import TorchFile
from shardmerge.sources.zero import FlatGroup, flat_offsets
from shardmerge.tensors import Catalog, Piece, Shape, TensorEntry
from shardmerge.tensors.ranks import Fragments, RankChunks, chunk_numel


def read_deepspeed(folder: Path, *, view: DeepSpeedView = "fp32") -> Catalog:
    """Returns the catalog of a DeepSpeed tag directory.

    Parameters
    ----------
    folder
        The directory that holds the ``*_model_states.pt`` files.
    view
        ``fp32``: the master weights, with frozen parameters and buffers as they were saved. ``module``: the 16-bit
        weights of the forward pass, where the checkpoint has them (stages 0 to 2). ``exp_avg``, ``exp_avg_sq``: a
        moment of Adam under the names of the weights that are trained; ``facts`` has the ``step``.

    Raises
    ------
    CheckpointError
        ``kind-not-yet`` (MoE, tensor parallel), ``missing-layer``, ``missing-rank``, ``mixed-runs``, ``zero-layout``,
        ``no-module-view``, ``no-moments``, and what the torch reader raises.
    """
    listed = list_tag(folder)
    reader = RankReader()
    first = reader.file(listed.models[0])
    check_kind(folder, read_claims(as_dict(first.root)), listed.model_parallel + 1)
    if view == "module":
        state = reader.model(listed.models[0], {})
        check_module(folder, state)
        return _Builder(Tag(folder, [state], []), first, view).module_catalog()
    optims = [reader.optim(rank) for rank in listed.optims]
    frozen = frozen_shares(as_dict(first.root), len(listed.models)) if listed.models[0].partitioned else {}
    tag = Tag(folder, [reader.model(rank, frozen) for rank in listed.models], optims)
    check_tag(tag)
    masters = _Builder(tag, first).fp32_catalog()
    if view == "fp32":
        return masters
    moments = [reader.optim(rank, view) for rank in listed.optims]  # of files whose masters are right
    return _Builder(Tag(folder, tag.states, moments), first, view).moment_catalog()


def stage_masters(tag: Tag, model: TorchFile) -> dict[str, TensorEntry]:
    """Returns the masters that the ranks of one pipeline stage hold, by name; ``model`` is the stage's model file."""
    builder = _Builder(tag, model)
    builder.add_stage12()
    return builder.entries


def universal_catalog(tag: Tag, model: TorchFile, masters: Mapping[str, TensorEntry], steps: str) -> Catalog:
    """Returns the catalog of masters that lie whole, and of whatever has none; as ``read_deepspeed``.

    Parameters
    ----------
    tag, model
        The model files, and the first of them.
    masters
        By name.
    steps
        What the masters' optimizer counts and the model file does not, in words; ``""`` for the same.
    """
    return _Builder(tag, model).universal_catalog(masters, steps)


@dataclass(slots=True)
class _Builder:
    """Collects the entries of one checkpoint."""

    tag: Tag
    first: TorchFile
    view: DeepSpeedView = "fp32"
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    @property
    def root(self) -> Mapping[object, PickleValue]:
        """What rank 0's model file holds."""
        return as_dict(self.first.root)

    @property
    def optims(self) -> Sequence[OptimState]:
        """The optimizer files, in rank order."""
        return self.tag.optims

    def module(self) -> dict[str, TensorRef]:
        """Tensors of ``module``, by name; empty where the file has none."""
        return state_dict(self.first.root, key="module").tensors if as_dict(self.root.get("module")) else {}

    def fp32_catalog(self) -> Catalog:
        """Master weights first, then whatever has none: frozen parameters, buffers, the rest of ``module``."""
        if self.tag.stage == 3:
            self._add_stage3()
            self._check_masters()
            self._add_frozen_stage3()
        elif self.optims:
            self._check_module_shapes()
            self.add_stage12()
            self._check_masters()
            self._add_frozen_whole()
        else:
            self._add_unpartitioned()
        return self._with_module()

    def universal_catalog(self, masters: Mapping[str, TensorEntry], steps: str) -> Catalog:
        """As ``fp32_catalog``, with masters that are whole."""
        if self.tag.stage < 3:
            self._check_module_shapes()
        self.entries.update(masters)
        self._check_masters(steps)
        if self.tag.stage == 3:
            self._add_frozen_stage3()
        else:
            self._add_frozen_whole()
        return self._with_module()

    def _check_masters(self, steps: str = "") -> None:
        module = {name: (self.first, ref) for name, ref in self.module().items()}
        self.warnings += check_masters(self.tag, module, self.entries, steps)

    def _with_module(self) -> Catalog:
        self._add_module()
        self._add_shared()
        self._check_all_there()
        return self._catalog()

    def moment_catalog(self) -> Catalog:
        """What the optimizer keeps beside the weights that it steps; nothing for all others."""
        step = step_of(self.tag)
        (self._add_stage3 if self.tag.stage == 3 else self.add_stage12)()
        return replace(self._catalog(), facts={"step": step})

    def module_catalog(self) -> Catalog:
        """The 16-bit weights, all or nothing: half of them in another precision is no model that anybody asked for."""
        self._check_module_shapes()
        self._add_module()
        listed = {name for group in self._listed_shapes() for name in group}
        if not self.entries or self.absent & listed or (self.absent and self.states_stage3):
            raise self._no_module(sorted(self.absent))
        self._add_shared()
        return self._catalog()

    @property
    def states_stage3(self) -> bool:
        """Whether the model file is one of stage 3."""
        return self.tag.states[0].rank.partitioned

    def _no_module(self, absent: list[str]) -> CheckpointError:
        return CheckpointError(
            "no-module-view",
            "this checkpoint has no whole 16-bit module: ZeRO-3 saves placeholders of it",
            where=self.first.path,
            found=f"{len(absent)} tensors without data: {shown(absent)}" if absent else "",
            hint="leave --view out, and cast the fp32 weights: --dtype bfloat16",
        )

    def _add_module(self) -> None:
        """Adds the tensors of ``module`` that are not there yet; shared storages become aliases."""
        owners: dict[object, str] = {}
        shared = as_dict(self.root.get("shared_params"))
        empty = {name for group in self._listed_shapes() for name, shape in group.items() if 0 in shape}
        for name, ref in self.module().items():
            key = self.first.alias_key(ref)
            owner = shared.get(name)
            if name in self.entries:
                owners.setdefault(key, name)
            elif isinstance(owner, str) and owner in self.entries:
                self.aliases[name] = owner
            elif ref.shape == (0,) and name not in empty:
                self.absent.add(name)  # what stage 3, or a save that gathered nothing, leaves of a parameter
            elif prod(ref.shape) and key in owners:
                self.aliases[name] = owners[key]
            else:
                owners.setdefault(key, name)
                self.entries[name] = self.first.entry(name, ref, "module, as saved")

    def _catalog(self) -> Catalog:
        files = (*(state.stamp for state in self.tag.states), *(optim.stamp for optim in self.optims))
        return Catalog(
            str(self.tag.folder),
            f"DeepSpeed ZeRO-{self.tag.stage}",
            self.entries,
            {alias: owner for alias, owner in self.aliases.items() if alias not in self.entries},
            files,
            absent=frozenset(self.absent - set(self.aliases)),
            notes=(f"{self.view} view of {max(len(self.optims), 1)} rank(s)",),
            warnings=tuple(self.warnings),
            training_config=training_config(self.first),
        )

    def _listed_shapes(self) -> list[dict[str, Shape]]:
        """Shapes of all parameters that the model file lists, trained or frozen; empty where it lists none."""
        groups = self.root.get("param_shapes")
        listed = groups if isinstance(groups, list) else [groups]
        return [shape_table(group) for group in (*listed, self.root.get("frozen_param_shapes"))]

    def _check_module_shapes(self) -> None:
        """Below stage 3, module and param_shapes say the same shape of a parameter; a placeholder says none."""
        module = self.module()
        for name, shape in ((n, s) for group in self._listed_shapes() for n, s in group.items()):
            if name in module and module[name].shape not in (shape, (0,)):
                raise self._layout(
                    f"the module does not have the parameter {shown(name)} in the shape that is stated",
                    f"{module[name].shape} in module",
                    f"{shape}, as the shapes in the model file say",
                )

    def _check_all_there(self) -> None:
        """What the model file lists is there; buffers may have been left out by a ``state_dict`` of the user's."""
        listed = {name: None for group in self._listed_shapes() for name in group}
        shared = as_dict(self.root.get("shared_params")).items()
        tied = [name for name, owner in shared if isinstance(name, str) and isinstance(owner, str) and owner in listed]
        missing = [name for name in (*listed, *tied) if name not in self.entries and name not in self.aliases]
        if missing:
            raise self._layout(
                "the model file lists parameters that are in none of the files",
                f"{len(missing)}: {shown(missing)}",
                hint="copy the checkpoint again from where the run saved it",
            )
        module = self.module()
        unknown = [name for name in listed if name not in module]
        if module and unknown:  # a state_dict of the user's may have names of its own
            self.warnings.append(f"{len(unknown)} parameters are not in module under their names: {shown(unknown)}")
        buffers = [name for name in _strings(self.root.get("buffer_names")) if name not in self.entries]
        if buffers:
            self.warnings.append(f"{len(buffers)} buffers that the model file lists are not in it: {shown(buffers)}")

    def _shapes(self) -> list[dict[str, Shape]]:
        groups = self.root.get("param_shapes")
        listed = groups if isinstance(groups, list) else [groups]
        if not all(isinstance(group, dict) for group in listed):
            raise self._layout("the model file has no param_shapes, so the partitions cannot be named")
        return [shape_table(group) for group in listed]

    def add_stage12(self) -> None:
        shapes = self._shapes()
        self._check_group_count(len(shapes), "parameter groups")
        for index, group in enumerate(shapes):
            flat = FlatGroup.of(self.optims[0].dtypes[index], [optim.partitions[index] for optim in self.optims])
            offsets = flat_offsets(list(group.values()), self._paddings(index, len(group)))
            self._check_group_size(index, flat.numel, offsets[-1])
            for (name, shape), start in zip(group.items(), offsets, strict=False):
                pieces = flat.pieces(start, prod(shape))
                self._add(name, flat.dtype, shape, pieces, f"{self.view} partitions, group {index}")

    def _paddings(self, index: int, parameters: int) -> tuple[int, ...]:
        """Elements to skip after each parameter of a group, empty for none."""
        paddings = self.optims[0].paddings
        mine = paddings[index] if index < len(paddings) else ()
        if paddings and len(mine) != parameters:
            raise self._layout(
                f"the optimizer files have other parameters in group {index} than the model file",
                f"{len(mine)} in param_alignment_paddings of {self.optims[0].rank.path.name}",
                f"{parameters}, as param_shapes says",
                ONE_SAVE,
            )
        return mine

    def _add_stage3(self) -> None:
        shapes = self._shapes()
        self._check_group_count(len(shapes), "sub-groups")
        for index, group in enumerate(shapes):
            partitions = tuple(optim.partitions[index] for optim in self.optims)
            dtype = self.optims[0].dtypes[index]
            start = 0
            for name, shape in group.items():
                chunks = RankChunks(partitions, dtype.itemsize, start, prod(shape))
                self._add(name, dtype, shape, chunks, f"{self.view} partitions, sub-group {index}")
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
        files = tuple(state.stamp.path for state in self.tag.states)
        offsets = tuple(state.fragments for state in self.tag.states)
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
        """Stage 0 keeps nameless fp32 masters in ``optimizer``; they are used where their values name every one."""
        optimizer = as_dict(self.root.get("optimizer"))
        buffers = set(_strings(self.root.get("buffer_names")))
        module = {name: ref for name, ref in self.module().items() if name not in buffers}
        if not has_masters(optimizer):
            if any(ref.dtype.name in ("BF16", "F16") for ref in module.values()):
                self.warnings.append("the checkpoint has no fp32 masters: the 16-bit module is taken")
            return
        named = name_masters(self.first, optimizer, module)
        if named is None:
            self.warnings.append(
                "the fp32 masters have no names, and their values do not tell which is which: "
                "the 16-bit module is taken instead"
            )
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
                    ONE_SAVE,
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
                ONE_SAVE,
            )

    def _layout(self, what: str, found: str = "", expected: str = "", hint: str = "") -> CheckpointError:
        return CheckpointError(
            "zero-layout", what, where=str(self.tag.folder), found=found, expected=expected, hint=hint
        )


def _strings(value: PickleValue) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []
