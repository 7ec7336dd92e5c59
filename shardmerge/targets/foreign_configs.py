"""Configs of other tools as the config.json that transformers would have for the same model.

Each function is pure: a parsed config in, a Hugging Face config out. Keys that are absent are left out, so that the
checks of ``llama.read_architecture`` speak of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.targets.architectures import JsonObject, dimension, finite, flag, layers
from shardmerge.tensors import Catalog

_LLAMA_3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3_CONTEXT = 8192


# ---- Meta


def from_params(params: Mapping[str, object], vocab_size: int, *, tied: bool, where: str) -> JsonObject:
    """Returns the config for Meta's params.json.

    The numbers follow transformers' ``convert_llama_weights_to_hf.py``, which is told the version of LLaMA. Here it
    is read off: LLaMA 3 has theta 500000 or a vocabulary of 128256, LLaMA 1 a norm_eps of 1e-6, Code Llama a theta
    of 1e6.

    Parameters
    ----------
    vocab_size
        Rows of the weights, used where params.json has none (LLaMA 2 says -1).
    tied
        Whether there is no output matrix.
    """
    inner = params.get("model", params)  # Llama Stack nests them
    params = inner if isinstance(inner, dict) else params
    dim, heads = dimension(params, "dim", 4096, where), dimension(params, "n_heads", 32, where)
    theta, scaled = _real(params, "rope_theta", 10000.0), params.get("use_scaled_rope") is True
    stated = params.get("vocab_size")
    rows = stated if isinstance(stated, int) and stated > 0 else vocab_size
    third = is_llama_3(params, rows)
    config: JsonObject = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000 if third else 1,
        "eos_token_id": 128001 if third else 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": intermediate_size(params, dim, where),
        "max_position_embeddings": _context(params, third=third, scaled=scaled, theta=theta),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers({"num_hidden_layers": params.get("n_layers")}, 32, where),
        "num_key_value_heads": dimension(params, "n_kv_heads", heads, where),
        "rms_norm_eps": _real(params, "norm_eps", 1e-5),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": rows,
    }
    if scaled:
        # LLaMA 3.2's 1B and 3B stretch by 32, all others by 8, and params.json does not say so.
        factor = _real(params, "rope_scale_factor", 32.0 if dim <= 3072 else 8.0)
        config["rope_scaling"] = _LLAMA_3_ROPE | {
            "factor": factor,
            "original_max_position_embeddings": _LLAMA_3_CONTEXT,
        }
    return config


def is_llama_3(params: Mapping[str, object], vocab_size: int) -> bool:
    """Whether params.json is a LLaMA 3's."""
    return vocab_size > 100_000 or params.get("use_scaled_rope") is True or _real(params, "rope_theta", 0) == 500_000


def intermediate_size(params: Mapping[str, object], dim: int, where: str) -> int:
    """Returns the width of the feed-forward layers (``llama/model.py`` of Meta: ``FeedForward``)."""
    multiple = dimension(params, "multiple_of", 256, where)
    return feed_forward_width(dim, _real(params, "ffn_dim_multiplier", 1.0), multiple)


