"""The stages of a DeepSpeed pipeline: a model file each, which lists names and shapes and holds no weights.

Stage s is ``mp_rank_<s>`` in the names of files (``runtime/pipe/topology.py``, ``get_model_parallel_rank``, DeepSpeed
0.9 to 0.19). A pipeline has ZeRO stage 0 or 1: its engine refuses the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import NODES, ONE_SAVE, Tag, check_stages
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims
from shardmerge.sources.deepspeed_files import TagFiles, model_file
from shardmerge.sources.deepspeed_ranks import RankReader, shape_table
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.torch_file import TorchFile
from shardmerge.tensors import Shape

# What the names of tied modules begin with.
TIED = "tied_modules."
# More than the GPUs of any node, and more than any pipeline has.
_MOST_STAGES = 10_000


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """One stage of a pipeline.

    Attributes
    ----------
    tag
        Its model file, and the optimizer files of its data-parallel ranks.
    file
        Its model file, read.
    """

    tag: Tag
    file: TorchFile

    @property
    def number(self) -> int:
        """From 0 on."""
        return self.tag.states[0].rank.model_parallel

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shapes of the parameters that it trains, by name; empty for ZeRO stage 0, which lists none."""
        groups = as_dict(self.file.root).get("param_shapes")
        tables = [shape_table(group) for group in groups] if isinstance(groups, list) else []
        return {name: shape for table in tables for name, shape in table.items()}

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of its persistent buffers."""
        names: PickleValue = as_dict(self.file.root).get("buffer_names")
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it trains; of ZeRO stage 0 those that BF16_Optimizer lists, if it is that."""
        optimizer = as_dict(as_dict(self.file.root).get("optimizer"))
        groups: PickleValue = optimizer.get("param_slice_mappings")
        mapped = (as_dict(group) for group in groups) if isinstance(groups, list) else ()
        return (*self.shapes, *(name for group in mapped for name in group if isinstance(name, str)))


def read_stages(folder: Path, listed: TagFiles, reader: RankReader, *, optims: bool) -> list[PipelineStage]:
    """Returns the stages of a pipeline, in order; with their optimizer files where these are asked for, and have names.

    Raises
    ------
    CheckpointError
        ``missing-rank``: a stage is not there, or a rank of one. ``mixed-runs``: files of several saves.
    """
    stages = []
    for rank in listed.models:
        state = reader.model(rank, {})
        mine = [optim for optim in listed.optims if optim.model_parallel == rank.model_parallel]
        named = optims and state.claims.partitioned
        tag = Tag(folder, [state], [reader.optim(optim) for optim in mine if named], not named)
        stages.append(PipelineStage(tag, reader.file(rank)))
    raise_all(_missing_stages(stages, listed.parallel[-1]))
    check_stages([stage.tag for stage in stages])
    raise_all(_listed_twice(stages))
    return stages


def are_listed(stages: Sequence[PipelineStage]) -> bool:
    """Tells whether the model files list all parameters: BF16_Optimizer's is the first rank's, with what that has."""
    return all(stage.shapes or (stage.parameters and stage.tag.claims.world == 1) for stage in stages)


def shared_names(stages: Sequence[PipelineStage], names: Collection[str]) -> dict[str, str]:
    """Returns further names that the model files tell for some of these, and whose they are."""
    tables = (as_dict(as_dict(stage.file.root).get("shared_params")) for stage in stages)
    pairs = (pair for table in tables for pair in table.items())
    return {
        alias: owner
        for alias, owner in pairs
        if isinstance(alias, str) and isinstance(owner, str) and owner in names and alias not in names
    }


def _missing_stages(stages: Sequence[PipelineStage], last: int) -> Iterator[ShardmergeError]:
    tag = stages[0].tag
    there = [stage.number for stage in stages]
    total = _stated_stages(tag.claims, there)
    missing = [number for number in range(total) if number not in there]
    if missing:
        names = ", ".join(model_file(number, partitioned=False) for number in missing[:8])
        yield tag.error(
            "missing-rank",
            f"model files of {len(missing)} of {total} pipeline stages are missing",
            found=f"{len(there)} files; not {names}",
            expected=f"{total} files, one a stage",
            hint=NODES,
        )
    if last >= total:
        yield tag.error(
            "mixed-runs",
            "there are files of more pipeline stages than there are",
            found=f"files of mp_rank_{last:02d}",
            expected=f"{total} stages",
            hint="files of an earlier run with more stages lie in the same directory: move them elsewhere",
        )


def _stated_stages(claims: DeepSpeedClaims, there: Sequence[int]) -> int:
    """Before 0.19 the files state the product of both degrees, which ``read_claims`` takes for tensor parallelism."""
    stated = claims.pipeline_parallel or claims.tensor_parallel
    return stated if 0 < stated <= _MOST_STAGES else max(there) + 1


def _listed_twice(stages: Sequence[PipelineStage]) -> Iterator[ShardmergeError]:
    """A layer is of one stage; tied modules alone are in several."""
    counts = Counter(name for stage in stages for name in stage.shapes if not name.startswith(TIED))
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        yield stages[0].tag.error(
            "mixed-runs",
            "the model files of several pipeline stages list the same parameters",
            found=f"{len(twice)}: {shown(twice)}",
            expected="a layer in one stage alone",
            hint=ONE_SAVE,
        )
