"""The public functions, one for each command, and the functions that the command line needs to call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.dtypes import float_dtype
from shardmerge.errors import (
    MappingError,
    OutputError,
    ShardmergeError,
    UsageError,
    VerificationError,
)
from shardmerge.mapping.sizes import parse_size
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec, Spec
from shardmerge.plan.value import Plan
from shardmerge.prepare.inspection import inspect, layout_of, matching
from shardmerge.prepare.options import Options, Prepared, SavedMapping, chosen
from shardmerge.publish.results import Result, Unfinished
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.storage.listing import without_links
from shardmerge.system_errors import PASSING_READS, PASSING_WRITES, about, advice, tried_again
from shardmerge.tensors import TensorEntry

# Modules that one verb needs are imported where that verb is done: the others start without them.
if TYPE_CHECKING:
    from shardmerge.execute.executors.contract import Progress
    from shardmerge.inverse.way_back import Forward
    from shardmerge.lazy import LazyCheckpoint
    from shardmerge.mapping.preset_files import Preset
    from shardmerge.plan.reading import PlanText
    from shardmerge.prepare.conversion import WrittenMapping
    from shardmerge.prepare.resolved import Resolved
    from shardmerge.publish.closeness import Closeness
    from shardmerge.publish.comparing import Comparison, Sides
    from shardmerge.publish.shares import Share
    from shardmerge.publish.verify import Verdict
    from shardmerge.recognition.proposal import Proposal
    from shardmerge.reports.run import Run
    from shardmerge.reports.timeline import Timeline

__all__ = [
    "Options", "Prepared", "Result", "SavedMapping", "Unfinished", "attest", "carry_out", "clean", "clonable_bytes",
    "convert", "diff", "explain_json", "explain_text", "finish", "float_dtype", "init", "inspect", "invert",
    "layout_of", "matching", "open_checkpoint", "output_path", "parse_size", "plan", "prepare", "prepare_conversion",
    "prepare_mapping", "preset_text", "presets", "report", "report_path", "reported_run", "run", "run_part", "schema",
    "sides", "verify", "write_new", "write_plan",
]  # fmt: skip

_YAML, _PLAN = (".yaml", ".yml"), ".json"


def open_checkpoint(
    path: str | Path, *, view: DeepSpeedView = "fp32", root: str = "", download: bool = False
) -> LazyCheckpoint:
    """Opens a checkpoint as a mapping of names to lazy tensors; a ``mapping.yaml`` gives the target's tensors.

    Parameters
    ----------
    path, view, root, download
        As for ``inspect``; or the path of a mapping.

    Raises
    ------
    ShardmergeError
        As ``inspect``, or as ``plan`` for a mapping.
    """
    from shardmerge.lazy import lazy_catalog, lazy_plan

    if Path(path).suffix in _YAML:
        return lazy_plan(plan(path, Options(download=download)))
    return lazy_catalog(inspect(path, view=view, root=root, download=download))


def plan(mapping: str | Path, options: Options | None = None, **choices: object) -> Plan:
    """Plans a mapping without reading tensor data.

    Parameters
    ----------
    mapping
        The YAML file, or a saved plan (``.json``).
    options
        Overrides.
    choices
        Single options by name: ``plan("mapping.yaml", dtype="bfloat16")``.

    Raises
    ------
    ShardmergeError
        Everything that is wrong with a stage, at once.
    """
    return prepare(Path(mapping), chosen(options, choices)).plan


def prepare(path: Path, options: Options, roots: Sequence[tuple[str, str]] = ()) -> Prepared:
    """Plans a mapping.yaml, or reads a saved plan, and determines the output path.

    Relative paths in a mapping are relative to its own directory.

    Parameters
    ----------
    path
        The mapping, or a plan (``.json``).
    options
        Overrides.
    roots
        Pairs of directories: where a plan's files were when it was made, and where they are.
    """
    if path.suffix == _PLAN:
        return _read_plan(path, options, roots)
    if roots:
        what = "--root says where the files of a plan are now, and this is a mapping"
        raise UsageError(
            "no-effect", what, where=str(path), hint="leave --root out, and change the paths in the mapping"
        )
    return prepare_mapping(path, options)


def _read_plan(path: Path, options: Options, roots: Sequence[tuple[str, str]]) -> Prepared:
    def read() -> Prepared:
        with _plan_text(path, roots) as text:
            return Prepared.of(text.plan(), Path(text.out) if text.out else None, options)

    return tried_again(read, PASSING_READS)


@contextmanager
def _plan_text(path: Path, roots: Sequence[tuple[str, str]]) -> Iterator[PlanText]:
    from shardmerge.plan.reading import PlanText, moved_by

    if not path.is_file():
        raise UsageError("missing-path", "there is no such plan", where=str(path))
    with path.open(encoding="utf-8", newline="\n") as lines:  # a line ends as it was written
        yield PlanText(lines, str(path), moved_by(roots))


def prepare_mapping(path: Path, options: Options) -> Prepared:
    """Plans a mapping.yaml and determines the output path. Relative paths in it are relative to its own directory."""
    from shardmerge.prepare.preparation import prepare_mapping as prepared

    return tried_again(lambda: prepared(path, options), PASSING_READS)


def write_plan(prepared: Prepared, path: Path, out: Path | None = None) -> None:
    """Writes a plan to a file that ``run`` accepts, also on another machine. An existing plan is replaced.

    Raises
    ------
    OutputError
        ``output-exists``: the existing file is not a plan. ``unwritable-output``.
    """
    from shardmerge.plan.writing import plan_lines
    from shardmerge.storage.writing import write_lines

    if path.exists() and not _is_plan(path):
        what = "there is something at this path, and it is no plan"
        raise OutputError(
            "output-exists", what, where=str(path), hint="write the plan to another file: --out plan.json"
        )
    write_lines(path, plan_lines(prepared.plan, str(out or prepared.out or "")))


def _is_plan(path: Path) -> bool:
    from shardmerge.plan.writing import FORMAT

    if not path.is_file():
        return False
    with about(path), path.open("rb") as file:
        return FORMAT.encode() in file.read(64)


def clonable_bytes(plan: Plan, out: Path) -> int:
    """Returns how many bytes of a plan the file system of ``out`` would clone; see ``execute.cloning``."""
    from shardmerge.execute.cloning import clonable_bytes as by_trying

    return by_trying(plan.shards, out)


def carry_out(
    prepared: Prepared,
    out: Path,
    options: Options,
    progress: Progress | None = None,
    publishing: Callable[[], object] = bool,
) -> Result:
    """Runs a plan and publishes the result as ``out``: see ``publish.running.carry_out``."""
    from shardmerge.publish.running import carry_out as carried

    return tried_again(lambda: carried(prepared.plan, out, options, progress, publishing), PASSING_WRITES)


def run_part(  # one parameter an option
    mapping: str | Path,
    part: str,
    out: str | Path | None = None,
    options: Options | None = None,
    *,
    roots: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
    waiting: Callable[[int], None] | None = None,
) -> Result | Unfinished:
    """Writes some parts of a mapping or a plan, as one of several processes on one or more machines.

    The process that finds all parts complete publishes the result. With ``any``, the process waits for that, and
    writes parts that other processes started and do not finish.

    Parameters
    ----------
    mapping, out, options, progress
        As for ``run``.
    part
        ``3/8``: the share of the fourth of eight. ``any``: whatever nobody has made or is visibly at work on.
    roots
        As for ``prepare``.
    waiting
        Told, now and then, how many parts are missing that others are at work on, while these are waited for.

    Raises
    ------
    UsageError
        ``bad-part``.
    ShardmergeError
        As ``run``.
    """
    from shardmerge.publish.running import carry_out_share
    from shardmerge.publish.shares import Share, which

    options, path, chosen = options or Options(), Path(mapping), which(part, waiting)
    if path.suffix == _PLAN and isinstance(chosen, Share):
        return _run_share(path, chosen, out, options, roots, progress)
    prepared = prepare(path, options, roots)
    return carry_out_share(prepared.plan, chosen, output_path(prepared, out, str(mapping)), options, progress)


def _run_share(  # what run_part is given
    path: Path,
    chosen: Share,
    out: str | Path | None,
    options: Options,
    roots: Sequence[tuple[str, str]],
    progress: Progress | None,
) -> Result | Unfinished:
    """Of a plan that was written down no more is held than the own share, until all parts are made."""
    from shardmerge.publish.finishing import published_plan
    from shardmerge.publish.running import finish_plan, make_share

    made = 0
    with _plan_text(path, roots) as read:
        place = _place(Path(read.out) if read.out else None, out, str(path))
        if published_plan(place) != read.id or options.fresh:
            parts = tuple(read.parts(chosen.of(read.sizes)))
            state = make_share(parts, (read.id, len(read.sizes)), place, options, progress)
            if state.missing and published_plan(place) != read.id:
                return state
            made = state.made
    return finish_plan(prepare(path, options, roots).plan, place, options, made=made)


def finish(
    mapping: str | Path,
    out: str | Path | None = None,
    options: Options | None = None,
    roots: Sequence[tuple[str, str]] = (),
) -> Result:
    """Publishes a mapping or a plan whose parts are all complete.

    Raises
    ------
    OutputError
        ``parts-missing``.
    ShardmergeError
        As ``run``.
    """
    from shardmerge.publish.running import finish_plan

    options = options or Options()
    prepared = prepare(Path(mapping), options, roots)
    return finish_plan(prepared.plan, output_path(prepared, out, str(mapping)), options)


def report(directory: str | Path, path: str | Path | None = None, run: Run | None = None) -> Path:
    """Writes a report of a published directory: one HTML file that shows where every byte comes from.

    Parameters
    ----------
    directory
        A directory that ``run`` or ``convert`` published.
    path
        The file, which ends in ``.html``; an earlier report there is replaced. Default: ``DIRECTORY.report.html``,
        beside it.
    run
        What only the run knows: see ``reported_run``. Without it the report is that of the receipt alone.

    Returns
    -------
    path
        Where it was written.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made. ``bad-report-path``, ``missing-path``.
    VerificationError
        ``damaged-receipt``.
    OutputError
        ``output-exists``: what is there is no report. ``unwritable-output``.
    """
    from shardmerge.reports.writing import write_report

    folder = Path(directory).expanduser().absolute()
    place = report_path(folder, path)
    write_report(folder, place, run)
    return place


def attest(
    directory: str | Path,
    path: str | Path | None = None,
    *,
    mapping: str | Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    **choices: object,
) -> tuple[Path, Verdict]:
    """Verifies a published directory and writes an in-toto statement of it, with the provenance of SLSA 1.0.

    Parameters
    ----------
    directory
        A directory that ``run`` or ``convert`` published. All of it is read.
    path
        The file; an earlier statement there is replaced. Default: ``DIRECTORY.intoto.json``, beside it.
    mapping
        The mapping of the run, or its plan: it is planned again, and its digest goes into the statement.
    options, choices
        Those of the run, where they were not the mapping's.
    progress
        Called with the bytes read.

    Returns
    -------
    path, verdict
        Where it was written, and what was checked.

    Raises
    ------
    UsageError
        ``no-receipt``, ``missing-path``.
    VerificationError
        As ``verify``. ``plan-differs``: the directory is not the result of this mapping.
    OutputError
        ``output-exists``: what is there is no statement. ``unwritable-output``.
    """
    from shardmerge.publish import attesting
    from shardmerge.publish.verify import verify_directory

    folder, options = Path(directory).expanduser().absolute(), chosen(options, choices)
    place = attesting.statement_path(folder, path)
    made_by = None
    if mapping is not None:
        plan = prepare(Path(mapping), options).plan
        made_by = attesting.mapping_parameters(folder, Path(mapping), plan, options)
    verdict = verify_directory(folder, progress, digests=True)
    attesting.write_statement(place, attesting.statement(folder, verdict, made_by))
    return place, verdict


def report_path(out: Path, given: str | Path | None) -> Path:
    """Returns where the report of an output path goes; raises as ``report`` where it cannot go there."""
    from shardmerge.reports.writing import report_path as placed

    return placed(out, given)


def reported_run(timeline: Timeline, result: Result, prepared: Prepared) -> Run | None:
    """Returns what a report says of a run; None for one that found its result published."""
    from shardmerge.reports.run import run_of

    return run_of(timeline, result, prepared.how)


def clean(out: str | Path) -> tuple[Path, ...]:
    """Removes the files of unfinished runs for an output path; returns the removed directories.

    Raises
    ------
    OutputError
        ``staging-in-use``: a process of this machine is at work there; nothing was removed. ``unwritable-output``.
    """
    from shardmerge.publish import staging

    return staging.clean(Path(out).expanduser().absolute())


def run(
    mapping: str | Path,
    out: str | Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    **choices: object,
) -> Result:
    """Runs a mapping and publishes the result.

    Parameters
    ----------
    mapping
        The YAML file, or a saved plan (``.json``).
    out
        Instead of its ``output.path``.
    options
        Overrides.
    progress
        Called with the bytes of every tile written.
    choices
        Single options by name: ``run("mapping.yaml", dtype="bfloat16", memory="256MiB")``.

    Raises
    ------
    UsageError
        ``no-output``: neither the mapping nor the caller names an output path.
    ShardmergeError
        As ``plan``, and what the run meets. The output path is then as it was.
    """
    options = chosen(options, choices)
    prepared = prepare(Path(mapping), options)
    return carry_out(prepared, output_path(prepared, out, str(mapping)), options, progress)


def output_path(prepared: Prepared, out: str | Path | None, where: str) -> Path:
    """Returns the output path of a plan, or raises ``no-output``."""
    return _place(prepared.out, out, where)


def _place(planned: Path | None, out: str | Path | None, where: str) -> Path:
    if out is not None:
        return Path(out).expanduser().absolute()
    if planned is None:
        raise UsageError(
            "no-output",
            "no output path is given",
            where=where,
            hint="add `output: {path: out/model}`, or --out",
        )
    return planned


def convert(
    source: str | Path,
    out: str | Path,
    *,
    use: str = "",
    bases: Mapping[str, str] | None = None,
    let: Mapping[str, str] | None = None,
    view: DeepSpeedView = "fp32",
    root: str = "",
    strip: Sequence[str] = (),
    config: str | Path = "",
    save_mapping: str | Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    **choices: object,
) -> Result:
    """Converts a checkpoint without a mapping file: with unchanged names, or with a preset.

    Parameters
    ----------
    source, view, root
        As for ``inspect``.
    out
        The directory to make.
    use
        A preset; its first required source is ``source``. For a PEFT adapter with bases it is ``peft/merge``.
    bases
        The preset's other sources, by name.
    let
        Numbers of the preset, as formulas.
    strip
        Prefixes to take off the names of the source, one after the other: ``module.``
    config
        A directory, or a hub id, from which config.json, tokenizer and the files beside them come instead.
    save_mapping
        A file that is not there yet: the mapping that makes the same result.
    options
        dtype, shard size, memory, ...
    progress, choices
        As for ``run``.

    Raises
    ------
    ShardmergeError
        As ``run``.
    """
    options = chosen(options, choices)
    saved = SavedMapping(Path(save_mapping), Path(out)) if save_mapping is not None else None
    prepared = prepare_conversion(
        source,
        use=use,
        bases=bases,
        let=let,
        view=view,
        root=root,
        strip=strip,
        config=config,
        options=options,
        saved=saved,
    )
    return carry_out(prepared, Path(out).expanduser().absolute(), options, progress)


def prepare_conversion(
    source: str | Path,
    *,
    use: str = "",
    bases: Mapping[str, str] | None = None,
    let: Mapping[str, str] | None = None,
    view: DeepSpeedView = "fp32",
    root: str = "",
    strip: Sequence[str] = (),
    config: str | Path = "",
    options: Options | None = None,
    saved: SavedMapping | None = None,
) -> Prepared:
    """Plans what ``convert`` would do, and writes its mapping to a file where that is asked for."""
    options = options or Options()
    own = SourceSpec("source", str(source), view=view, root=root, strip=tuple(strip), mark=COMMAND_LINE)

    def look() -> tuple[WrittenMapping, Resolved, Prepared]:
        written = _written(own, use, bases or {}, let or {}, str(config), options)
        found = written.looked_at(options)
        return written, found, written.prepared(found, options)

    written, found, prepared = tried_again(look, PASSING_READS)
    if saved is not None:
        from shardmerge.prepare.saved_mapping import mapping_text

        text = mapping_text(written.spec, found.spec, saved.out, options, saved.path.parent, saved.command)
        if not (saved.path.is_file() and saved.path.read_bytes() == text.encode()):  # a run that goes on wrote it
            write_new(saved.path, text)
    return prepared


def _written(
    source: SourceSpec, use: str, bases: Mapping[str, str], let: Mapping[str, str], config: str, options: Options
) -> WrittenMapping:
    """Returns the mapping that is written for a conversion."""
    if not use and bases:
        from shardmerge.prepare.plain_advice import ADAPTER_PRESET, is_adapter

        use = ADAPTER_PRESET if is_adapter(source.path, options) else ""
    if use:
        from shardmerge.prepare.preset_conversion import through_preset

        return through_preset(use, source, bases, let, config)
    if bases or let:
        what = "--base and --let need a preset that has a use for them"
        raise UsageError("no-preset", what, hint="add --use PRESET")
    from shardmerge.prepare.conversion import same_names

    return same_names(source, config, options)


def verify(
    directory: str | Path,
    *,
    sources: str | Path | None = None,
    reference: str | Path | None = None,
    how: Closeness | None = None,
    load: bool = False,
    tensors: Sequence[str] = (),
    sample: str | int = "",
    seed: int = 0,
    options: Options | None = None,
    progress: Progress | None = None,
    **choices: object,
) -> Verdict:
    """Verifies a finished directory.

    Parameters
    ----------
    directory
        What ``run`` or ``convert`` made.
    sources
        The mapping that made it: every tensor is made again and compared bit for bit.
    reference
        A checkpoint that must hold the same tensors with the same values, or a mapping that makes them.
    how
        What counts as equal to the reference; None: the same type, shape and values.
    load
        Whether to load it with the installed transformers, in a child process.
    tensors
        Names, or templates: only these are read, and made again from the sources.
    sample, seed
        So many tensors of these, ``100`` or ``"5%"``, are read; equal seeds draw equal samples.
    options, choices
        Those of the run, where they were not the mapping's (``sources`` only).
    progress
        Called with the bytes of every tensor checked, and of every tensor compared.

    Raises
    ------
    UsageError
        ``no-receipt``, ``unknown-tensor``, ``bad-sample``. ``no-effect``: a selection, and what reads the whole model.
    VerificationError
        All that differs, at once.
    """
    from shardmerge.publish.closeness import Closeness
    from shardmerge.publish.remaking import verify_sources
    from shardmerge.publish.selection import Selection
    from shardmerge.publish.verify import verify_directory, verify_load

    folder, how = Path(directory), how or Closeness()
    which = Selection(tuple(tensors), str(sample), seed)
    if which and (reference is not None or load):
        raise UsageError("no-effect", "tensors were selected, and reference and load compare the whole model")
    compared = sources is not None or (reference is not None and how == Closeness())
    verdict = verify_directory(folder, progress, which, compared=compared)
    checks = list(verdict.checks)
    if sources is not None:
        prepared = prepare(Path(sources), replace(chosen(options, choices), workers=1))
        checks += verify_sources(folder, prepared.plan, prepared.how.tile, progress, which).checks
    if reference is not None:
        checks.append(_equals(folder, reference, how, progress))
    if load:
        found = verify_load(folder)
        checks.append(f"transformers {found.version} loads {found.keys.kind}: 0 missing, unexpected, mismatched")
    return replace(verdict, checks=tuple(checks))


def _equals(folder: Path, reference: str | Path, how: Closeness, progress: Progress | None) -> str:
    found = sides(folder, reference, how).compare(progress)
    if found:
        worst = "; ".join(f"{d.name}: {d.what} ({d.detail})" for d in found.differences[:5])
        raise VerificationError(
            "reference-differs",
            f"the directory differs from the reference: {found.summary}",
            where=str(reference),
            found=worst,
            hint=f"`{_diff_command(folder, reference, how)}` lists all differences, the worst first",
        )
    tolerated = f" ({found.summary})" if found.close else ""
    return f"equal to {reference}" + (f", {how}{tolerated}" if str(how) else "")


def _diff_command(folder: Path, reference: str | Path, how: Closeness) -> str:
    from shlex import join

    options = [("--rtol", how.rtol), ("--atol", how.atol), ("--cast", how.target)]
    given = [text for option, value in options if value for text in (option, str(value))]
    return join(["shardmerge", "diff", str(folder), str(reference), "--all", *given, *["--headers"] * how.headers])


def diff(a: str | Path, b: str | Path, progress: Progress | None = None, *, how: Closeness | None = None) -> Comparison:
    """Compares two checkpoints of any format, in memory that does not grow with them.

    Parameters
    ----------
    a, b
        As for ``inspect``; or the path of a mapping, whose tensors are made as they are compared and never written.
    progress
        Called with the bytes of A that were compared.
    how
        What counts as equal; None: the same type, shape and values.

    Returns
    -------
    Comparison
        The differences, the worst first, and how many tensors are equal.

    Raises
    ------
    ShardmergeError
        As ``inspect``, or as ``plan`` for a mapping.
    """
    from shardmerge.publish.closeness import Closeness

    return sides(a, b, how or Closeness()).compare(progress)


def sides(a: str | Path, b: str | Path, how: Closeness) -> Sides:
    """Reads the headers of what ``diff`` compares."""
    from shardmerge.publish.comparing import Sides

    left, right = (plan(one) if Path(one).suffix in _YAML else inspect(one) for one in (a, b))
    return Sides(left, right, how)


def presets() -> tuple[Preset, ...]:
    """Returns the presets that come with shardmerge."""
    from shardmerge.mapping.preset_files import list_presets, load_preset

    return tuple(load_preset(name) for name in list_presets())


def preset_text(name: str) -> str:
    """Returns a preset's YAML as it is written."""
    from shardmerge.mapping.preset_files import read_preset

    return read_preset(name)


