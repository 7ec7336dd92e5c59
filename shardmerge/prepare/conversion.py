"""Puts the rooms together: opens a source, plans a conversion that keeps every name, carries out any plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import MappingError, TargetError, UsageError
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import OutputSpec, Reference, Rule, SourceSpec
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.plan.planner import OutputSettings, make_plan
from shardmerge.plan.shards import DEFAULT_SHARD_SIZE
from shardmerge.plan.value import Plan
from shardmerge.prepare.dequantizing import Needs, dequantized
from shardmerge.prepare.publishable import Conditions, publishable, read_config
from shardmerge.prepare.side_files import SideFiles
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.opening import open_catalog
from shardmerge.storage.limits import default_budget, default_workers
from shardmerge.storage.reading import IoMode
from shardmerge.targets.beside import with_side_files
from shardmerge.targets.expectation import FileChoice, FileMode, Format
from shardmerge.targets.plain import expect_same
from shardmerge.targets.quantization_config import QUANTIZATION_FILES
from shardmerge.targets.wrappers import unwrapped
from shardmerge.tensors import PEFT_ADAPTER, Catalog, of_source

# What only some mappings need, and what only a run needs, is imported where it is used: a plan starts without it.
if TYPE_CHECKING:
    from shardmerge.execute.engine import Device
    from shardmerge.mapping.preset_files import Preset
    from shardmerge.prepare.loading import Check

PLAIN = "state-dict"
# Stands for the mapping's file where options say what is done.
COMMAND_LINE = "command line"
# What `convert ADAPTER OUT --base base=MODEL` does.
ADAPTER_PRESET = "peft/merge"


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may override or add to a mapping.

    Attributes
    ----------
    dtype, shard_size
        Instead of those of the mapping's ``output``; the dtype by any of its names, e.g. ``"bfloat16"``.
    format
        ``safetensors`` or ``bin``, likewise.
    memory, workers
        Budget in bytes and threads; None for the defaults of ``storage.limits``.
    download
        Whether hub ids may be downloaded.
    io
        How sources are read.
    sync
        Whether the result is made durable before it is published.
    files
        Which small files beside the weights go along, instead of what the mapping's ``output.files`` says: ``model``,
        ``all`` or ``none``.
    device
        ``cuda`` to make casts on a GPU; the bits are the same. torch and CUDA take memory that no plan counts.
    partial
        Whether a part of the model that config.json describes is what is wanted.
    check
        ``transformers``: what will be written is loaded by its own class on the meta device, in a child process, before
        anything is written.
    """

    dtype: DType | str | None = None
    shard_size: int | None = None
    format: Format | None = None
    memory: int | None = None
    workers: int | None = None
    download: bool = False
    io: IoMode = "pread"
    sync: bool = True
    device: Device = "cpu"
    partial: bool = False
    files: FileMode | None = None
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and where its result goes; ``out`` is None if the mapping names no output."""

    plan: Plan
    out: Path | None


def prepare_plain(source: SourceSpec, options: Options) -> Prepared:
    """Plans a conversion that keeps every name."""
    opened = open_source(source, Path(), options)
    if opened.kind == PEFT_ADAPTER:
        raise _adapter_alone(opened)
    if opened.absent:
        from shardmerge.mapping.refusals import placeholder_error

        raise placeholder_error(source.name, sorted(opened.absent), opened)
    sides = SideFiles()
    output = output_settings(None, options)
    opened, outside = _unwrapped(opened, sides)
    settled = dequantized({source.name: opened}, _needs(source.name, opened, output.dtype), sides.read)
    catalog = settled.catalogs[source.name]
    expectation = replace(expect_same(catalog, sides.read, _dtype(options)), warnings=_better_roads(catalog))
    expectation = with_side_files(expectation, sides.read, file_choice(None, options), "--files")
    mark = Mark("command line", 1, 1)
    everything = Template.parse("{rest...}")
    rule = Rule(everything, (Reference(source.name, everything, mark),), mark)
    assignments = {
        name: Assignment(name, source.name, name, rule, of_source(catalog[name], source.name))
        for name in catalog.names()
    }
    if not assignments:
        raise _nothing(source, catalog)
    left_out = {*settled.dropped, *((source.name, name) for name in outside)}
    resolution = Resolution(assignments, (), tuple(sorted(left_out)))
    plan = make_plan(
        PLAIN,
        settled.told({source.name: catalog}, catalog.entries.values()),
        {source.name: source.path},
        resolution,
        expectation,
        output,
    )
    terms = Conditions(partial=options.partial, source=catalog)
    return Prepared(sides.pinned(agreed(plan, sides, terms, options)), None)


def agreed(plan: Plan, sides: SideFiles, terms: Conditions, options: Options) -> Plan:
    """Returns a plan whose config.json and tensors agree; where that is asked for, also as transformers sees it."""
    plan = publishable(plan, sides.read, terms)
    if options.check is None:
        return plan
    from shardmerge.prepare.loading import load_checked

    return load_checked(plan, sides.read, terms)


def _unwrapped(catalog: Catalog, sides: SideFiles) -> tuple[Catalog, tuple[str, ...]]:
    """Takes wrappers' prefixes off the names where config.json tells the model's own; and what is not the model's."""
    config = read_config(catalog, sides.read)
    if config is None:
        return catalog, ()
    where = catalog.side_files["config.json"].file
    found = unwrapped(config, {name: catalog[name].shape for name in catalog.names()}, where)
    if not found.prefixes:
        return catalog, ()
    entries = {
        found.names[name]: replace(entry, name=found.names[name])
        for name, entry in catalog.entries.items()
        if name in found.names
    }
    aliases = {
        found.names[alias]: found.names[owner]
        for alias, owner in catalog.aliases.items()
        if alias in found.names and owner in found.names
    }
    words = ", ".join(f"`{prefix}`" for prefix in found.prefixes)
    left = f"; left out: {listed(list(found.outside), 3)}" if found.outside else ""
    warning = f"the names are those of a wrapped model: {words} is taken off, as config.json has them without{left}"
    renamed = replace(catalog, entries=entries, aliases=aliases, warnings=(*catalog.warnings, warning))
    return renamed, found.outside


