"""Configs of other tools as the config.json that transformers would have for the same model.

Each function is pure: a parsed config in, a Hugging Face config out. Keys that are absent are left out, so that the
checks of ``read_architecture`` speak of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import MAX_RATIO, JsonObject, dimension, finite, layers
from shardmerge.targets.settings import not_understood
from shardmerge.tensors import Catalog

LLAMA_3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3_CONTEXT = 8192

# `ModelArgs` of Meta's LLaMA 1 to 3. LLaMA 4 and the vision models have more, and so has Mistral's own params.json.
_PARAMS = (
    "dim", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "model_parallel_size", "multiple_of", "n_heads",
    "n_kv_heads", "n_layers", "norm_eps", "rope_scale_factor", "rope_theta", "use_scaled_rope", "vocab_size",
)  # fmt: skip

# litgpt's `Config`: what makes another model than LLaMA's, with the value that does not. Its own defaults (GPT-NeoX's)
# are not these, and the first four leave no trace in the tensors: they have to be there.
_LITGPT = {
    "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "parallel_residual": False, "rotary_percentage": 1.0,
    "attention_logit_softcapping": None, "attention_scores_scalar": None, "final_logit_softcapping": None,
    "latent_attention": None, "lm_head_bias": False, "n_expert": 0, "norm_1": True, "norm_2": True, "norm_qk": False,
    "post_attention_norm": False, "post_mlp_norm": False, "rope_indices": None, "rope_interleave": False,
    "rope_local_base_freq": None, "scale_embeddings": False, "shared_attention_norm": False,
}  # fmt: skip
_LITGPT_STATED = 4
# Read, or of no consequence without experts.
_LITGPT_READ = (
    "attn_bias", "bias", "block_size", "first_k_dense_replace", "gelu_approximate", "head_size", "hf_config",
    "intermediate_size", "moe_intermediate_size", "n_embd", "n_expert_groups", "n_expert_per_token", "n_head",
    "n_layer", "n_query_groups", "n_shared_expert", "n_topk_groups", "n_topk_scores_per_group", "name", "norm_eps",
    "norm_qk_type", "norm_topk_prob", "org", "padded_vocab_size", "padding_multiple", "rope_adjustments", "rope_base",
    "rope_condense_ratio", "routed_scaling_factor", "sliding_window_indices", "sliding_window_layer_placing",
    "sliding_window_layer_stride", "sliding_window_size", "vocab_size",
)  # fmt: skip
_ROPE_ADJUSTMENTS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}


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
    if odd := not_understood(params, _PARAMS):
        raise not_llama("params.json", where, shown(odd), "the fields of Meta's LLaMA 1 to 3, and no others")
    dim, heads = dimension(params, "dim", 4096, where), dimension(params, "n_heads", 32, where)
    theta, scaled = real(params, "rope_theta", 10000.0, where), params.get("use_scaled_rope") is True
    stated = params.get("vocab_size")
    rows = stated if isinstance(stated, int) and stated > 0 else vocab_size
    third = is_llama_3(params, rows, where)
    config: JsonObject = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000 if third else 1,
        "eos_token_id": 128001 if third else 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": intermediate_size(params, dim, where),
        "max_position_embeddings": _context(params, where, third=third, scaled=scaled, theta=theta),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers({"num_hidden_layers": params.get("n_layers")}, 32, where),
        "num_key_value_heads": dimension(params, "n_kv_heads", heads, where),
        "rms_norm_eps": real(params, "norm_eps", 1e-5, where),
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": rows,
    }
    if scaled:
        usual = llama_3_scaling(dim)
        usual_factor = float(str(usual["factor"]))
        config["rope_scaling"] = usual | {"factor": real(params, "rope_scale_factor", usual_factor, where)}
    return config


def llama_3_scaling(dim: int) -> JsonObject:
    """Returns the ``rope_scaling`` of LLaMA 3.1 and later, which Meta's code has and params.json only switches on.

    LLaMA 3.2's 1B and 3B stretch by 32, all others by 8.
    """
    return {
        **LLAMA_3_ROPE,
        "factor": 32.0 if dim <= 3072 else 8.0,
        "original_max_position_embeddings": LLAMA_3_CONTEXT,
    }


def is_llama_3(params: Mapping[str, object], vocab_size: int, where: str) -> bool:
    """Whether params.json is a LLaMA 3's."""
    return (
        vocab_size > 100_000 or params.get("use_scaled_rope") is True or real(params, "rope_theta", 0, where) == 500_000
    )


