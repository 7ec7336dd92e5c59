"""Whether the files of a DeepSpeed tag are all there and of one save: what each states against what the others do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims, version_of
from shardmerge.sources.deepspeed_files import consolidated, model_file, model_name, optim_name
from shardmerge.sources.deepspeed_ranks import OptimState, RankState
from shardmerge.sources.deepspeed_values import Stored, compare_masters
from shardmerge.tensors import TensorEntry

ONE_SAVE = "copy the files of one save into a directory of their own"
NODES = "every node writes its own ranks: gather the files of all nodes in one directory"
_MODULE = "take the 16-bit weights of the model file alone: --view module (in a mapping, `view: module`)"
# A hundred times the GPUs of the largest runs.
_MOST_RANKS = 10_000_000
# Weights compared with the 16-bit module: where nothing else speaks against one save, and where counters do.
_USUALLY, _CLOSELY = 2048, 16384
# Something that every file of a set states, with the files.
_Fact: TypeAlias = tuple[str, list[tuple[Path, object]]]
# Facts of which a digest is kept, or numbers without a meaning to anybody: the two sides are not shown.
_DIGESTS = ("ds_config", "param_shapes", "the optimizer's settings", "param_alignment_paddings")
# Names in one line of an error.
_MOST_NAMES = 8
# Sequence-parallel runs before it state the ranks that see other data in ``dp_world_size``, and cut over more ranks.
_SEQUENCE_WORLD = (0, 13)


@dataclass(frozen=True, slots=True)
class Tag:
    """The files of a tag, read.

    Attributes
    ----------
    folder
        The tag directory.
    states, optims
        Its model and optimizer files, in rank order; of a pipeline, those of one of its stages.
    masters_elsewhere
        Whether optimizer files are not looked for: a universal checkpoint has none, and a module needs none.
    """

    folder: Path
    states: Sequence[RankState]
    optims: Sequence[OptimState]
    masters_elsewhere: bool = False

    @property
    def claims(self) -> DeepSpeedClaims:
        """What rank 0's model file states."""
        return self.states[0].claims

    @property
    def stage(self) -> int:
        """The ZeRO stage of the layout: that of the optimizer files, else as the model file says, else by its name."""
        if self.optims:
            return self.optims[0].stage or 1
        if self.claims.stage is not None:
            return self.claims.stage
        return 3 if self.states[0].rank.partitioned else 1 if self.claims.partitioned else 0

    def error(self, code: str, what: str, found: str = "", expected: str = "", hint: str = "") -> CheckpointError:
        """Returns an error about the directory."""
        return CheckpointError(code, what, where=str(self.folder), found=found, expected=expected, hint=hint)


def check_module(folder: Path, state: RankState) -> None:
    """Raises what is wrong with a model file that is read alone: ``mixed-runs``."""
    tag = Tag(folder, [state], [])
    raise_all([*_wrong_names(tag), *_wrong_stage(tag)])


def check_tag(tag: Tag) -> None:
    """Raises what is wrong with a set of rank files.

    Raises
    ------
    CheckpointError
        ``missing-rank``, ``mixed-runs``; all at once.
    """
    raise_all([*_wrong_names(tag), *_wrong_stage(tag), *_missing_ranks(tag), *_mixed_runs(tag)])


def check_stages(tags: Sequence[Tag]) -> None:
    """Raises what is wrong with the stages of a pipeline, each by itself and all together; as ``check_tag``."""
    found: list[ShardmergeError] = []
    for tag in tags:
        try:
            check_tag(tag)
        except ShardmergeError as error:
            found += error.each()
    raise_all([*found, *_differences(tags[0], _of_states([tag.states[0] for tag in tags]))])


def _wrong_names(tag: Tag) -> Iterator[ShardmergeError]:
    named = [*((state.rank, state.saved_as) for state in tag.states), *((o.rank, o.saved_as) for o in tag.optims)]
    for rank, saved_as in named:
        if saved_as:
            yield wrong_name(rank.path, saved_as)


def wrong_name(path: Path, saved_as: str) -> CheckpointError:
    """Returns the error for a file that was saved under another name than it has."""
    return CheckpointError(
        "mixed-runs",
        "a file was saved under another rank's name",
        where=str(path),
        found=saved_as,
        expected=path.name,
        hint="files were renamed or swapped: give each its own name again, or copy the save anew",
    )