def _needs(name: str, catalog: Catalog, dtype: DType | None) -> Needs:
    """A conversion that keeps every name needs numbers for its cast alone."""
    published = frozenset({name} if {"config.json", *QUANTIZATION_FILES} & set(catalog.side_files) else ())
    return Needs({name: f"the cast to {dtype}"} if dtype else {}, published)


def _nothing(source: SourceSpec, catalog: Catalog) -> UsageError:
    return UsageError(
        "nothing-to-convert",
        "the checkpoint holds no tensors: there is a config.json and no weights",
        where=source.path,
        found="; ".join(catalog.notes),
        hint=f"pass one of the checkpoints inside: {' or '.join(catalog.elsewhere[-8:])}" if catalog.elsewhere else "",
    )


def is_adapter(source: str | Path, options: Options) -> bool:
    """Tells whether a path, or a hub id, is a PEFT directory; reads headers only."""
    spec = SourceSpec("source", str(source), mark=Mark("command line", 1, 1))
    return open_source(spec, Path(), options).kind == PEFT_ADAPTER


def _adapter_alone(catalog: Catalog) -> TargetError:
    return TargetError(
        "adapter-alone",
        "this is a PEFT adapter: on its own it makes no model",
        where=catalog.path,
        hint=f"name the model it was trained on: add --base base=MODEL, which is --use {ADAPTER_PRESET}",
    )