def intermediate_size(params: Mapping[str, object], dim: int, where: str) -> int:
    """Returns the width of the feed-forward layers (``llama/model.py`` of Meta: ``FeedForward``)."""
    multiple = dimension(params, "multiple_of", 256, where)
    multiplier = finite(params, "ffn_dim_multiplier", 1.0, where, above=0.0, most=MAX_RATIO)
    return feed_forward_width(dim, multiplier, multiple)


def feed_forward_width(dim: int, multiplier: float, multiple: int) -> int:
    """Returns two thirds of four times ``dim``, scaled, and rounded up to a multiple."""
    wide = int(multiplier * int(8 * dim / 3))
    return -(-wide // multiple) * multiple


def _context(params: Mapping[str, object], where: str, *, third: bool, scaled: bool, theta: float) -> int:
    if third:
        return 131072 if scaled else LLAMA_3_CONTEXT
    if theta > 10000.0:
        return 16384
    return 2048 if real(params, "norm_eps", 1e-5, where) == 1e-6 else 4096


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
    _check_litgpt(config, where)
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
        "rms_norm_eps": real(config, "norm_eps", 1e-5, where),
        "rope_theta": real(config, "rope_base", 10000.0, where),
        "tie_word_embeddings": False,
        "vocab_size": dimension(config, "padded_vocab_size", 0, where),
    }
    if biased:
        made |= {"attention_bias": True, "mlp_bias": True}
    return made | _litgpt_window(config, where) | _litgpt_rope(config, where)


def _check_litgpt(config: Mapping[str, object], where: str) -> None:
    missing = [key for key in list(_LITGPT)[:_LITGPT_STATED] if key not in config]
    odd = {key: config[key] for key, usual in _LITGPT.items() if key in config and config[key] != usual}
    if odd.get("attention_scores_scalar") == config.get("head_size"):
        odd.pop("attention_scores_scalar", None)
    odd |= not_understood(config, (*_LITGPT, *_LITGPT_READ))
    if "gemma" in str(config.get("name", "")).lower():  # whose RMSNorm adds one to its weight (`norm_class`)
        odd["name"] = config["name"]
    if odd or missing:
        found = shown(odd) if odd else f"no {', '.join(missing)}"
        wanted = ", ".join(f"{key}: {_LITGPT[key]}" for key in (*odd, *missing) if key in _LITGPT)
        raise not_llama("model_config.yaml", where, found, wanted or "the settings of a LLaMA")


def _litgpt_window(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns Mistral's window, which litgpt applies to all layers, some, or none."""
    size, indices = config.get("sliding_window_size"), config.get("sliding_window_indices")
    placing = config.get("sliding_window_layer_placing", config.get("sliding_window_layer_stride"))
    if size is None or (not placing and not (isinstance(indices, list) and any(indices))):
        return {}
    if (
        config.get("bias") is True
        or config.get("attn_bias") is True
        or not (placing in ("all", 1) or (isinstance(indices, list) and all(indices)))
    ):
        raise not_llama(
            "model_config.yaml", where, f"sliding_window_size {shown(size)} of some layers", "of all or none"
        )
    return {"model_type": "mistral", "sliding_window": dimension(config, "sliding_window_size", 0, where)}


def _litgpt_rope(config: Mapping[str, object], where: str) -> JsonObject:
    adjustments = config.get("rope_adjustments")
    if adjustments is not None and (not isinstance(adjustments, dict) or set(adjustments) != _ROPE_ADJUSTMENTS):
        raise not_llama("model_config.yaml", where, f"rope_adjustments {shown(adjustments)}", "those of LLaMA 3.1")
    if isinstance(adjustments, dict):
        kept = {key: value for key, value in adjustments.items() if key != "original_max_seq_len"}
        original = adjustments["original_max_seq_len"]
        return {"rope_scaling": {**LLAMA_3_ROPE, **kept, "original_max_position_embeddings": original}}
    ratio = real(config, "rope_condense_ratio", 1.0, where)
    return {} if ratio == 1.0 else {"rope_scaling": {"rope_type": "linear", "factor": ratio}}


def real(config: Mapping[str, object], key: str, default: float, where: str) -> float:
    """Returns a positive number from a config, ``default`` where it is absent; raises as ``finite``."""
    return finite(config, key, default, where, above=0.0)


def not_llama(file: str, where: str, found: str, expected: str) -> TargetError:
    """Returns the error about a model of another arithmetic than LLaMA's."""
    return TargetError(
        "unsupported-architecture",
        f"{file} describes a model that the LLaMA layout cannot hold",
        where=where,
        found=found[:120],
        expected=expected,
    )
