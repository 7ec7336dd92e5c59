"""The ``args`` that Megatron-Core keeps beside the weights: as the config.json of the model, and to check one.

Names and defaults are those of ``megatron/training/arguments.py``. A value that makes another model than the config can
say is refused by its name: most of them leave no trace in the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, dimension, layers
from shardmerge.targets.foreign_configs import LLAMA_3_CONTEXT, LLAMA_3_ROPE, not_llama, real
from shardmerge.targets.text_config import rope_scaling
from shardmerge.tensors import Catalog

# Arguments that make another model than LLaMA's, with every value that does not.
_ANY: Mapping[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",), "swiglu": (True,), "position_embedding_type": ("rope",), "rotary_percent": (1.0,),
    "rotary_interleaved": (False,), "add_bias_linear": (False,), "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,), "qk_l2_norm": (False,),
    "multi_latent_attention": (False,), "squared_relu": (False,), "quick_geglu": (False,),
    "group_query_attention_interleaved": (False,), "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla",), "softmax_scale": (None,), "no_rope_freq": (None,), "mtp_num_layers": (None, 0),
    "window_size": (None,), "is_hybrid_model": (False,), "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,), "heterogeneous_layers_config_encoded_json": (None,),
    "attention_output_gate": (False,), "activation_func_clamp_value": (None,), "glu_linear_offset": (0.0,),
    "scale_embeddings": (False,), "embedding_multiplier": (None, 1), "mup_width_mult": (None, 1),
}  # fmt: skip
# Those of experts that make others than Mixtral's: chosen by a softmax, whose weights add up to one again.
_EXPERTS: Mapping[str, tuple[object, ...]] = {
    "add_qkv_bias": (False,), "moe_router_pre_softmax": (False,), "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0), "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,), "moe_shared_expert_intermediate_size": (None, 0), "moe_layer_freq": (1,),
    "moe_apply_probs_on_input": (False,), "moe_latent_size": (None,),
}  # fmt: skip

# What a config.json says of the arithmetic that no tensor shows, and which arguments say the same.
_KEYS = {"rope_theta": ("rotary_base",), "rms_norm_eps": ("norm_epsilon", "layernorm_epsilon"),
         "num_experts_per_tok": ("moe_router_topk",)}  # fmt: skip
# Likewise of the sizes: heads of another size may have as many rows.
_SIZES = {"heads": "num_attention_heads", "kv_heads": "num_query_groups", "head_dim": "kv_channels"}
# And of arguments by a tensor of the first layer that is there where they are on.
_TENSORS = {
    "model.layers.0.self_attn.q_proj.bias": "add_qkv_bias",
    "model.layers.0.self_attn.q_norm.weight": "qk_layernorm",
}


# Without a default in Megatron, or resolved by it before a checkpoint is written.
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")


def has_args(catalog: Catalog) -> bool:
    """Tells whether a checkpoint holds the arguments of its training."""
    return "num_layers" in catalog.facts


def from_megatron(arguments: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config for the ``args`` that Megatron-Core stores.

    A norm of queries and keys is Qwen3's, experts are Mixtral's, both Qwen3-MoE's, and a bias is Qwen2's.

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for a model that none of these is; ``odd-config``.
    """
    _check(arguments, where)
    heads = dimension(arguments, "num_attention_heads", 0, where)
    hidden = dimension(arguments, "hidden_size", 0, where)
    grouped = arguments.get("group_query_attention") is not False
    groups = dimension(arguments, "num_query_groups", heads, where) if grouped else heads
    rows = "vocab_size" if isinstance(arguments.get("vocab_size"), int) else "padded_vocab_size"
    epsilon = "norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"
    made: JsonObject = {
        "head_dim": dimension(arguments, "kv_channels", hidden // heads, where),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": dimension(arguments, "ffn_hidden_size", 0, where),
        "max_position_embeddings": dimension(arguments, "max_position_embeddings", 4096, where),
        "model_type": _model_type(arguments),
        "num_attention_heads": heads,
        "num_hidden_layers": layers({"num_hidden_layers": arguments.get("num_layers")}, 0, where),
        "num_key_value_heads": groups,
        "rms_norm_eps": real(arguments, epsilon, 1e-5, where),
        "rope_theta": real(arguments, "rotary_base", 10000.0, where),
        "tie_word_embeddings": arguments.get("untie_embeddings_and_output_weights") is not True,
        "vocab_size": dimension(arguments, rows, 0, where),
    }
    if arguments.get("use_rope_scaling") is True:
        made["rope_scaling"] = LLAMA_3_ROPE | {
            "factor": real(arguments, "rope_scaling_factor", 8.0, where),
            "original_max_position_embeddings": LLAMA_3_CONTEXT,
        }
    return made | _experts(arguments, where)


def _check(arguments: Mapping[str, object], where: str) -> None:
    usual = dict(_ANY)
    if arguments.get("qk_layernorm") is True:
        usual["add_qkv_bias"] = (False,)
    if _has_experts(arguments):
        usual |= _EXPERTS
    odd = {key: arguments[key] for key, values in usual.items() if key in arguments and arguments[key] not in values}
    if arguments.get("use_rotary_position_embeddings") is True:
        odd.pop("position_embedding_type", None)  # the older switch, which wins in `validate_args`
    if odd:
        wanted = ", ".join(f"{key} {usual[key][0]!r}" for key in odd)
        raise not_llama("args in the checkpoint", where, shown(odd), wanted)
    missing = [key for key in _NEEDED if key not in arguments]
    if missing:
        raise TargetError(
            "odd-config",
            "the args in the checkpoint do not say how large the model is",
            where=where,
            found=f"no {', '.join(missing)}",
            expected=f"{', '.join(_NEEDED)}, or a base with the model's config.json",
        )


def _has_experts(arguments: Mapping[str, object]) -> bool:
    return arguments.get("num_experts") not in (None, 0)


def _model_type(arguments: Mapping[str, object]) -> str:
    if arguments.get("qk_layernorm") is True:
        return "qwen3_moe" if _has_experts(arguments) else "qwen3"
    if _has_experts(arguments):
        return "mixtral"
    return "qwen2" if arguments.get("add_qkv_bias") is True else "llama"


def _experts(arguments: Mapping[str, object], where: str) -> JsonObject:
    """Returns what the config says of experts; Megatron's default is to choose two."""
    if not _has_experts(arguments):
        return {}
    wide = "ffn_hidden_size" if arguments.get("moe_ffn_hidden_size") is None else "moe_ffn_hidden_size"
    width, count = dimension(arguments, wide, 0, where), dimension(arguments, "num_experts", 0, where)
    chosen: JsonObject = {"num_experts_per_tok": dimension(arguments, "moe_router_topk", 2, where)}
    if _model_type(arguments) == "mixtral":
        return chosen | {"intermediate_size": width, "num_local_experts": count, "sliding_window": None}
    return chosen | {"moe_intermediate_size": width, "norm_topk_prob": True, "num_experts": count}


def check_config(config: Mapping[str, object], model: Architecture, catalog: Catalog, where: str) -> None:
    """Checks that a Hugging Face config describes the model that a checkpoint's arguments do.

    Parameters
    ----------
    config, model
        As it is, and as it was read.
    catalog
        The checkpoint; one without arguments says nothing.
    where
        The file of the config.

    Raises
    ------
    TargetError
        ``contradiction``: they describe two models. ``unsupported-architecture``, ``odd-config``: as ``from_megatron``.
    """
    if not has_args(catalog):
        return
    made = from_megatron({**_as_arguments(model), **catalog.facts}, catalog.path)
    odd = [*_other_keys(config, made, catalog), *_other_sizes(model, made, catalog)]
    if odd:
        raise TargetError(
            "contradiction",
            "the config.json and the args in the checkpoint describe two models",
            where=where,
            found=", ".join(f"{key} {shown(own)}" for key, own, _ in odd),
            expected=", ".join(f"{key} {shown(said)}" for key, _, said in odd) + f", as in {catalog.path}",
            hint="name the base that the training started from, or leave it out",
        )


def _as_arguments(model: Architecture) -> JsonObject:
    """Returns the sizes of a model as arguments, for what a checkpoint does not say."""
    return {
        "vocab_size": model.vocab_size, "num_layers": model.num_layers, "hidden_size": model.hidden_size,
        "num_attention_heads": model.heads, "num_query_groups": model.kv_heads, "kv_channels": model.head_dim,
        "ffn_hidden_size": model.intermediate_size,
    }  # fmt: skip


def padding(catalog: Catalog, rows: int, *, stated: bool) -> str:
    """Returns what is to be said of a vocabulary that Megatron padded, ``""`` for nothing.

    ``make_vocab_size_divisible_by`` times the tensor ranks divides the padded number (``_vocab_size_with_padding``).

    Parameters
    ----------
    catalog
        The checkpoint.
    rows
        Of the vocabulary that is written.
    stated
        Whether anybody says how many tokens there are.
    """
    padded = catalog.facts.get("padded_vocab_size")
    if not has_args(catalog) or not isinstance(padded, int):
        return ""
    if rows == padded and not stated:
        return (
            f"the vocabulary keeps its {padded:,} rows, Megatron's padding among them: nothing says how many tokens "
            "there are. Name a base with config.json, or write `vocabulary: {rows: NUMBER, trim: true}`"
        )
    if rows >= padded:
        return ""
    usual = _padded(catalog, rows)
    if usual in (None, padded):
        return f"rows {rows:,} to {padded - 1:,} of the vocabulary are Megatron's padding, and are cut off"
    return (
        f"rows {rows:,} to {padded - 1:,} of the vocabulary are cut off, and Megatron would have padded {rows:,} "
        f"tokens to {usual:,}: is the config.json older than the last tokens that were added?"
    )


def _padded(catalog: Catalog, rows: int) -> int | None:
    """Returns to how many rows Megatron pads a vocabulary; None where the arguments do not say."""
    divisor = catalog.facts.get("make_vocab_size_divisible_by")
    ranks = catalog.facts.get("tensor_model_parallel_size")
    if not isinstance(divisor, int) or not isinstance(ranks, int) or divisor * ranks < 1:
        return None
    return -(-rows // (divisor * ranks)) * divisor * ranks


def _other_keys(
    config: Mapping[str, object], made: JsonObject, catalog: Catalog
) -> Iterator[tuple[str, object, object]]:
    rope = config.get("rope_parameters")
    own = {**(rope if isinstance(rope, dict) else {}), **config}
    for key, arguments in sorted(_KEYS.items()):
        stated = key in own and key in made and any(argument in catalog.facts for argument in arguments)
        if stated and own[key] != made[key]:
            yield key, own[key], made[key]
    scaled = "rope_scaling" in made
    if "use_rope_scaling" in catalog.facts and scaled != bool(rope_scaling(config)):
        yield "rope_scaling", config.get("rope_scaling"), made.get("rope_scaling")


def _other_sizes(model: Architecture, made: JsonObject, catalog: Catalog) -> Iterator[tuple[str, object, object]]:
    other = read_architecture(made, catalog.path)
    for name, argument in _SIZES.items():
        own, said = getattr(model, name), getattr(other, name)
        if own != said and argument in catalog.facts:
            yield argument, own, said
    ours, theirs = model.tensors(), other.tensors()
    for name, argument in _TENSORS.items():
        if (name in ours) != (name in theirs) and argument in catalog.facts:
            yield argument, name in ours, name in theirs
    own, said = (one.count("expert") for one in (model, other))
    if own != said:
        yield "num_experts", own, said
