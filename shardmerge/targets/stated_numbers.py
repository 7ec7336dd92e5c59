"""Numbers of a config.json that are none: a size that is no whole number, a constant that is not finite.

JSON as Python writes it has NaN and Infinity, and a config that is copied would take them along. Of 802 model types of
transformers 5.23 none has either by default but ``time_step_limit`` of Mamba 2 and its kin, whose end is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.errors import TargetError
from shardmerge.targets.config_numbers import MAX_DIMENSION, is_finite, is_real, is_whole, odd_config

_UNBOUNDED = frozenset({"time_step_limit"})
# Sizes, by the names that several architectures give them; a list of them has one a layer.
_SIZES = frozenset((
    "d_ff", "d_model", "decoder_layers", "embed_dim", "embedding_size", "encoder_layers", "ffn_dim", "head_dim",
    "hidden_size", "intermediate_size", "max_position_embeddings", "moe_intermediate_size", "moe_num_experts", "n_embd",
    "n_head", "n_inner", "n_layer", "n_layers", "n_routed_experts", "num_attention_heads", "num_decoder_layers",
    "num_encoder_layers", "num_experts", "num_experts_per_tok", "num_heads", "num_hidden_layers", "num_key_value_heads",
    "num_layers", "num_local_experts", "vocab_size",
))  # fmt: skip
# Constants of a model's arithmetic, all of them positive.
_CONSTANTS = frozenset((
    "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "partial_rotary_factor", "rms_norm_eps", "rope_theta",
))  # fmt: skip


def odd_numbers(config: Mapping[str, object], where: str) -> tuple[TargetError, ...]:
    """Returns an error for each number that is none, or that no model can have: ``odd-config``."""
    return tuple(_odd(config, "", where))


def _odd(value: object, path: str, where: str) -> Iterator[TargetError]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _odd(item, f"{path}.{name}" if path else str(name), where)
    elif isinstance(value, list):
        for item in value if path.rpartition(".")[2] not in _UNBOUNDED else ():
            yield from _odd(item, path, where)
    elif value is not None and (expected := _lack(path.rpartition(".")[2], value)):
        yield odd_config(path, value, expected, where)


def _lack(key: str, value: object) -> str:
    """Returns what a value should be and is not, ``""`` where nothing is wrong with it."""
    if key in _SIZES:
        return "" if _is_count(value) else f"an integer from 0 to {MAX_DIMENSION}"
    if key in _CONSTANTS:
        return "" if is_real(value) and value > 0 else "a finite number above 0"
    return "" if not isinstance(value, int | float) or is_finite(value) else "a finite number"


def _is_count(value: object) -> bool:
    """Tells whether a value is a size; one that is written ``1200.0`` is."""
    return (is_whole(value) or (is_real(value) and float(value).is_integer())) and 0 <= value <= MAX_DIMENSION