def explain_text(mapping: str | Path, tensor: str, options: Options | None = None) -> str:
    """Returns the whole story of one tensor of a mapping's plan, for people.

    Raises
    ------
    UsageError
        ``unknown-tensor``, with the nearest names.
    ShardmergeError
        As ``plan``.
    """
    from shardmerge.plan.explain_tensor import find_tensor, tensor_story_text

    made = plan(mapping, options)
    return tensor_story_text(made, tensor, _rule_lines(Path(mapping), find_tensor(made, tensor)[1].rule))


def explain_json(mapping: str | Path, tensor: str, options: Options | None = None) -> dict[str, object]:
    """As ``explain_text``, as plain JSON values."""
    from shardmerge.plan.explain_tensor import find_tensor, tensor_story_json

    made = plan(mapping, options)
    return tensor_story_json(made, tensor, _rule_lines(Path(mapping), find_tensor(made, tensor)[1].rule))


def invert(mapping: str | Path, source: str = "") -> str:
    """Returns the mapping, as YAML, that leads from what a mapping makes back to one of its sources.

    Parameters
    ----------
    mapping
        The YAML file. Its sources are opened if they are there, and the way back is checked against what it makes.
    source
        The source to get back; empty for the first.

    Raises
    ------
    MappingError
        ``no-inverse``: for every rule that has none, and why.
    UsageError
        ``unknown-source``.
    """
    from shardmerge.inverse.inversion import invert_spec
    from shardmerge.mapping.preset_files import load_preset, with_preset
    from shardmerge.mapping.reader import load_spec

    spec = load_spec(Path(mapping))
    try:
        found, forward = _forward(spec, without_links(Path(mapping)).parent)
    except ShardmergeError as error:
        if not all(one.code in ("missing-path", "not-in-cache") for one in error.each()):
            raise
        return invert_spec(with_preset(spec, load_preset(spec.use)) if spec.use else spec, source)
    return invert_spec(found, source, forward)


