"""LLaMA and the text models that share its layout: expected names and shapes, and its config as 4.x and 5.x
read it.

Names and shapes follow ``modeling_llama.py``, ``modeling_mistral.py``, ``modeling_qwen2.py``, ``modeling_qwen3.py``,
``modeling_mixtral.py`` and ``modeling_qwen3_moe.py`` of transformers (4.51 to 5.23 agree on what they save); defaults
follow their configuration classes, because a nested config lists only what differs from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.architectures import JsonObject, dimension, flag, layers, portable
from shardmerge.tensors import Shape


@dataclass(frozen=True, slots=True)
class _Family:
    """What sets one model type apart from the others of this layout."""

    vocab_size: int
    intermediate_size: int
    kv_heads: int | None  # None: as many as attention heads
    tokenizer_class: str
    head_dim: int | None = None  # None: the heads share the hidden size


_FAMILIES = {
    "llama": _Family(32000, 11008, None, "LlamaTokenizer"),
    "mistral": _Family(32000, 14336, 8, "LlamaTokenizer"),
    "qwen2": _Family(151936, 22016, 32, "Qwen2Tokenizer"),
    "qwen3": _Family(151936, 22016, 32, "Qwen2Tokenizer", 128),
    "mixtral": _Family(32000, 14336, 8, "LlamaTokenizer"),
    "qwen3_moe": _Family(151936, 6144, 4, "Qwen2Tokenizer"),
}

EVERY = tuple(_FAMILIES)
# Those that are parts of vision-language models, too, whose nested configs leave defaults out.
SUPPORTED = ("llama", "mistral", "qwen2")

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a layer, and how transformers calls them in the files it saves.

    Attributes
    ----------
    count, width
        How many, and the rows of each gate.
    block
        The module they are in, the router's ``gate`` among them.
    gate, up, down
        The three matrices of one.
    """

    count: int
    width: int
    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class TextArchitecture:
    """The sizes of a text model.

    Attributes
    ----------
    qkv_bias, output_bias, mlp_bias
        Which linear layers have a bias.
    qk_norm
        Whether each head of queries and keys is normalized.
    experts
        In the place of one feed-forward layer; None for that.
    tied
        ``lm_head`` is the embedding.
    tokenizer_class
        What transformers takes for this model type where tokenizer_config.json names no class.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: Experts | None
    tied: bool
    tokenizer_class: str


def read_architecture(config: Mapping[str, object], where: str, known: Sequence[str] = SUPPORTED) -> TextArchitecture:
    """Returns the sizes that a text model's config implies; ``known`` are the model types that the caller can use.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, or ``odd-config`` for a size that is no size.
    """
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or not isinstance(model_type, str) or model_type not in known:
        raise _unsupported(model_type, where, known)
    _check_classes(config, model_type, where)
    hidden, heads = (
        dimension(config, "hidden_size", 4096, where),
        dimension(config, "num_attention_heads", 32, where),
    )
    attention_bias = model_type in _WITH_ATTENTION_BIAS and flag(config, "attention_bias", where)
    return TextArchitecture(
        model_type=model_type,
        vocab_size=dimension(config, "vocab_size", family.vocab_size, where),
        hidden_size=hidden,
        intermediate_size=dimension(config, "intermediate_size", family.intermediate_size, where),
        num_layers=layers(config, 32, where),
        heads=heads,
        kv_heads=_kv_heads(config, family, heads, where),
        head_dim=dimension(config, "head_dim", family.head_dim or hidden // heads, where),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and flag(config, "mlp_bias", where),
        qk_norm=model_type.startswith("qwen3"),
        experts=_experts(config, model_type, where),
        tied=flag(config, "tie_word_embeddings", where),
        tokenizer_class=family.tokenizer_class,
    )


_WITH_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe")


def _experts(config: Mapping[str, object], model_type: str, where: str) -> Experts | None:
    if model_type == "mixtral":
        count = dimension(config, "num_local_experts", 8, where)
        return Experts(
            count, dimension(config, "intermediate_size", 14336, where), "block_sparse_moe", "w1", "w3", "w2"
        )
    if model_type != "qwen3_moe":
        return None
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise TargetError(
            "unsupported-architecture",
            "some layers have experts and others have none",
            where=where,
            found=f"mlp_only_layers {shown(config.get('mlp_only_layers'))}, "
            f"decoder_sparse_step {shown(config.get('decoder_sparse_step', 1))}",
            expected="experts in every layer",
        )
    # transformers 5 saves what the hub's files call `num_experts` as `num_local_experts`
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    count = dimension(config, key, 128, where)
    width = dimension(config, "moe_intermediate_size", 768, where)
    return Experts(count, width, "mlp", "gate_proj", "up_proj", "down_proj")


def _kv_heads(config: Mapping[str, object], family: _Family, heads: int, where: str) -> int:
    """An absent key means the family's default, a null one means no grouping."""
    absent = family.kv_heads if "num_key_value_heads" not in config else None
    return dimension(config, "num_key_value_heads", absent or heads, where)