def _better_roads(catalog: Catalog) -> tuple[str, ...]:
    """Says when a preset probably is what the user wants."""
    if catalog.training_config and any(name.startswith("projector.model.") for name in catalog.entries):
        return (
            "this is an XTuner LLaVA and keeps XTuner's names: for a Hugging Face LLaVA add --use xtuner/llava-to-hf",
        )
    from shardmerge.mapping.layouts import foreign_presets

    found = foreign_presets(catalog)
    if not found:
        return ()
    from shardmerge.mapping.preset_files import load_preset

    needs = "".join(f" --base {name}=PATH" for name in _bases(load_preset(found[0])))
    return (f"every tensor keeps its name: for a Hugging Face model add --use {found[0]}{needs}",)


def _bases(preset: Preset) -> list[str]:
    """Returns the sources that a preset cannot do without, but for the first, which is the checkpoint itself."""
    return [name for name, role in preset.roles.items() if role.required][1:]


def _dtype(options: Options) -> DType | None:
    return float_dtype(options.dtype) if isinstance(options.dtype, str) else options.dtype


def output_settings(spec: OutputSpec | None, options: Options) -> OutputSettings:
    """Returns what the mapping's ``output:`` and the caller say together."""
    return OutputSettings(
        _dtype(options) or (spec.dtype if spec else None),
        spec.dtypes if spec else (),
        options.shard_size or (spec.shard_size if spec else None) or DEFAULT_SHARD_SIZE,
        options.format or (spec.format if spec else None) or "safetensors",
        options.memory or default_budget(),
        options.workers or default_workers(),
        str(spec.mark) if spec else "",
    )


def file_choice(spec: OutputSpec | None, options: Options) -> FileChoice | None:
    """Returns what the caller, else the mapping, says of side files."""
    return FileChoice(options.files) if options.files else spec.files if spec else None


def open_source(source: SourceSpec, folder: Path, options: Options) -> Catalog:
    """Returns the catalog of a source whose relative path is relative to ``folder``."""
    view: DeepSpeedView = "module" if source.view == "module" else "fp32"
    opening = OpenOptions(view=view, root=source.root, download=options.download)
    return _marked(_stripped(open_catalog(_located(source.path, folder), opening), source), source.name)


def _marked(catalog: Catalog, name: str) -> Catalog:
    """Marks every entry once, instead of a copy of it for each use."""
    return replace(catalog, entries={key: of_source(entry, name) for key, entry in catalog.entries.items()})


def _stripped(catalog: Catalog, source: SourceSpec) -> Catalog:
    """Takes a prefix off all names. One that a preset expects may be absent; one of the user's must be there."""
    prefix = source.strip
    without = [name for name in catalog.names() if not name.startswith(prefix)]
    if prefix and source.strip_required and (without or not catalog.entries):
        raise _odd_strip(source, without)
    if not prefix or without:
        return catalog
    entries = {
        name.removeprefix(prefix): replace(entry, name=name.removeprefix(prefix))
        for name, entry in catalog.entries.items()
    }
    aliases = {alias.removeprefix(prefix): owner.removeprefix(prefix) for alias, owner in catalog.aliases.items()}
    absent = frozenset(name.removeprefix(prefix) for name in catalog.absent)
    note = f"`{prefix}` is taken off every name"
    return replace(catalog, entries=entries, aliases=aliases, absent=absent, notes=(*catalog.notes, note))


def _odd_strip(source: SourceSpec, without: list[str]) -> MappingError:
    return MappingError(
        "strip-matches-nothing",
        f"not every name of {source.name} begins with {source.strip!r}, which `strip` takes off",
        where=str(source.mark),
        found=f"{count(len(without), 'name')} without it: {listed(without, 3)}" if without else "no tensors at all",
        hint="leave `strip` out, and write the prefix into the rules of the names that have it",
    )


def _located(text: str, folder: Path) -> Path | str:
    """A path relative to the mapping if there is something, a hub id if it reads like one."""
    path = folder / Path(text).expanduser()
    return text if is_hub_id(text) and not path.exists() else path