def _forward(spec: Spec, folder: Path) -> tuple[Spec, Forward]:
    """Resolves a mapping and says what it makes, for a way back that is exact."""
    from shardmerge.inverse.way_back import Forward
    from shardmerge.prepare.preparation import plan_of
    from shardmerge.prepare.resolved import resolved

    options = Options()
    found = resolved(spec, folder, options)
    if any(group.folder for group in found.expectation.groups):
        what = "the result is several directories, which are not one source"
        raise MappingError("no-inverse", what, where=spec.file)
    made = {
        tensor.name: TensorEntry(tensor.name, tensor.dtype, tensor.shape, ())
        for tensor in plan_of(found, folder, options).tensors()
    }
    return found.spec, Forward(found.opened, found.merged, found.resolution, made, found.sides.read)


def schema(*, preset: bool = False) -> dict[str, object]:
    """Returns the JSON Schema (draft 2020-12) of mapping.yaml, or of a preset's file."""
    from shardmerge.mapping.schema import mapping_schema, preset_schema

    return preset_schema() if preset else mapping_schema()


def init(
    checkpoint: str | Path,
    *,
    bases: Mapping[str, str] | None = None,
    to: str = "",
    mapping: str | Path | None = None,
    download: bool = False,
) -> Proposal:
    """Returns a mapping to begin with, for a checkpoint that is recognised by its names, shapes and config.json.

    A configuration of mergekit, known by its ``merge_method``, becomes the mapping that makes the same model.

    Parameters
    ----------
    checkpoint, download
        As for ``inspect``.
    bases
        The preset's other sources, by name.
    to
        The target wanted, or a preset; empty if there is one only.
    mapping
        Where the mapping will lie: paths in it are relative to its folder. None for the current one.

    Raises
    ------
    MappingError
        ``no-conversion``, ``ambiguous-conversion``; ``unknown-layout``: there are no tensors.
    UsageError, CheckpointError
        As ``inspect``; ``unknown-source``: a base that the preset has no use for.
    """
    from shardmerge.prepare.proposing import proposed

    folder = Path(mapping).parent if mapping is not None else Path()
    if Path(checkpoint).suffix in (".yml", ".yaml") and Path(checkpoint).is_file():
        from shardmerge.prepare.merge_configs import proposed_merge

        return proposed_merge(Path(checkpoint), folder, bases or to, download=download)
    return proposed(str(checkpoint), bases or {}, to, folder, download=download)


