"""The config.json of an original InternVLChat, and its InternViT as transformers describes it.

Fields are those of OpenGVLab's ``configuration_internvl_chat.py`` and ``configuration_intern_vit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.config_numbers import JsonObject, dimension, flag, is_real, is_whole
from shardmerge.targets.settings import refuse_unknown_around

# Read here, or of no consequence for what the model computes: prompts, tiles, training.
_WHOLE = (
    "downsample_ratio", "dynamic_image_size", "force_image_size", "hidden_size", "image_fold", "initializer_range",
    "llm_config", "max_dynamic_patch", "min_dynamic_patch", "pad2square", "ps_version", "select_layer",
    "system_message", "template", "use_backbone_lora", "use_llm_lora", "use_thumbnail", "vision_config", "vocab_size",
)  # fmt: skip

# Fields of the vision part that describe training, or another class's code.
_DROPPED = (
    "auto_map", "bias", "drop_path_rate", "dropout", "initializer_factor", "laux_allreduce", "model_type",
    "moe_config", "noisy_gate_policy", "qkv_bias", "qk_normalization", "use_bfloat16", "use_flash_attn",
    "attention_probs_dropout_prob", "attention_dropout", "output_attentions", "output_hidden_states",
)  # fmt: skip
_NORMS = ("layer_norm", "rms_norm")
# A token takes in so many patches along each side at most.
_LEAST_RATIO = 1 / 64
# InternVLVisionRMSNorm of transformers has this one for q and k, whatever the config says.
_QK_EPSILON = 1e-6


def check_whole(whole: Mapping[str, object], where: str) -> None:
    """Checks that a config is an InternVLChat's, with settings that are known.

    Raises
    ------
    TargetError
        ``unsupported-architecture``.
    """
    classes = whole.get("architectures")
    others = [name for name in classes if name != "InternVLChatModel"] if isinstance(classes, list) else []
    if whole.get("model_type") != "internvl_chat" or others:
        raise _unsupported(f"model_type {shown(whole.get('model_type'))}, architectures {shown(classes)}", where)
    refuse_unknown_around(whole, _WHOLE, "a plain internvl_chat", where)


def vision_config(config: Mapping[str, object], whole: Mapping[str, object], where: str) -> JsonObject:
    """Returns the ``vision_config`` of transformers' InternVL for that of an InternVLChat.

    All is stated, since the two have other defaults, and the heads are the one number of which no tensor tells. What is
    not said is as in InternViT-300M; the tensors would tell otherwise.

    Raises
    ------
    TargetError
        ``unsupported-architecture``: another encoder, or one that transformers' InternVL cannot be. ``odd-config``.
    """
    norm, kind = config.get("norm_type", "layer_norm"), config.get("model_type", "intern_vit_6b")
    if kind != "intern_vit_6b" or norm not in _NORMS:
        found = f"vision_config: model_type {shown(kind)}, norm_type {shown(norm)}"
        raise _unsupported(found, where, f"model_type 'intern_vit_6b', norm_type {' or '.join(map(repr, _NORMS))}")
    qk_norm = flag(config, "qk_normalization", where)
    if qk_norm and config.get("layer_norm_eps", _QK_EPSILON) != _QK_EPSILON:
        found = f"qk_normalization with layer_norm_eps {shown(config['layer_norm_eps'])}"
        raise _unsupported(found, where, f"layer_norm_eps {_QK_EPSILON}")
    image = dimension(whole, "force_image_size", dimension(config, "image_size", 448, where), where)
    patch = dimension(config, "patch_size", 14, where)
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    return (
        {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_attention_heads": 25}
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "norm_type": norm}
        | kept
        | {
            "attention_bias": flag({"qkv_bias": config.get("qkv_bias", True)}, "qkv_bias", where),
            "image_size": [image, image],
            "model_type": "internvl_vision",
            "patch_size": [patch, patch],
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            "use_qk_norm": qk_norm,
        }
    )


def read_shuffle(whole: Mapping[str, object], where: str) -> tuple[int, tuple[str, ...]]:
    """Returns how many patches a token takes in along each side, 1 / downsample_ratio, and warnings.

    Raises
    ------
    TargetError
        ``odd-config``; ``unsupported-architecture`` for the shuffle of ``ps_version: v1``, which leaves the tokens
        transposed, where transformers has v2.
    """
    ratio = whole.get("downsample_ratio", 0.5)
    if not is_real(ratio) or not _LEAST_RATIO <= ratio <= 1 or round(1 / ratio) * ratio != 1:
        raise TargetError(
            "odd-config",
            "`downsample_ratio` in config.json cannot be used",
            where=where,
            found=shown(ratio),
            expected="one over a whole number, e.g. 0.5",
        )
    layer = whole.get("select_layer", -1)
    if not is_whole(layer):
        raise TargetError("odd-config", "`select_layer` in config.json cannot be used", where=where, found=shown(layer))
    version = whole.get("ps_version")
    if version not in (None, "v2"):
        raise _unsupported(f"ps_version {shown(version)}", where, "ps_version 'v2'")
    warning = f"{where} does not say `ps_version`: v2 is assumed, as every InternVL since 1.5 has it"
    return round(1 / ratio), () if version else (warning,)


def _unsupported(
    found: str, where: str, expected: str = "model_type 'internvl_chat', InternVLChatModel"
) -> TargetError:
    return TargetError(
        "unsupported-architecture",
        "the config is not one of an original InternVLChat that transformers' InternVL can be",
        where=where,
        found=found,
        expected=expected,
    )
