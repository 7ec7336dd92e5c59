"""DeepSpeed pipelines: layer files and a model file for each stage in, a catalog out.

The masters of ZeRO stage 1 are cut like those of any model, stage by stage. Buffers, frozen parameters and all of ZeRO
stage 0, whose masters have no names, are in the layer files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import check_masters
from shardmerge.sources.deepspeed_files import DeepSpeedView, TagFiles
from shardmerge.sources.deepspeed_layers import Layer, check_layers, layer_of, read_layers, tied_module
from shardmerge.sources.deepspeed_partitions import flat_masters, listed_groups
from shardmerge.sources.deepspeed_ranks import RankReader
from shardmerge.sources.deepspeed_stages import PipelineStage, are_listed, read_stages, shared_names
from shardmerge.sources.deepspeed_values import Stored, same_weights
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.tensors import Catalog, TensorEntry

# Weights of a tied module that are compared between two stages: in most models the whole of a bias or a norm.
_COMPARED = 16384


def read_pipeline(folder: Path, listed: TagFiles, reader: RankReader, view: DeepSpeedView) -> Catalog:
    """Returns the catalog of a tag directory that a pipeline saved.

    Parameters
    ----------
    folder
        The directory that holds the ``layer_*-model_states.pt`` files.
    listed, reader
        The files, and what reads those of ranks.
    view
        ``fp32``: the masters, and from the layer files whatever has none. ``module``: the layer files alone, in the
        names of their layers also where a module is tied.

    Raises
    ------
    CheckpointError
        ``missing-layer``, ``missing-rank``, ``mixed-runs``, ``zero-layout``, and what the torch reader raises.
    """
    stages = read_stages(folder, listed, reader, optims=view == "fp32")
    layers = read_layers(listed.layers)
    shapes = {name: shape for stage in stages for name, shape in stage.shapes.items()}
    names = dict.fromkeys(name for stage in stages for name in (*stage.parameters, *stage.buffers))
    check_layers(folder, layers, names, shapes)
    own = {layer_of(name) for name in names}
    if view == "fp32" and (shapes or stages[0].tag.claims.stage):
        return _with_masters(folder, stages, layers, own)
    return _of_layers(folder, stages, layers, view)


def _with_masters(
    folder: Path, stages: Sequence[PipelineStage], layers: Sequence[Layer], own: set[int | None]
) -> Catalog:
    """Masters first, then what is in layer files alone."""
    masters = [flat_masters(stage.tag, listed_groups(stage.tag, as_dict(stage.file.root))) for stage in stages]
    tied = {layer.number: tied_module(layer, masters) for layer in layers if layer.number not in own}
    warnings: list[str] = []
    for index, stage in enumerate(stages):
        mine = {number: found[1] for number, found in tied.items() if found and found[0] == index}
        module: dict[str, Stored] = {}
        for layer in layers:
            module |= layer.named(mine.get(layer.number, str(layer.number)))
        warnings += check_masters(stage.tag, module, masters[index])
    names = list(_names(masters))
    entries = {names[index][name]: entry for index, mine in enumerate(masters) for name, entry in mine.items()}
    aliases = shared_names(stages, entries)
    rest = {name: _entry(name, placed) for name, placed in _rest(layers, tied, names, {*entries, *aliases})}
    catalog = _catalog(folder, stages, layers, {**entries, **rest}, "fp32")
    warnings += [*_untied(names), *_frozen(stages, rest), *_lost(stages, catalog)]
    absent = frozenset(name for stage in stages for name in stage.buffers if name not in catalog)
    return replace(catalog, aliases=aliases, absent=absent, warnings=tuple(warnings))


def _names(masters: Sequence[Mapping[str, TensorEntry]]) -> Iterator[dict[str, str]]:
    """Yields the names in the catalog of each stage's masters.

    Of a tied module DeepSpeed ties ``tied_weight_attr``, its ``weight`` if nothing is said. Every stage has the other
    parameters for itself, and under the same names: a later stage's are called ``stage_<s>.``, which no model uses.
    """
    known: dict[str, TensorEntry] = {}
    for number, mine in enumerate(masters):
        first = {name: known.setdefault(name, entry) for name, entry in mine.items()}
        tied = {
            name: first[name] is entry or same_weights(first[name], entry, _COMPARED) for name, entry in mine.items()
        }
        yield {name: name if tied[name] else f"stage_{number}.{name}" for name in mine}


def _rest(
    layers: Sequence[Layer],
    tied: Mapping[int, tuple[int, str] | None],
    names: Sequence[Mapping[str, str]],
    taken: set[str],
) -> Iterator[tuple[str, Stored]]:
    """Yields what is in layer files alone, by its name in the catalog."""
    seen = set(taken)
    for layer in layers:
        module = tied.get(layer.number)
        for name, placed in layer.tensors.items():
            full = f"{layer.number}.{name}"
            if module is not None:
                inside = f"{module[1]}.{name}"
                shared = names[module[0]].get(inside, inside)
                full = full if shared in seen and shared not in taken else shared
            if full not in seen:
                seen.add(full)
                yield full, placed


def _untied(names: Sequence[Mapping[str, str]]) -> Iterator[str]:
    found = [final for mine in names for name, final in mine.items() if final != name]
    if found:
        yield f"{len(found)} parameters of tied modules are not tied, each stage trained its own: {shown(found)}"


def _frozen(stages: Sequence[PipelineStage], rest: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Nothing says that a layer is one of this run, whose layers no stage lists."""
    buffers = {name for stage in stages for name in stage.buffers}
    frozen = [name for name in rest if name not in buffers]
    if frozen:
        yield f"{len(frozen)} tensors of layer files are in no optimizer file, they are taken as saved: {shown(frozen)}"


