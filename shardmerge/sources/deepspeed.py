"""DeepSpeed checkpoints of ZeRO stages 0 to 3: a tag directory in, a catalog out.

What stands where: ``model_states`` hold the 16-bit ``module``, shapes, frozen parameters and buffers; ``optim_states``
hold the fp32 master weights, flat and partitioned over the ranks (see ``zero``), and the moments in the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import Tag, check_masters, check_module, check_tag
from shardmerge.sources.deepspeed_experts import ExpertWeights, check_expert_optims, data_before_experts, read_experts
from shardmerge.sources.deepspeed_files import DeepSpeedView, TagFiles
from shardmerge.sources.deepspeed_masters import has_masters, name_masters
from shardmerge.sources.deepspeed_partitions import (
    chunked_masters,
    flat_masters,
    frozen_chunks,
    frozen_whole,
    layout_error,
    listed_groups,
)
from shardmerge.sources.deepspeed_ranks import OptimState, RankReader, frozen_shares, shape_table
from shardmerge.sources.deepspeed_slices import sliced_groups
from shardmerge.sources.deepspeed_values import Stored
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_checkpoint import as_dict, training_config
from shardmerge.sources.torch_file import TorchFile
from shardmerge.tensors import Catalog, Shape, TensorEntry

# Where a tensor was found that has no masters.
SAVED = "module, as saved"


def read_parallel_rank(folder: Path, listed: TagFiles, reader: RankReader, view: DeepSpeedView) -> Catalog:
    """Returns the catalog of the files of one model-parallel rank, or of a run that has no more of them.

    Parameters
    ----------
    folder
        The tag directory.
    listed, reader
        The files, and what reads them.
    view
        As ``read_deepspeed``.

    Raises
    ------
    CheckpointError
        ``missing-rank``, ``mixed-runs``, ``zero-layout``, ``no-module-view``, ``no-moments``, and what the torch reader
        raises.
    """
    first = reader.file(listed.models[0])
    root = as_dict(first.root)
    experts = None
    if listed.experts or root.get("num_experts"):
        roots = [root, *(as_dict(reader.file(rank).root) for rank in listed.optims[:1])]
        experts = read_experts(folder, listed.experts, root.get("num_experts"), data_first=data_before_experts(roots))
    if view == "module":
        state = reader.model(listed.models[0], {})
        check_module(folder, state)
        return _Builder(Tag(folder, [state], []), first, reader, experts, view).module_catalog()
    optims = [reader.optim(rank) for rank in listed.optims]
    if not optims:
        check_expert_optims(folder, listed.expert_optims)
    frozen = frozen_shares(root, len(listed.models)) if listed.models[0].partitioned else {}
    tag = Tag(folder, [reader.model(rank, frozen) for rank in listed.models], optims)
    check_tag(tag)
    masters = _Builder(tag, first, reader, experts).fp32_catalog()
    if view == "fp32":
        return masters
    moments = [reader.optim(rank, view) for rank in listed.optims]  # of files whose masters are right
    return _Builder(Tag(folder, tag.states, moments), first, reader, experts, view).moment_catalog()


def universal_catalog(
    tag: Tag, first: TorchFile, reader: RankReader, masters: Mapping[str, TensorEntry], steps: str
) -> Catalog:
    """Returns the catalog of masters that lie whole, and of whatever has none; as ``read_parallel_rank``.

    Parameters
    ----------
    tag, first, reader
        The model files, the first of them, and what reads them.
    masters
        By name.
    steps
        What the masters' optimizer counts and the model file does not, in words; ``""`` for the same.
    """
    return _Builder(tag, first, reader, None).universal_catalog(masters, steps)


@dataclass(slots=True)
class _Builder:
    """Collects the entries of one checkpoint."""

    tag: Tag
    first: TorchFile
    reader: RankReader
    experts: ExpertWeights | None
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

    def module(self) -> dict[str, Stored]:
        """Tensors of ``module``, empty where the file has none, and those of the experts' files; by name."""
        found = state_dict(self.first.root, key="module").tensors if as_dict(self.root.get("module")) else {}
        mine = {name: Stored(self.first, ref) for name, ref in found.items()}
        return mine | dict(self.experts.tensors) if self.experts is not None else mine

    def fp32_catalog(self) -> Catalog:
        """Master weights first, then whatever has none: frozen parameters, buffers, the rest of ``module``."""
        if self.tag.stage < 3 and not self.optims:
            self._add_unpartitioned()
            return self._with_module()
        if self.tag.stage < 3:
            self._check_module_shapes()
        self._add_masters(self._partitions())
        return self._with_module()

    def universal_catalog(self, masters: Mapping[str, TensorEntry], steps: str) -> Catalog:
        """As ``fp32_catalog``, with masters that are whole."""
        if self.tag.stage < 3:
            self._check_module_shapes()
        self._add_masters(masters, steps)
        return self._with_module()

    def moment_catalog(self) -> Catalog:
        """What the optimizer keeps beside the weights that it steps; nothing for all others."""
        named = self._groups() if self.optims else []
        told = self.reader.optimizer(self.tag.folder, [optim.rank for optim in self.optims], named)
        self.entries |= self._partitions()
        return replace(self._catalog(), optimizer=told)

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
            "this checkpoint has no complete 16-bit module: ZeRO-3 saves placeholders for it",
            where=self.first.path,
            found=f"{len(absent)} tensors without data: {shown(absent)}" if absent else "",
            hint="leave --view out, and cast the fp32 weights: --dtype bfloat16",
        )

    def _add_module(self) -> None:
        """Adds the tensors of ``module`` that are not there yet; shared storages become aliases."""
        owners: dict[object, str] = {}
        shared = as_dict(self.root.get("shared_params"))
        empty = {name for group in self._listed_shapes() for name, shape in group.items() if 0 in shape}
        for name, (file, ref) in self.module().items():
            key = file.path, file.alias_key(ref)
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
                self.entries[name] = file.entry(name, ref, SAVED)

    def _partitions(self) -> dict[str, TensorEntry]:
        """What the optimizer files of all ranks hold, by name of the parameter."""
        if self.tag.stage == 3:
            return chunked_masters(self.tag, self._groups(), self.view)
        return flat_masters(self.tag, self._groups(), self.experts, self.view)

    def _add_masters(self, masters: Mapping[str, TensorEntry], steps: str = "") -> None:
        """Adds masters that agree with ``module``, and the frozen parameters, which have none."""
        self.entries.update(masters)
        self.warnings += check_masters(self.tag, self.module(), self.entries, steps)
        if self.tag.stage == 3:
            self.entries |= frozen_chunks(self.tag, self.root)
        else:
            self.entries |= frozen_whole(self.tag, self.first, self.entries)

    def _with_module(self) -> Catalog:
        self._add_module()
        self._add_shared()
        self._check_all_there()
        return self._catalog()

    def _catalog(self) -> Catalog:
        files = (*(state.stamp for state in self.tag.states), *(optim.stamp for optim in self.optims))
        if self.experts is not None:
            files += self.experts.stamps
        return Catalog(
            str(self.tag.folder),
            f"DeepSpeed ZeRO-{self.tag.stage}",
            self.entries,
            {alias: owner for alias, owner in self.aliases.items() if alias not in self.entries},
            files,
            absent=frozenset(self.absent - set(self.aliases)),
            notes=(f"{self.view} view of {max(len(self.optims), 1)} rank(s)", *self._of_experts()),
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
            if name in module and module[name].ref.shape not in (shape, (0,)):
                raise layout_error(
                    self.tag.folder,
                    f"the module does not have the parameter {shown(name)} in the shape that is stated",
                    f"{module[name].ref.shape} in module",
                    f"{shape}, as the shapes in the model file say",
                )

    def _check_all_there(self) -> None:
        """What the model file lists is there; buffers may have been left out by a ``state_dict`` of the user's."""
        listed = {name: None for group in self._listed_shapes() for name in group}
        shared = as_dict(self.root.get("shared_params")).items()
        tied = [name for name, owner in shared if isinstance(name, str) and isinstance(owner, str) and owner in listed]
        missing = [name for name in (*listed, *tied) if name not in self.entries and name not in self.aliases]
        if missing:
            raise layout_error(
                self.tag.folder,
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

    def _groups(self) -> list[dict[str, Shape]]:
        """Shapes of the trained parameters, group by group."""
        if self.experts is not None and "param_shapes" not in self.root:
            return sliced_groups(self.tag, self.reader, self.module(), self.experts)
        return listed_groups(self.tag, self.root)

    def _of_experts(self) -> Iterator[str]:
        """What is to be said of experts: how many, and which of their weights have no masters."""
        if self.experts is None:
            return
        tensors = self.experts.tensors
        found = [self.entries[name] for name in tensors if name in self.entries and self.optims]
        narrow = sum(1 for entry in found if entry.origin == SAVED)
        yield f"{sum(self.experts.counts.values())} experts in {len(self.experts.counts)} layer(s)"
        if narrow:
            yield f"{narrow} tensors of experts have no fp32 masters (frozen): their 16-bit files are taken"

    def _add_shared(self) -> None:
        shared = as_dict(self.root.get("shared_params"))
        for alias, owner in shared.items():
            if isinstance(alias, str) and isinstance(owner, str) and owner in self.entries:
                self.aliases[alias] = owner

    def _add_unpartitioned(self) -> None:
        """Stage 0 keeps nameless fp32 masters in ``optimizer``; they are used where their values name every one."""
        optimizer = as_dict(self.root.get("optimizer"))
        buffers = set(_strings(self.root.get("buffer_names")))
        module = {name: ref for name, (_, ref) in self.module().items() if name not in buffers}
        if not has_masters(optimizer):
            if any(ref.dtype.name in ("BF16", "F16") for ref in module.values()):
                self.warnings.append("the checkpoint has no fp32 masters: the 16-bit module is taken")
            return
        if self.experts is not None:  # each rank has those of its own, nameless
            self.warnings.append("the fp32 masters of a model with experts have no names: the 16-bit weights are taken")
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


def _strings(value: PickleValue) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []
