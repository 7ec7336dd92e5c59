"""Puts the rooms together: opens sources, fills in what the training config knows, plans, runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.dtypes import DType, float_dtype
from shardmerge.errors import MappingError, ShardmergeError, TargetError, UsageError, raise_all
from shardmerge.execute.cloning import clonable_bytes
from shardmerge.execute.engine import Device, Outcome, Progress, check_device, execute
from shardmerge.mapping.adapters import merge_adapters
from shardmerge.mapping.layouts import foreign_presets, odd_layouts
from shardmerge.mapping.near import count, did_you_mean, listed
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.preset_files import Preset, combine, load_preset
from shardmerge.mapping.resolve import Assignment, Resolution, resolve
from shardmerge.mapping.spec import OutputSpec, Reference, Rule, SourceSpec, Spec, TargetSpec, load_spec
from shardmerge.mapping.variables import Variables, unused_variables
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.plan import Plan, bytes_read
from shardmerge.planner import OutputOptions, make_plan
from shardmerge.publish import RECEIPT, check_output, staged
from shardmerge.receipt import receipt_json
from shardmerge.sources.deepspeed import View
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.opening import OpenOptions, locate, open_catalog
from shardmerge.storage.limits import bounds_cache, default_budget, default_workers
from shardmerge.storage.reading import FilePool, IoMode, SourceFile
from shardmerge.storage.writing import write_small
from shardmerge.targets.expectation import Expectation, Format, Request, SideFile, Target
from shardmerge.targets.plain import expect_same
from shardmerge.targets.registry import TARGETS
from shardmerge.targets.shards import DEFAULT_SHARD_SIZE
from shardmerge.targets.training_config import read_training_config
from shardmerge.tensors import PEFT_ADAPTER, Catalog, Extent
from shardmerge.version import __version__

PLAIN = "state-dict"
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
    device
        ``cuda`` to make casts on a GPU; the bits are the same. torch and CUDA take memory that no plan counts.
    """

    dtype: DType | str | None = None
    shard_size: int | None = None
    format: Format | None = None
    memory: int | None = None
    workers: int | None = None
    download: bool = False
    io: IoMode = "auto"
    sync: bool = True
    device: Device = "cpu"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan and where its result goes; ``out`` is None if the mapping names no output."""

    plan: Plan
    out: Path | None


@dataclass(frozen=True, slots=True)
class Result:
    """A published directory.

    Attributes
    ----------
    path
        The directory.
    plan
        What was carried out.
    outcome
        Overflows, checksums, bytes.
    """

    path: Path
    plan: Plan
    outcome: Outcome


def prepare_mapping(path: Path, options: Options) -> Prepared:
    """Plans a mapping.yaml. Relative paths in it are relative to its own directory."""
    spec = load_spec(path)
    return prepare(spec, path.resolve().parent, options)


def prepare_plain(source: SourceSpec, options: Options) -> Prepared:
    """Plans a conversion that keeps every name."""
    catalog = _open(source, Path(), options)
    if catalog.kind == PEFT_ADAPTER:
        raise _adapter_alone(catalog)
    expectation = replace(expect_same(catalog, read_side_file, _dtype(options)), warnings=_better_roads(catalog))
    mark = Mark("command line", 1, 1)
    everything = Template.parse("{rest...}")
    rule = Rule(everything, (Reference(source.name, everything, mark),), mark)
    assignments = {
        name: Assignment(name, source.name, name, rule, replace(catalog[name], source=source.name))
        for name in catalog.names()
    }
    if not assignments:
        raise UsageError("nothing-to-convert", "the checkpoint holds no tensors", where=source.path)
    resolution = Resolution(assignments, (), ())
    plan = make_plan(
        PLAIN,
        {source.name: catalog},
        {source.name: source.path},
        resolution,
        expectation,
        _output(None, options),
    )
    return Prepared(plan, None)


def is_adapter(source: str | Path, options: Options) -> bool:
    """Tells whether a path, or a hub id, is a PEFT directory; reads headers only."""
    return (
        _open(SourceSpec("source", str(source), mark=Mark("command line", 1, 1)), Path(), options).kind == PEFT_ADAPTER
    )


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
    found = foreign_presets(catalog)
    if not found:
        return ()
    needs = "".join(f" --base {name}=PATH" for name in _bases(load_preset(found[0])))
    return (f"every tensor keeps its name: for a Hugging Face model add --use {found[0]}{needs}",)


def _bases(preset: Preset) -> list[str]:
    """Returns the sources that a preset cannot do without, but for the first, which is the checkpoint itself."""
    return [name for name, role in preset.roles.items() if role.required][1:]


def prepare(spec: Spec, folder: Path, options: Options) -> Prepared:
    """Plans a spec whose relative paths are relative to ``folder``.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with a stage (sources, target, mapping) at once, before a data byte is read.
    """
    preset = load_preset(spec.use) if spec.use else None
    own = {name for name in spec.variables if preset is None or name not in preset.variables}
    if preset is not None:
        spec = replace(spec, sources={name: _as_role(one, preset) for name, one in spec.sources.items()})
    catalogs = _open_all(spec, folder, options)
    if spec.target is not None:
        raise_all(_odd_roles(spec.target, catalogs))
    if preset is not None:
        spec, catalogs = _filled_in(spec, preset, catalogs, folder, options)
        raise_all(odd_layouts(spec, preset, catalogs))
        spec = combine(spec, preset)
    raise_all([*unused_variables(spec, own), *_idle_vocabulary(spec)])
    output = _output(spec.output, options)
    merged = merge_adapters(spec.adapters, catalogs, read_side_file)
    variables = Variables(catalogs, read_side_file, spec.variables)
    expectation = _expectation(spec, catalogs, output.dtype, variables)
    resolution = resolve(
        spec.rules,
        spec.drops,
        merged.catalogs,
        expectation,
        user_file=spec.file,
        variables=variables,
        merged=merged.used,
    )
    plan = make_plan(
        spec.target.name if spec.target else PLAIN,
        merged.catalogs,
        {name: source.path for name, source in spec.sources.items()},
        resolution,
        expectation or _as_resolved(resolution),
        output,
    )
    return Prepared(plan, _output_path(spec.output, folder))


def _as_role(source: SourceSpec, preset: Preset) -> SourceSpec:
    role = preset.roles.get(source.name)
    if role is None or source.strip:
        return source
    return replace(source, strip=role.strip, strip_required=False)


def _output_path(spec: OutputSpec | None, folder: Path) -> Path | None:
    """``..`` goes by text, as the user reads the path, not by what links point to."""
    return Path(os.path.normpath(folder / Path(spec.path).expanduser())) if spec else None


def carry_out(prepared: Prepared, out: Path, options: Options, progress: Progress | None = None) -> Result:
    """Runs a plan and publishes the result as ``out``.

    Raises
    ------
    ShardmergeError
        See ``publish.check_output`` and ``execute.engine.execute``. Whatever is raised, ``out`` is as it was.
    """
    plan = prepared.plan
    check_output(plan, out, clonable_bytes(plan, out))
    check_device(options.device)
    bounded = bounds_cache(plan.file_bytes + sum(bytes_read(tensor) for tensor in plan.tensors()))
    with staged(plan, out, sync=options.sync) as staging:
        _make_folders(plan, staging)
        pool = FilePool(options.io, bounded=bounded)
        outcome = execute(plan, staging, pool, sync=options.sync, progress=progress, device=options.device)
        digests = {side.name: _write_side_file(staging, side, sync=options.sync) for side in _index_last(plan)}
        receipt = receipt_json(plan, outcome, digests, __version__)
        write_small(staging / RECEIPT, receipt, sync=options.sync)
    return Result(out, plan, outcome)


def read_side_file(extent: Extent) -> bytes:
    """Returns the bytes of a small file."""
    with SourceFile(extent.file) as file:
        return file.read(extent.offset, extent.nbytes)


def _make_folders(plan: Plan, staging: Path) -> None:
    for name in [*(shard.name for shard in plan.shards), *(side.name for side in plan.side_files)]:
        (staging / name).parent.mkdir(exist_ok=True)


def _index_last(plan: Plan) -> list[SideFile]:
    """The index comes last: a directory without it is visibly not finished."""
    return sorted(plan.side_files, key=lambda side: side.name.endswith(".index.json"))


def _write_side_file(staging: Path, side: SideFile, *, sync: bool) -> str:
    data = b"".join(part if isinstance(part, bytes) else read_side_file(part) for part in side.parts)
    write_small(staging / side.name, data, sync=sync)
    return hashlib.sha256(data).hexdigest()


def _dtype(options: Options) -> DType | None:
    return float_dtype(options.dtype) if isinstance(options.dtype, str) else options.dtype


def _output(spec: OutputSpec | None, options: Options) -> OutputOptions:
    return OutputOptions(
        _dtype(options) or (spec.dtype if spec else None),
        spec.dtypes if spec else (),
        options.shard_size or (spec.shard_size if spec else None) or DEFAULT_SHARD_SIZE,
        options.format or (spec.format if spec else "safetensors"),
        options.memory or default_budget(),
        options.workers or default_workers(),
        str(spec.mark) if spec else "",
    )


def _open_all(spec: Spec, folder: Path, options: Options) -> dict[str, Catalog]:
    catalogs: dict[str, Catalog] = {}
    problems: list[ShardmergeError] = []
    for source in spec.sources.values():
        try:
            catalogs[source.name] = _open(source, folder, options)
        except UsageError as error:
            if source.required or error.code not in ("missing-path", "not-in-cache"):
                problems.append(_at(error, source))
        except ShardmergeError as error:
            problems.extend(error.each())
    raise_all(problems)
    return catalogs


def _at(error: UsageError, source: SourceSpec) -> UsageError:
    """Adds the line of the mapping that names the source."""
    where = f"{source.mark} (source '{source.name}')" + (f": {error.where}" if error.where else "")
    return UsageError(error.code, error.what, where=where, found=error.found, expected=error.expected, hint=error.hint)


def _open(source: SourceSpec, folder: Path, options: Options) -> Catalog:
    view: View = "module" if source.view == "module" else "fp32"
    opening = OpenOptions(view=view, root=source.root, download=options.download)
    return _stripped(open_catalog(_located(source.path, folder), opening), source)


def _stripped(catalog: Catalog, source: SourceSpec) -> Catalog:
    """Takes a prefix off all names. One that a preset expects may be absent; one of the user's must be there."""
    prefix = source.strip
    without = [name for name in catalog.names() if not name.startswith(prefix)]
    if without and source.strip_required:
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
        found=f"{count(len(without), 'name')} without it: {listed(without, 3)}",
        hint="leave `strip` out, and write the prefix into the rules of the names that have it",
    )