def _wrong_stage(tag: Tag) -> Iterator[ShardmergeError]:
    claimed = tag.claims.stage
    first = tag.states[0].rank
    if claimed is not None and (claimed == 3) != first.partitioned:
        yield tag.error(
            "mixed-runs",
            "the model file has the name of another ZeRO stage than it states",
            found=first.path.name,
            expected=f"{model_file(first.model_parallel, partitioned=claimed == 3)}, for stage {shown(claimed)}",
            hint=ONE_SAVE,
        )
    for optim in tag.optims:
        # BF16_Optimizer, which writes no stage, serves stage 1 and, up to DeepSpeed 0.16, stage 0.
        if claimed not in ((None, optim.stage) if optim.stage is not None else (None, 0, 1)):
            yield tag.error(
                "mixed-runs",
                "model file and optimizer files are not of one run: they differ in the ZeRO stage",
                found=f"stage {shown(optim.stage)} in {optim.rank.path.name}",
                expected=f"stage {shown(claimed)}, as in {first.path.name}",
                hint=ONE_SAVE + way_out(tag),
            )
            return


def _missing_ranks(tag: Tag) -> Iterator[ShardmergeError]:
    claims = tag.claims
    if not tag.optims and not claims.stage and not claims.partitioned:
        return  # stage 0: the model file is all there is
    stated = [*(optim.world for optim in tag.optims), claims.world]
    partitioned = tag.stage == 3
    there = [state.rank.data_parallel for state in tag.states] if partitioned else []
    world = max(1, *stated, *([] if any(stated) else (rank + 1 for rank in there)))
    if world > _MOST_RANKS:
        yield tag.error("mixed-runs", "the files state more ranks than any run has", found=shown(world), hint=ONE_SAVE)
        return
    if not tag.masters_elsewhere:
        yield from _missing(tag, "optimizer", [optim.rank.data_parallel for optim in tag.optims], world)
    if partitioned:
        yield from _missing(tag, "model", there, world)


def _missing(tag: Tag, what: str, ranks: Sequence[int], world: int) -> Iterator[ShardmergeError]:
    missing = sorted(set(range(world)) - set(ranks))
    names = [_file_name(tag, what, rank) for rank in missing]
    if missing:
        numbers = ", ".join(map(str, missing[:_MOST_NAMES])) + (", ..." if len(missing) > _MOST_NAMES else "")
        yield tag.error(
            "missing-rank",
            f"the {what} files of rank {numbers} are missing" if ranks else f"there are no {what} files",
            found=f"{len(ranks)} files; not {', '.join(names[:_MOST_NAMES])}",
            expected=f"{world} files, one a rank",
            hint=NODES + way_out(tag),
        )
    if max(ranks, default=0) >= world:
        yield tag.error(
            "mixed-runs",
            f"there are more {what} files than ranks",
            found=f"rank {max(ranks)}",
            expected=f"{world} ranks (partition_count)",
            hint="files of an earlier run with more ranks lie in the same directory: move them elsewhere",
        )


def _file_name(tag: Tag, what: str, rank: int) -> str:
    parallel = tag.states[0].rank.model_parallel
    if what == "model":
        return model_name(rank, parallel)
    bf16 = tag.optims[0].rank.path.name.startswith("bf16_") if tag.optims else tag.claims.bf16
    return optim_name(rank, parallel, bf16=bf16)


def way_out(tag: Tag) -> str:
    """What can be done without the files: the 16-bit module below stage 3, a consolidated file beside the tag."""
    whole = consolidated(tag.folder)
    hollow = tag.states[0].rank.partitioned or (tag.masters_elsewhere and tag.claims.layered)
    ways = ([] if hollow else [_MODULE]) + ([f"convert {whole}, a whole model"] if whole else [])
    return "".join(f"; or {way}" for way in ways)


def _mixed_runs(tag: Tag) -> Iterator[ShardmergeError]:
    optims, states = tag.optims, tag.states
    facts: list[_Fact] = [
        ("ZeRO stage", [(o.rank.path, o.stage) for o in optims]),
        ("world size", [(o.rank.path, o.world) for o in optims]),
        ("optimizer step", [(o.rank.path, o.step) for o in optims if o.step is not None]),
        ("param_alignment_paddings", [(o.rank.path, o.paddings) for o in optims]),
        ("ds_config", [(o.rank.path, o.settings) for o in optims]),
        ("the optimizer's settings", [(o.rank.path, o.groups) for o in optims]),
        ("DeepSpeed version", [(o.rank.path, o.version) for o in optims]),
        ("param_shapes", [(s.rank.path, s.claims.shapes) for s in states]),
    ]
    yield from _differences(tag, [*facts, *_of_states(states)])
    if optims:
        yield from _mixed_kinds(tag)


