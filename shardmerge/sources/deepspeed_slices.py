"""Names and order of the partitions of a mixture of experts before DeepSpeed 0.17, whose model files list no shapes.

They stand in each rank's ``param_slice_mappings`` alone: group by group the parameters of which the rank holds a part,
with the start of it and how many elements (``utils/tensor_fragment.py``). A parameter on the border of two ranks is in
both. The list does not follow ``round_robin_gradients``, which orders the data in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import ONE_SAVE, Tag
from shardmerge.sources.deepspeed_claims import settings_of
from shardmerge.sources.deepspeed_experts import ExpertWeights, is_expert
from shardmerge.sources.deepspeed_partitions import expert_parts, layout_error
from shardmerge.sources.deepspeed_ranks import RankReader
from shardmerge.sources.deepspeed_values import Stored
from shardmerge.sources.pickle_values import Opaque, PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.tensors import Shape

# Elements of each parameter of a group, in order.
_Sizes = dict[str, int]


def sliced_groups(
    tag: Tag, reader: RankReader, module: Mapping[str, Stored], experts: ExpertWeights
) -> list[dict[str, Shape]]:
    """Returns the groups as ``param_shapes`` would list them: those of the first rank.

    Parameters
    ----------
    tag, reader
        The files.
    module
        Tensors that say the shapes, by name: those of the model file and of the experts' files.
    experts
        Which ranks share which of them.

    Raises
    ------
    CheckpointError
        ``zero-layout``: the ranks do not say the same, or what no tensor's shape is.
    """
    roots = [as_dict(reader.file(optim.rank).root) for optim in tag.optims]
    _check_order(tag, roots)
    tables = [_groups(as_dict(root.get("optimizer_state_dict")).get("param_slice_mappings")) for root in roots]
    return [_shaped(tag, _sizes(tag, index, tables, experts), module) for index in range(len(tag.optims[0].partitions))]


def _check_order(tag: Tag, roots: Iterable[Mapping[object, PickleValue]]) -> None:
    for root in roots:
        zero = settings_of((settings_of(root.get("ds_config")) or {}).get("zero_optimization"))
        if zero and zero.get("round_robin_gradients"):
            raise layout_error(
                tag.folder,
                "the order of the partitions is not written down: round_robin_gradients, and no param_shapes",
                hint="take the 16-bit weights of the model file alone: --view module (in a mapping, `view: module`)",
            )


def _groups(value: PickleValue) -> list[dict[str, tuple[int, int]]]:
    """Returns start and length of the slices of one rank, group by group."""
    found = []
    for group in value if isinstance(value, list) else []:
        slices = {}
        for name, address in as_dict(group).items():
            state = as_dict(address.state) if isinstance(address, Opaque) else {}
            start, numel = state.get("start"), state.get("numel")
            if isinstance(name, str) and isinstance(start, int) and isinstance(numel, int):
                slices[name] = start, numel
        found.append(slices)
    return found


def _sizes(
    tag: Tag, index: int, tables: Sequence[Sequence[Mapping[str, tuple[int, int]]]], experts: ExpertWeights
) -> _Sizes:
    """Returns the parameters of a group with their elements, which all ranks that hold a part of it agree in."""
    mine = {
        optim.rank.path: table[index] for optim, table in zip(tag.optims, tables, strict=True) if index < len(table)
    }
    if len(mine) != len(tag.optims):
        raise layout_error(tag.folder, f"param_slice_mappings has no group {index} in some of the optimizer files")
    spread = any(is_expert(name) for slices in mine.values() for name in slices)
    parts = expert_parts(tag, index) if spread else 1
    found = [
        _joined(tag, index, [mine[optim.rank.path] for optim in experts.sharing(tag.optims, part, parts)])
        for part in range(parts)
    ]
    if any(list(other.items()) != list(found[0].items()) for other in found):
        what = f"the ranks do not hold the same parameters of their experts in group {index}"
        raise layout_error(tag.folder, what, hint=ONE_SAVE)
    return found[0]


def _joined(tag: Tag, index: int, ranks: Sequence[Mapping[str, tuple[int, int]]]) -> _Sizes:
    """Returns the elements of the parameters of which several ranks hold parts, one behind the other."""
    sizes: _Sizes = {}
    for rank, slices in enumerate(ranks):
        end = 0
        for number, (name, (start, numel)) in enumerate(slices.items()):
            begun = name in sizes
            if start != end or numel < 0 or (begun and (number or next(reversed(sizes)) != name)):
                what = f"param_slice_mappings of part {rank} of group {index} are not one behind the other"
                raise layout_error(tag.folder, what, f"{shown(name)} at {start}", f"the next one at {end}")
            sizes[name] = sizes.get(name, 0) + numel
            end += numel
    return sizes


def _shaped(tag: Tag, sizes: _Sizes, module: Mapping[str, Stored]) -> dict[str, Shape]:
    shapes = {name: module[name].ref.shape for name in sizes if name in module}
    odd = [name for name, numel in sizes.items() if name not in shapes or prod(shapes[name]) != numel]
    if odd:
        raise layout_error(
            tag.folder,
            "parameters of the partitions are not in the model's files in their size",
            f"{len(odd)}: {shown(odd)}",
            hint=ONE_SAVE,
        )
    return shapes