def _rule_lines(mapping: Path, rule: str) -> tuple[str, ...]:
    """Returns a rule as it is written in the mapping or in its preset: its line and those further in."""
    from shardmerge.mapping.preset_files import read_preset
    from shardmerge.mapping.reader import load_spec

    file, line, _ = rule.split(" ", 1)[0].rsplit(":", 2)
    use = load_spec(mapping).use
    texts = {use.rsplit("/", 1)[-1] + ".yaml": use, mapping.name: ""}
    if file not in texts:
        return ()
    text = read_preset(texts[file]) if texts[file] else mapping.read_text("utf-8")
    lines = text.splitlines()[int(line) - 1 :]
    indent = _indent(lines[0])
    more = takewhile(lambda one: one.strip() and _indent(one) > indent, lines[1:])
    return tuple(one[indent:].rstrip() for one in (lines[0], *more))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def write_new(path: Path, text: str) -> None:
    """Writes a text file that must not be there yet.

    Raises
    ------
    OutputError
        ``output-exists``, ``unwritable-output``.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        hint = "name another file, or remove this one yourself"
        raise OutputError("output-exists", "the file is there already", where=str(path), hint=hint) from error
    except OSError as error:
        what = f"cannot write: {error.strerror}"
        raise OutputError("unwritable-output", what, where=str(path), hint=advice(error)) from error