def _located(text: str, folder: Path) -> Path | str:
    """A path relative to the mapping if there is something, a hub id if it reads like one."""
    path = folder / Path(text).expanduser()
    return text if is_hub_id(text) and not path.exists() else path


def _filled_in(
    spec: Spec, preset: Preset, catalogs: dict[str, Catalog], folder: Path, options: Options
) -> tuple[Spec, dict[str, Catalog]]:
    """Adds the base models that the training config names and the user left out, if they are to be found here."""
    roles = preset.target.roles if preset.target else {}
    trained = catalogs.get(roles.get("trained", ""))
    if trained is None or not trained.training_config:
        return spec, catalogs
    facts = read_training_config(trained.training_config)
    sources = dict(spec.sources)
    for role, path in (("text", facts.llm_path), ("vision", facts.vision_path)):
        name = roles.get(role, "")
        if not name or name in sources or not path:
            continue
        place = _find_base(path, folder, Path(trained.path))
        if place is None and not (options.download and is_hub_id(path)):
            continue
        found = SourceSpec(name, str(place or path), mark=Mark("training config", 1, 1))
        sources[name] = found
        note = f"not in the mapping: taken from the training config, which names {path!r}"
        catalog = _open(found, folder, options)
        catalogs[name] = replace(catalog, notes=(note, *catalog.notes))
    return replace(spec, sources=sources), catalogs