def _of_states(states: Sequence[RankState]) -> list[_Fact]:
    """What model files state of the run, whatever they hold."""
    return [
        ("global_steps", [(s.rank.path, s.claims.steps) for s in states]),
        ("skipped_steps", [(s.rank.path, s.claims.skipped) for s in states]),
        ("world size", [(s.rank.path, s.claims.world) for s in states]),
        ("ds_config", [(s.rank.path, s.claims.settings) for s in states]),
        ("DeepSpeed version", [(s.rank.path, s.claims.version) for s in states]),
    ]


def _differences(tag: Tag, facts: Sequence[_Fact]) -> Iterator[ShardmergeError]:
    for what, values in facts:
        other = next((pair for pair in values if pair[1] != values[0][1]), None)
        if other is not None:
            yield _differ(tag, what, values[0], other)


def _mixed_kinds(tag: Tag) -> Iterator[ShardmergeError]:
    """What model files and optimizer files both state."""
    state, optim, claims = tag.states[0], tag.optims[0], tag.claims
    facts: list[tuple[str, object, object]] = [
        ("ds_config", claims.settings, optim.settings),
        ("DeepSpeed version", claims.version, optim.version),
        ("world size", claims.world, _same_world(claims, optim.world)),
    ]
    for what, mine, theirs in facts:
        if mine and theirs and mine != theirs:
            yield _differ(tag, what, (state.rank.path, mine), (optim.rank.path, theirs))


def _same_world(claims: DeepSpeedClaims, world: int) -> int:
    multiple = claims.world > 0 and world % claims.world == 0
    return claims.world if multiple and version_of(claims.version) < _SEQUENCE_WORLD else world


def _differ(tag: Tag, what: str, first: tuple[Path, object], other: tuple[Path, object]) -> CheckpointError:
    digest = what in _DIGESTS
    return tag.error(
        "mixed-runs",
        f"the rank files are not of one run: they differ in {what}",
        found=other[0].name if digest else f"{shown(other[1])} in {other[0].name}",
        expected=f"the same as in {first[0].name}" if digest else f"{shown(first[1])}, as in {first[0].name}",
        hint=ONE_SAVE + way_out(tag),
    )


def check_masters(
    tag: Tag, module: Mapping[str, Stored], entries: Mapping[str, TensorEntry], steps: str = ""
) -> list[str]:
    """Compares masters with the module's weights, and the optimizer's steps with the model file's; returns warnings.

    Masters round to the module's weights in one save. Steps differ also where an optimizer was begun anew when the run
    was resumed (``load_optimizer_states=False``): then every sampled weight must agree.

    Raises
    ------
    CheckpointError
        ``mixed-runs``.
    """
    claims = tag.claims
    steps = steps or _odd_steps(tag)
    tally = compare_masters(module, entries, _CLOSELY if steps else _USUALLY)
    if steps and (tally.differing or not tally.files):
        skipped = f" ({claims.skipped} skipped)" if claims.skipped else ""
        raise _two_saves(tag, steps, f"{claims.steps}{skipped}, as in {tag.states[0].rank.path.name}")
    if tally.worst():
        raise _two_saves(tag, f"{tally.worst()} differ", "masters that round to the 16-bit module")
    warnings = []
    if tally.differing:
        warnings.append(f"{tally.differing} sampled fp32 weights do not round to the 16-bit module's; they are taken")
    if steps:
        warnings.append(f"{steps}, {claims.steps} in the model file; the weights of both agree")
    return warnings


def _odd_steps(tag: Tag) -> str:
    """Says of an optimizer file that counts other steps than the model file, ``""`` if none does."""
    odd = next((o for o in tag.optims if o.step is not None and not tag.claims.counts_to(o.step)), None)
    return "" if odd is None else f"{odd.step:g} steps in {odd.rank.path.name}"


def _two_saves(tag: Tag, found: str, expected: str) -> CheckpointError:
    """Returns the error for a model file and optimizer files whose steps, or whose weights, are not of one save."""
    again = "" if tag.stage < 3 else (
        "; where the optimizer was begun anew on purpose, DeepSpeed's own zero_to_fp32.py, which the run saved beside "
        "the tag, makes a file to convert"
    )  # fmt: skip
    return tag.error(
        "mixed-runs",
        "model file and optimizer files are of two saves",
        found=found,
        expected=expected,
        hint="the save was interrupted, or two saves are mixed: " + ONE_SAVE + way_out(tag) + again,
    )
