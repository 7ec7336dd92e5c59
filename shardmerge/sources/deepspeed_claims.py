"""What the model file of a DeepSpeed checkpoint says about the run, reduced to what can be compared with other files.

Keys are those of ``runtime/engine.py`` (``_common_checkpoint_state``), DeepSpeed 0.9 to 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.sources.pickle_values import Opaque, PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.value_digest import value_digest

# Until then ZeRO's __init__ made one optimizer step with zero gradients, to have the moments allocated, so that Adam
# counts one step more than the engine (seen: 0.9.5, 0.10.3, 0.12.6; gone from the source of 0.13.5).
_NO_FIRST_STEP = (0, 13, 5)
# Steps or ranks, more than of any run.
_MOST = 1 << 40


@dataclass(frozen=True, slots=True)
class DeepSpeedClaims:
    """What a model file states.

    Attributes
    ----------
    stage
        ``ds_config["zero_optimization"]["stage"]``, 0 where the config does not speak of ZeRO; ``None`` without config.
    world
        Ranks that share the partitions: ``dp_world_size``, or ``mics_shard_size`` of it with MiCS (0.9 to 0.18), where
        the first group of so many ranks saves for all; 0 if not stated.
    tensor_parallel, pipeline_parallel
        Degrees: ``checkpoint_parallel_dimensions`` (0.19) or ``mp_world_size``, which is taken for tensor parallelism.
    experts, autoep
        The largest of ``num_experts``, 0 for none; whether AutoEP (0.19) fused them.
    steps, skipped
        ``global_steps``, and how many of these an fp16 overflow left out.
    version, bf16
        ``ds_version``; whether ``ds_config`` enables bf16.
    partitioned
        Whether ``param_shapes`` is there: the optimizer was one of ZeRO's, with files of its own.
    layered
        Whether the module is in files of its layers: a pipeline's, whose model files have ``None`` for it.
    round_robin
        Whether stages 1 and 2 dealt the parameters out to the ranks in turn.
    settings, shapes
        Digests of ``ds_config``, ``""`` without one, and of ``param_shapes`` with ``frozen_param_shapes``.
    """

    stage: int | None
    world: int
    tensor_parallel: int
    pipeline_parallel: int
    experts: int
    autoep: bool
    steps: int | None
    skipped: int
    version: str
    bf16: bool
    partitioned: bool
    layered: bool
    round_robin: bool
    settings: str
    shapes: str

    def counts_to(self, step: float) -> bool:
        """Tells whether an optimizer that made so many steps is of the same save, as far as counters tell."""
        if self.steps is None:
            return True
        made = self.steps - self.skipped
        return step == made or (step == made + 1 and version_of(self.version) < _NO_FIRST_STEP)


def read_claims(root: Mapping[object, PickleValue]) -> DeepSpeedClaims:
    """Returns what a model file states; ``root`` is what it holds."""
    config = settings_of(root.get("ds_config"))
    degrees = as_dict(root.get("checkpoint_parallel_dimensions"))
    stages = _count(degrees.get("pp_degree"))
    shapes: PickleValue = [root.get("param_shapes"), root.get("frozen_param_shapes")]
    steps = root.get("global_steps")
    return DeepSpeedClaims(
        stage=_stage(config),
        world=_sharing(_count(root.get("dp_world_size")), config),
        tensor_parallel=_count(degrees.get("tp_degree")) or _count(root.get("mp_world_size")) // max(stages, 1),
        pipeline_parallel=stages,
        experts=max(largest(root.get("num_experts")), 0),
        autoep=bool(root.get("ds_autoep_layers") or root.get("autoep_layers")),
        steps=_count(steps) if isinstance(steps, int) else None,
        skipped=_count(root.get("skipped_steps")),
        version=text_of(root.get("ds_version")),
        bf16=(settings_of((config or {}).get("bf16")) or {}).get("enabled") is True,
        partitioned=isinstance(root.get("param_shapes"), (list, dict)),
        layered="module" in root and root["module"] is None,
        round_robin=(settings_of((config or {}).get("zero_optimization")) or {}).get("round_robin_gradients") is True,
        settings="" if config is None else value_digest(root.get("ds_config")),
        shapes=value_digest(shapes),
    )


def settings_of(value: PickleValue) -> Mapping[object, PickleValue] | None:
    """Returns a config as a dict, or ``None``; mmengine pickles its ``ConfigDict`` as a call with one."""
    if isinstance(value, Opaque) and len(value.args) == 1:
        value = value.args[0]
    return value if isinstance(value, dict) else None


def version_of(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version, ``(0, 19, 8)``; what is no number ends it."""
    numbers: list[int] = []
    for part in text.partition("+")[0].split(".")[:3]:
        if not part.isascii() or not part.isdigit():
            break
        numbers.append(int(part[:9]))
    return tuple(numbers)


def largest(value: PickleValue) -> int:
    """Returns a count, or the largest of a list of them (one a parameter group, or one a MoE layer); 0 for neither."""
    counts = value if isinstance(value, list) else [value]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _stage(config: Mapping[object, PickleValue] | None) -> int | None:
    if config is None:  # a path instead of a config, or none at all: DeepSpeed saves what it was given
        return None
    zero = config.get("zero_optimization")
    if zero is None:
        return 0
    stage = (settings_of(zero) or {}).get("stage", 0) if not isinstance(zero, bool) else None
    return stage if isinstance(stage, int) else None


def _sharing(world: int, config: Mapping[object, PickleValue] | None) -> int:
    zero = settings_of((config or {}).get("zero_optimization")) or {}
    shard = _count(zero.get("mics_shard_size")) if zero.get("stage") == 3 else 0
    return shard if shard and not world % shard else world


def _count(value: PickleValue) -> int:
    return min(value, _MOST) if isinstance(value, int) and value > 0 else 0


def text_of(value: PickleValue) -> str:
    """Returns a text, ``""`` for anything else."""
    return value if isinstance(value, str) else ""