def _find_base(text: str, folder: Path, trained: Path) -> Path | None:
    """Looks where the training run may have meant: beside the mapping, beside the run, here, in the hub cache."""
    for place in (folder, *trained.parents[:4], Path()):
        if (place / text).exists():
            return (place / text).resolve()
    try:
        return locate(text) if is_hub_id(text) else None
    except UsageError:
        return None


def _expectation(
    spec: Spec, catalogs: Mapping[str, Catalog], dtype: DType | None, variables: Variables
) -> Expectation | None:
    if spec.target is None:
        return None
    target = _target(spec.target)
    texts = spec.target.roles
    return target.expect(
        Request(
            roles={role: source for role, source in texts.items() if role in target.roles},
            options={key: _option(value, variables) for key, value in texts.items() if key in target.options},
            catalogs=catalogs,
            read=read_side_file,
            dtype=dtype,
            vocabulary=spec.vocabulary,
            where=str(spec.target.mark),
        )
    )


def _idle_vocabulary(spec: Spec) -> Iterator[ShardmergeError]:
    """Without a target nobody knows which tensors have the vocabulary's rows, and nothing would be resized."""
    if spec.vocabulary is not None and spec.target is None:
        yield MappingError(
            "no-target",
            "`vocabulary` is for a target, and the mapping has none",
            where=spec.file,
            hint="add `target: {name: hf/llama, text: SOURCE}`, or the op `new_rows` for single tensors",
        )


def _option(text: str, variables: Variables) -> str:
    """An option of a target may be a number of ``let:``, by its name."""
    return str(variables.get(text)) if text in variables.variables else text


def _target(spec: TargetSpec) -> Target:
    if spec.name not in TARGETS:
        hint = did_you_mean(spec.name, TARGETS)
        raise UsageError(
            "unknown-target",
            f"there is no target {spec.name!r}",
            where=str(spec.mark),
            expected=", ".join(TARGETS),
            hint=hint,
        )
    return TARGETS[spec.name]


def _odd_roles(spec: TargetSpec, catalogs: Mapping[str, Catalog]) -> Iterator[ShardmergeError]:
    target = _target(spec)
    known = (*target.roles, *target.options)
    for key, value in spec.roles.items():
        if key not in known:
            hint = did_you_mean(key, known)
            yield UsageError("unknown-role", f"{spec.name} has no role {key!r}", where=str(spec.mark), hint=hint)
        elif key in target.roles and value not in catalogs:
            hint = did_you_mean(value, catalogs)
            yield UsageError("unknown-source", f"there is no source {value!r}", where=str(spec.mark), hint=hint)


def _as_resolved(resolution: Resolution) -> Expectation:
    return Expectation({name: assignment.entry.shape for name, assignment in resolution.assignments.items()})
