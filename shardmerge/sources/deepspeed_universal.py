"""Universal checkpoints of DeepSpeed: a directory for each parameter, with its master and its moments whole.

``ds_to_universal`` (``checkpoint/ds_to_universal.py``, DeepSpeed 0.14 to 0.19) writes ``zero/<name>/fp32.pt`` beside
``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``, and copies the model files. In stages 1 and 2 ``fp32.pt`` is a dict,
in stage 3 a bare 1-D tensor. Frozen parameters and buffers, which it writes as fp32 or not at all, are taken from the
model files; a pipeline's are in layer files, which it does not copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shardmerge.shown import shown
from shardmerge.sources.deepspeed import read_parallel_rank, universal_catalog
from shardmerge.sources.deepspeed_checks import Tag, check_masters, check_tag, way_out
from shardmerge.sources.deepspeed_claims import read_claims
from shardmerge.sources.deepspeed_files import MOMENTS, DeepSpeedView, TagFiles, is_tag_folder
from shardmerge.sources.deepspeed_parameters import read_parameter_moments, read_parameters
from shardmerge.sources.deepspeed_ranks import RankReader, frozen_shares, named_tensors, shape_table
from shardmerge.sources.deepspeed_settings import universal_optimizer
from shardmerge.sources.deepspeed_stages import PipelineStage, read_stages, shared_names
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import read_torch_file
from shardmerge.tensors import Catalog, Shape


def read_universal(folder: Path, listed: TagFiles, reader: RankReader, view: DeepSpeedView) -> Catalog:
    """Returns the catalog of a universal checkpoint.

    Parameters
    ----------
    folder
        The directory that holds ``zero/``.
    listed, reader
        The files beside that, and what reads them.
    view
        ``fp32``: the masters. ``module``: the 16-bit module of the copied model file, as it is read without ``zero/``.
        ``exp_avg``, ``exp_avg_sq``: a moment of Adam.

    Raises
    ------
    CheckpointError
        ``wrong-universal``: made of a run whose parameters the conversion exchanges. ``missing-parameter``,
        ``missing-rank``, ``mixed-runs``, ``zero-layout``, ``no-module-view``, ``no-moments``, and what the torch
        reader raises.
    """
    first = reader.file(listed.models[0])
    root = as_dict(first.root)
    claims = read_claims(root)
    if claims.layered:
        return _of_pipeline(folder, listed, reader, view)
    if view == "module":
        return read_parallel_rank(folder, listed, reader, view)
    frozen = frozen_shares(root, len(listed.models)) if listed.models[0].partitioned else {}
    tag = Tag(folder, [reader.model(rank, frozen) for rank in listed.models], [], masters_elsewhere=True)
    check_tag(tag)
    _check_order(tag)
    groups = root.get("param_shapes")
    shapes = _merged(shape_table(group) for group in (groups if isinstance(groups, list) else [groups]))
    others = {*named_tensors(root.get("module")), *named_tensors(root.get("frozen_param_fragments"))}
    found = read_parameters(tag, shapes, others)
    if view in MOMENTS:
        named = [shape_table(group) for group in (groups if isinstance(groups, list) else [groups])]
        return _moments(tag, shapes, named, root.get("ds_config"), view)
    catalog = universal_catalog(tag, first, reader, found.entries, found.steps)
    return replace(
        catalog,
        kind=f"DeepSpeed universal, ZeRO-{tag.stage}",
        files=(*catalog.files, *found.stamps),
        notes=(f"fp32 view of {len(found.entries)} parameter files",),
        warnings=(*found.warnings, *catalog.warnings),
    )


def _moments(
    tag: Tag, shapes: Mapping[str, Shape], named: Sequence[Mapping[str, Shape]], config: PickleValue, view: str
) -> Catalog:
    """Moments lie beside the masters, and what the optimizer keeps besides in a file of its own."""
    found, steps = read_parameter_moments(tag, shapes, view)
    file = read_torch_file(tag.folder / "zero" / "optimizer_state.pt")
    optimizer = universal_optimizer(file, named, steps, config)
    return Catalog(
        str(tag.folder),
        f"DeepSpeed universal, ZeRO-{tag.stage}",
        found.entries,
        files=(*(state.stamp for state in tag.states), *found.stamps, file.stamp),
        optimizer=optimizer,
    )


def _merged(tables: Iterable[Mapping[str, Shape]]) -> dict[str, Shape]:
    return {name: shape for table in tables for name, shape in table.items()}


def _check_order(tag: Tag) -> None:
    """Refuses what is wrong as written.

    ``round_robin_gradients`` deals the parameters out to the ranks in turn (``stage_1_and_2.py``,
    ``_round_robin_reorder``), and the conversion looks for them by ``param_slice_mappings``, which has the order of
    before (0.12.6, 0.16.9, 0.19.8). One rank alone has one order.
    """
    claims = tag.claims
    if not claims.round_robin or claims.world == 1 or tag.stage == 3:
        return
    source = tag.folder.with_name(tag.folder.name.removesuffix("_universal"))
    there = source != tag.folder and is_tag_folder(source)
    raise tag.error(
        "wrong-universal",
        "this universal checkpoint stores values of parameters under wrong names",
        found=f"round_robin_gradients over {claims.world} ranks, whose order ds_to_universal does not know",
        expected="a run without round_robin_gradients",
        hint=(f"pass {source}, which it was made of" if there else "pass the checkpoint that it was made of")
        + way_out(tag),
    )


def _of_pipeline(folder: Path, listed: TagFiles, reader: RankReader, view: DeepSpeedView) -> Catalog:
    """A pipeline's: what its layer files alone had is not there, and is named as far as the model files name it."""
    stages = read_stages(folder, listed, reader, optims=False)
    tag = stages[0].tag
    if view == "module":
        raise tag.error(
            "no-module-view",
            "the universal checkpoint of a pipeline has no 16-bit module, which was in its layer files",
            hint="leave --view out, and cast the fp32 weights: --dtype bfloat16",
        )
    _check_order(tag)
    found = read_parameters(tag, _merged(stage.shapes for stage in stages))
    check_masters(tag, {}, found.entries, found.steps)
    return Catalog(
        str(folder),
        f"DeepSpeed universal, ZeRO-{tag.stage}, pipeline",
        found.entries,
        shared_names(stages, found.entries),
        (*(stage.tag.states[0].stamp for stage in stages), *found.stamps),
        absent=frozenset(name for stage in stages for name in stage.buffers),
        notes=(f"fp32 view of {len(found.entries)} parameter files, {len(stages)} pipeline stage(s)",),
        warnings=(*found.warnings, *_said_of_pipeline(stages)),
    )


def _said_of_pipeline(stages: Sequence[PipelineStage]) -> Iterator[str]:
    buffers = [name for stage in stages for name in stage.buffers]
    if buffers:
        yield f"{len(buffers)} buffers stayed in the layer files of the pipeline, and are not here: {shown(buffers)}"
    yield "frozen parameters of a pipeline stay in its layer files too, and nothing here names them"
    counts = Counter(name for stage in stages for name in stage.shapes)
    several = [name for name, count in counts.items() if count > 1]
    if several:
        yield f"the conversion kept one stage's copy of what several stages have, tied or not: {shown(several)}"