def _unsupported(model_type: object, where: str, known: Sequence[str]) -> TargetError:
    return TargetError(
        "unsupported-architecture",
        "the text model's architecture is not one whose tensors are known here",
        where=where,
        found=f"model_type {shown(model_type)}",
        expected=f"model_type {', '.join(known)}",
        hint="split its fused layers to the LLaMA layout first: --use llama/phi3-to-llama"
        if model_type == "phi3"
        else "",
    )


def _check_classes(config: Mapping[str, object], model_type: str, where: str) -> None:
    """Checks that ``architectures`` does not name another family than ``model_type``: Granite has LLaMA's names too."""
    stated = config.get("architectures")
    classes = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    family = model_type.replace("_", "")
    odd = [name for name in classes if not re.match(rf"{family}(?!moe|vl|audio|_|\d)", name, re.IGNORECASE)]
    if odd:
        raise TargetError(
            "unsupported-architecture",
            "the config names a class of another family than its model_type",
            where=where,
            found=f"model_type {shown(model_type)}, architectures {shown(odd)}",
            expected=f"a class of {model_type}",
            hint=f"correct `architectures` or `model_type`, whichever is wrong, in {where}",
        )


def expected(text: TextArchitecture, rows: int) -> Iterator[tuple[str, Shape]]:
    """Yields every name of the model with its shape, the vocabulary having ``rows`` rows; ``lm_head`` unless
    tied.
    """
    yield "model.embed_tokens.weight", (rows, text.hidden_size)
    for index in range(text.num_layers):
        for name, shape in _layer(text):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (text.hidden_size,)
    if not text.tied:
        yield "lm_head.weight", (rows, text.hidden_size)


def _layer(text: TextArchitecture) -> Iterator[tuple[str, Shape]]:
    hidden, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield from _linear(f"self_attn.{name}", rows, hidden, bias=text.qkv_bias)
    yield from _linear("self_attn.o_proj", hidden, queries, bias=text.output_bias)
    for name in ("q_norm", "k_norm") if text.qk_norm else ():
        yield f"self_attn.{name}.weight", (text.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    if text.experts:
        yield from _expert_tensors(text.experts, hidden)
        return
    for name, rows, columns in (
        ("gate_proj", inner, hidden),
        ("up_proj", inner, hidden),
        ("down_proj", hidden, inner),
    ):
        yield from _linear(f"mlp.{name}", rows, columns, bias=text.mlp_bias)


def _expert_tensors(experts: Experts, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield f"{experts.block}.gate.weight", (experts.count, hidden)
    for index in range(experts.count):
        for name in (experts.gate, experts.up):
            yield f"{experts.block}.experts.{index}.{name}.weight", (experts.width, hidden)
        yield f"{experts.block}.experts.{index}.{experts.down}.weight", (hidden, experts.width)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def text_config(config: Mapping[str, object], text: TextArchitecture, rows: int, dtype: str, where: str) -> JsonObject:
    """Returns the ``text_config`` of a LLaVA config.json, the vocabulary having ``rows`` rows."""
    nested = portable(with_v4_rope(config, where), dtype)
    stated = {
        "model_type": text.model_type,
        "num_key_value_heads": text.kv_heads,  # null is fine with 4.x, and refused by 5.x for mistral
        "tie_word_embeddings": text.tied,
        "vocab_size": rows,
    }
    return nested | stated


def with_v4_rope(config: Mapping[str, object], where: str) -> JsonObject:
    """Returns the config with ``rope_theta`` and ``rope_scaling`` in place of ``rope_parameters``.

    Transformers 5 saves ``rope_parameters`` only, which 4.x ignores without a word and takes theta 10000,
    where LLaMA-3 has 500000. The 4.x keys are read by both. Precedence as in 5.x
    (``convert_rope_params_to_dict``): ``rope_scaling`` before ``rope_parameters``, a theta inside of either
    before the one beside it.
    """
    plain = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise TargetError(
            "odd-config",
            "the rotary embedding in config.json is not one setting for all layers",
            where=where,
            found=repr(rope)[:120],
            expected="`rope_theta` and `rope_scaling`, or one flat `rope_parameters`",
        )
    scaling = dict(rope)
    for key, default in (("rope_theta", _DEFAULT_THETA), ("partial_rotary_factor", None)):
        value = scaling.pop(key, plain.get(key, default))
        if value is not None:
            plain[key] = value
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return plain
    return plain | {"rope_scaling": scaling}
