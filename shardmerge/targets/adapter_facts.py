"""What is known of an adapter besides its tensors, whichever file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says of the sums, or as much of it as a training config does.

    Attributes
    ----------
    alpha, rank
        None where it does not say.
    targets
        ``target_modules``: names, or an expression; empty for none, and for ``all-linear``.
    excluded, layers
        Modules and layer numbers that are not adapted though their names fit; ``layers`` is None for all.
    saved
        ``modules_to_save``.
    dora
        ``use_dora``; None where the file does not say.
    tokens
        ``trainable_token_indices`` by the name of the embedding, ``""`` for the model's own.
    tied
        ``ensure_weight_tying``.
    task
        ``task_type``: ``CAUSAL_LM``, ``SEQ_CLS``, ...; empty where it does not say.
    base
        Hub id or path of the model that it was trained on, where a run or the user says it; else empty.
    init
        ``pissa`` or ``olora`` where the base lost something before the run, else empty.
    parameters
        ``target_parameters``.
    peft_version
        Of what wrote the file, ``(0, 21)``; empty where it does not say.
    scale
        The factor of ``B @ A`` itself, where the file says that: mlx-lm's.
    replication
        ``layer_replication``: layers ``[start, end)`` of the base behind each other; empty for the base's own.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    saved: tuple[str, ...] = ()
    dora: bool | None = None
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: bool = False
    task: str = ""
    base: str = ""
    init: str = ""
    parameters: tuple[str, ...] = ()
    peft_version: tuple[int, ...] = ()
    replication: tuple[tuple[int, int], ...] = ()
    scale: float | None = None