def feed_forward_width(dim: int, multiplier: float, multiple: int) -> int:
    """Returns two thirds of four times ``dim``, scaled, and rounded up to a multiple."""
    wide = int(multiplier * int(8 * dim / 3))
    return -(-wide // multiple) * multiple


def _context(params: Mapping[str, object], *, third: bool, scaled: bool, theta: float) -> int:
    if third:
        return 131072 if scaled else _LLAMA_3_CONTEXT
    if theta > 10000.0:
        return 16384
    return 2048 if _real(params, "norm_eps", 1e-5) == 1e-6 else 4096


def meta_rows(catalog: Catalog) -> int:
    """Returns the rows of Meta's output matrix over all ranks, of the embedding where there is none; 0 for neither."""
    heads = [entry for name, entry in catalog.entries.items() if _plain(name) == "output.weight"]
    rows = sum(entry.shape[0] for entry in heads if len(entry.shape) == 2)
    embedded = [entry for name, entry in catalog.entries.items() if _plain(name) == "tok_embeddings.weight"]
    by_rows = catalog.facts.get("embedding_dim", 0) == 0
    shapes = [entry.shape for entry in embedded if len(entry.shape) == 2]
    return rows or (sum(shape[0] for shape in shapes) if by_rows else max((shape[0] for shape in shapes), default=0))


def meta_is_tied(catalog: Catalog) -> bool:
    """Whether Meta's files have an embedding and no output matrix."""
    names = {_plain(name) for name in catalog.entries}
    return "tok_embeddings.weight" in names and "output.weight" not in names


def _plain(name: str) -> str:
    """Returns the name without the rank in front: ``00.output.weight``."""
    head, dot, rest = name.partition(".")
    return rest if dot and head.isdecimal() else name


# ---- litgpt


def from_litgpt(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config for litgpt's model_config.yaml (``litgpt/config.py``, ``convert_lit_checkpoint.py``).

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for anything that the LLaMA layout does not have; ``odd-config``.
    """
    for key, expected in (
        ("norm_class_name", "RMSNorm"),
        ("mlp_class_name", "LLaMAMLP"),
        ("rotary_percentage", 1.0),
        ("parallel_residual", False),
        ("lm_head_bias", False),
        ("norm_qk", False),
    ):
        if key in config and config[key] != expected:
            raise _not_llama("model_config.yaml", where, f"{key}: {config[key]!r}", f"{key}: {expected!r}")
    heads, hidden = dimension(config, "n_head", 32, where), dimension(config, "n_embd", 4096, where)
    biased, query_bias = config.get("bias") is True, config.get("attn_bias") is True
    made: JsonObject = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": dimension(config, "head_size", hidden // heads, where),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": dimension(config, "intermediate_size", 11008, where),
        "max_position_embeddings": dimension(config, "block_size", 4096, where),
        "model_type": "qwen2" if query_bias and not biased else "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers({"num_hidden_layers": config.get("n_layer")}, 16, where),
        "num_key_value_heads": dimension(config, "n_query_groups", heads, where),
        "rms_norm_eps": _real(config, "norm_eps", 1e-5),
        "rope_theta": _real(config, "rope_base", 10000.0),
        "tie_word_embeddings": False,
        "vocab_size": dimension(config, "padded_vocab_size", 0, where),
    }
    if biased:
        made |= {"attention_bias": True, "mlp_bias": True}
    return made | _litgpt_rope(config)


def _litgpt_rope(config: Mapping[str, object]) -> JsonObject:
    adjustments = config.get("rope_adjustments")
    if isinstance(adjustments, dict) and "original_max_seq_len" in adjustments:
        kept = {key: value for key, value in adjustments.items() if key != "original_max_seq_len"}
        original = adjustments["original_max_seq_len"]
        return {"rope_scaling": {**_LLAMA_3_ROPE, **kept, "original_max_position_embeddings": original}}
    ratio = _real(config, "rope_condense_ratio", 1.0)
    return {} if ratio == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": ratio}}


# ---- Megatron


def from_megatron(arguments: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config for the ``args`` that Megatron-Core stores (``megatron/training/arguments.py``).

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for another normalisation than RMSNorm; ``odd-config``.
    """
    norm = arguments.get("normalization", "RMSNorm")
    if norm != "RMSNorm" or arguments.get("swiglu") is False:
        found = f"normalization {norm!r}, swiglu {arguments.get('swiglu')!r}"
        raise _not_llama("args in the checkpoint", where, found, "RMSNorm and swiglu")
    heads = dimension(arguments, "num_attention_heads", 32, where)
    hidden = dimension(arguments, "hidden_size", 4096, where)
    grouped = arguments.get("group_query_attention") is not False
    groups = dimension(arguments, "num_query_groups", heads, where) if grouped else heads
    rows = "vocab_size" if isinstance(arguments.get("vocab_size"), int) else "padded_vocab_size"
    epsilon = "norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"
    made: JsonObject = {
        "head_dim": dimension(arguments, "kv_channels", hidden // heads, where),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": dimension(arguments, "ffn_hidden_size", 4 * hidden, where),
        "max_position_embeddings": dimension(arguments, "max_position_embeddings", 4096, where),
        "model_type": "qwen2" if arguments.get("add_qkv_bias") is True else "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers({"num_hidden_layers": arguments.get("num_layers")}, 32, where),
        "num_key_value_heads": groups,
        "rms_norm_eps": _real(arguments, epsilon, 1e-5),
        "rope_theta": _real(arguments, "rotary_base", 10000.0),
        "tie_word_embeddings": arguments.get("untie_embeddings_and_output_weights") is not True,
        "vocab_size": dimension(arguments, rows, 0, where),
    }
    if arguments.get("use_rope_scaling") is True:
        made["rope_scaling"] = _LLAMA_3_ROPE | {
            "factor": _real(arguments, "rope_scaling_factor", 8.0),
            "original_max_position_embeddings": _LLAMA_3_CONTEXT,
        }
    return made


# ---- Phi-3, InternLM2


# What LlamaConfig has no use for, or would misread.
_PHI_ONLY = ("auto_map", "embd_pdrop", "resid_pdrop", "sliding_window")


def from_phi3(config: Mapping[str, object], where: str) -> tuple[JsonObject, tuple[str, ...]]:
    """Returns the config for a Phi-3 whose fused layers are split, and warnings (XTuner's ``convert_phi_to_llama.py``).

    Raises
    ------
    TargetError
        ``unsupported-architecture`` for a rotary embedding of part of each head, which LLaMA does not have.
    """
    rope = config.get("rope_parameters")
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor") if isinstance(rope, dict) else None)
    if partial not in (None, 1, 1.0):
        raise _not_llama("config.json", where, f"partial_rotary_factor {partial!r}", "the whole head rotated")
    kept = {key: value for key, value in config.items() if key not in (*_PHI_ONLY, "partial_rotary_factor")}
    if isinstance(rope, dict):
        kept["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    window = config.get("sliding_window")
    warnings: tuple[str, ...] = ()
    if isinstance(window, int):
        warnings = (
            f"this Phi-3 looks back {window} tokens at most, as a LLaMA at all: the two differ for longer texts",
        )
    return kept | {"model_type": "llama"}, warnings


def from_internlm2(config: Mapping[str, object]) -> JsonObject:
    """Returns the config for an InternLM2 whose fused ``wqkv`` is split: a LLaMA with a bias where it says ``bias``."""
    kept = {key: value for key, value in config.items() if key not in ("auto_map", "bias", "attn_implementation")}
    return kept | {"model_type": "llama", "attention_bias": flag(config, "bias", "InternLM2's config")}


def _real(config: Mapping[str, object], key: str, default: float) -> float:
    return finite(config, key, default, "the checkpoint's own config")


def _not_llama(file: str, where: str, found: str, expected: str) -> TargetError:
    return TargetError(
        "unsupported-architecture",
        f"{file} describes a model that the LLaMA layout cannot hold",
        where=where,
        found=found[:120],
        expected=expected,
    )