def _lost(stages: Sequence[PipelineStage], catalog: Catalog) -> Iterator[str]:
    lost = [name for stage in stages for name in stage.buffers if name not in catalog]
    if lost:
        yield f"{len(lost)} buffers that the model files list are in no layer file: {shown(lost)}"


def _of_layers(folder: Path, stages: Sequence[PipelineStage], layers: Sequence[Layer], view: DeepSpeedView) -> Catalog:
    """Every tensor of the layer files, by the number of its layer."""
    named = (item for layer in layers for item in layer.named(str(layer.number)).items())
    catalog = _catalog(folder, stages, layers, {name: _entry(name, placed) for name, placed in named}, view)
    warnings = []
    if not are_listed(stages):
        read = ", ".join(str(layer.number) for layer in layers)
        warnings.append(f"no model file says what layers the pipeline has; there are those of {read}")
    if view == "fp32" and any(entry.dtype.name in ("BF16", "F16") for entry in catalog.entries.values()):
        warnings.append("the fp32 masters of a pipeline of ZeRO stage 0 are not read: the 16-bit weights are taken")
    return replace(catalog, warnings=tuple(warnings))


def _entry(name: str, placed: Stored) -> TensorEntry:
    return placed.file.entry(name, placed.ref, "layer file, as saved")


def _catalog(
    folder: Path,
    stages: Sequence[PipelineStage],
    layers: Sequence[Layer],
    entries: Mapping[str, TensorEntry],
    view: DeepSpeedView,
) -> Catalog:
    tags = [stage.tag for stage in stages]
    models = (state.stamp for tag in tags for state in tag.states)
    optims = (optim.stamp for tag in tags for optim in tag.optims)
    return Catalog(
        str(folder),
        f"DeepSpeed ZeRO-{tags[0].stage}, pipeline",
        entries,
        files=(*models, *optims, *(layer.file.stamp for layer in layers)),
        notes=(f"{view} view of {len(stages)} pipeline stage(s), {len(layers)} layer files",),
    )
