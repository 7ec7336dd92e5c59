"""Saves tiny models of every class that has a table, by the installed transformers, and says what the files hold.

Run by the Python of each environment, alone: it knows nothing of shardmerge. stdout is one JSON object: a list of
cases, each with what is in config.json and the names and shapes of the file, or null for a class that this version
lacks; and what the configuration classes have as defaults.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

EAGER = "eager"  # Gemma 2 caps its attention in that alone, with some versions

# Sizes of which no two are alike, so that a size read at a wrong place is seen.
TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
WORDS: dict[str, Any] = {
    "hidden_size": 15, "intermediate_size": 22, "num_hidden_layers": 1, "num_attention_heads": 5, "vocab_size": 33,
    "max_position_embeddings": 17,
}  # fmt: skip
NO_SIZE = {key: value for key, value in EYE.items() if key != "image_size"}  # SigLIP 2 takes any
PAIR = {"text_config": WORDS, "vision_config": EYE}
PAIR_2 = {"text_config": WORDS, "vision_config": {**NO_SIZE, "num_patches": 9}}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    **TEXT, **EXPERTS, "num_hidden_layers": 3, "n_routed_experts": 3, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 6, "q_lora_rank": 10, "kv_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "first_k_dense_replace": 1,
}  # fmt: skip
TIED, BIAS, ONE_HEAD = {"tie_word_embeddings": True}, {"attention_bias": True}, {"num_key_value_heads": 1}
UNTIED, WIDE = {"tie_word_embeddings": False}, {"head_dim": 10}
CLIP_EYE = {"model_type": "clip_vision_model", **EYE}
LLAVA = {
    "text_config": {"model_type": "llama", **TEXT}, "vision_config": CLIP_EYE, "image_token_index": 7, **UNTIED,
}  # fmt: skip
QWEN_SIGLIP = {
    **LLAVA, "text_config": {"model_type": "qwen2", **TEXT, **TIED}, **TIED,
    "vision_config": {"model_type": "siglip_vision_model", **EYE}, "vision_feature_layer": [-2, -1],
}  # fmt: skip
INTERN_EYE = {"model_type": "internvl_vision", **EYE, "image_size": [28, 28], "patch_size": [7, 7]}
INTERNVL = {"text_config": {"model_type": "qwen2", **TEXT}, "vision_config": INTERN_EYE, **UNTIED}

# Model type: configuration class, class, sizes of each case. Classes with nothing of their own have one case.
CASES: dict[str, tuple[str, dict[str, tuple[dict[str, Any], ...]]]] = {
    "llama": ("LlamaConfig", {
        "LlamaForCausalLM": (TEXT, TEXT | TIED, TEXT | BIAS, TEXT | ONE_HEAD, TEXT | WIDE, TEXT | {"mlp_bias": True}),
        "LlamaModel": (TEXT,),
        "LlamaForSequenceClassification": (TEXT | {"num_labels": 4},),
        "LlamaForTokenClassification": (TEXT | {"num_labels": 1},),
    }),
    "mistral": ("MistralConfig", {
        "MistralForCausalLM": (TEXT, TEXT | TIED, TEXT | WIDE, TEXT | {"num_key_value_heads": None}),
        "MistralModel": (TEXT,),
        "MistralForSequenceClassification": (TEXT,),
        "MistralForTokenClassification": (TEXT,),
    }),
    "mixtral": ("MixtralConfig", {
        "MixtralForCausalLM": (TEXT | {"num_local_experts": 3}, TEXT | WIDE | TIED | {"num_local_experts": 2}),
        "MixtralModel": (TEXT,),
        "MixtralForSequenceClassification": (TEXT,),
        "MixtralForTokenClassification": (TEXT,),
    }),
    "qwen2": ("Qwen2Config", {
        "Qwen2ForCausalLM": (TEXT, TEXT | TIED, TEXT | {"num_key_value_heads": None}),
        "Qwen2Model": (TEXT,),
        "Qwen2ForSequenceClassification": (TEXT,),
        "Qwen2ForTokenClassification": (TEXT,),
    }),
    "qwen3": ("Qwen3Config", {
        "Qwen3ForCausalLM": (TEXT, TEXT | TIED | WIDE, TEXT | BIAS),
        "Qwen3Model": (TEXT,),
        "Qwen3ForSequenceClassification": (TEXT,),
        "Qwen3ForTokenClassification": (TEXT,),
    }),
    "qwen3_moe": ("Qwen3MoeConfig", {
        "Qwen3MoeForCausalLM": (
            TEXT | EXPERTS | {"num_experts": 3},
            TEXT | EXPERTS | WIDE | BIAS | {"num_experts": 2, "mlp_only_layers": [0]},
            TEXT | EXPERTS | TIED | {"num_experts": 2, "decoder_sparse_step": 2, "num_hidden_layers": 5},
        ),
        "Qwen3MoeModel": (TEXT | EXPERTS | {"num_experts": 3},),
        "Qwen3MoeForSequenceClassification": (TEXT | EXPERTS | {"num_experts": 3},),
        "Qwen3MoeForTokenClassification": (TEXT | EXPERTS | {"num_experts": 3},),
    }),
    "gemma": ("GemmaConfig", {
        "GemmaForCausalLM": (TEXT, TEXT | UNTIED | WIDE, TEXT | BIAS | ONE_HEAD),
        "GemmaModel": (TEXT | WIDE,),
        "GemmaForSequenceClassification": (TEXT | WIDE,),
        "GemmaForTokenClassification": (TEXT | WIDE,),
    }),
    "gemma2": ("Gemma2Config", {
        "Gemma2ForCausalLM": (TEXT | WIDE, TEXT | UNTIED, TEXT | BIAS | ONE_HEAD),
        "Gemma2Model": (TEXT | WIDE,),
        "Gemma2ForSequenceClassification": (TEXT | WIDE,),
        "Gemma2ForTokenClassification": (TEXT | WIDE,),
    }),
    "gemma3_text": ("Gemma3TextConfig", {
        "Gemma3ForCausalLM": (TEXT | WIDE, TEXT | UNTIED, TEXT | BIAS | {"num_hidden_layers": 7}),
        "Gemma3TextModel": (TEXT | WIDE,),
        "Gemma3TextForSequenceClassification": (TEXT | WIDE,),
    }),
    "phi3": ("Phi3Config", {
        "Phi3ForCausalLM": (TEXT, TEXT | TIED, TEXT | {"num_key_value_heads": None}),
        "Phi3Model": (TEXT,),
        "Phi3ForSequenceClassification": (TEXT,),
        "Phi3ForTokenClassification": (TEXT,),
    }),
    "granite": ("GraniteConfig", {
        "GraniteForCausalLM": (TEXT, TEXT | TIED | BIAS, TEXT | {"mlp_bias": True, "embedding_multiplier": 12.0}),
        "GraniteModel": (TEXT,),
    }),
    "olmo2": ("Olmo2Config", {
        "Olmo2ForCausalLM": (TEXT, TEXT | TIED | BIAS, TEXT | ONE_HEAD),
        "Olmo2Model": (TEXT,),
    }),
    "deepseek_v3": ("DeepseekV3Config", {
        "DeepseekV3ForCausalLM": (
            DEEPSEEK,
            DEEPSEEK | BIAS | {"n_shared_experts": 2, "first_k_dense_replace": 0},
            DEEPSEEK | TIED | {"q_lora_rank": None, "first_k_dense_replace": 3},
        ),
        "DeepseekV3Model": (DEEPSEEK,),
        "DeepseekV3ForSequenceClassification": (DEEPSEEK,),
        "DeepseekV3ForTokenClassification": (DEEPSEEK,),
    }),
    "clip_vision_model": ("CLIPVisionConfig", {
        "CLIPVisionModel": (EYE, EYE | {"num_channels": 1, "image_size": 30}),
        "CLIPVisionModelWithProjection": (EYE | {"projection_dim": 13},),
    }),
    "clip_text_model": ("CLIPTextConfig", {
        "CLIPTextModel": (WORDS,),
        "CLIPTextModelWithProjection": (WORDS | {"projection_dim": 13},),
    }),
    "clip": ("CLIPConfig", {"CLIPModel": (PAIR, PAIR | {"projection_dim": 13})}),
    "siglip_vision_model": ("SiglipVisionConfig", {
        "SiglipVisionModel": (EYE, EYE | {"num_channels": 1, "image_size": 30, "vision_use_head": False}),
    }),
    "siglip_text_model": ("SiglipTextConfig", {"SiglipTextModel": (WORDS, WORDS | {"projection_size": 9})}),
    "siglip": ("SiglipConfig", {"SiglipModel": (PAIR,)}),
    "siglip2_vision_model": ("Siglip2VisionConfig", {
        "Siglip2VisionModel": (NO_SIZE, NO_SIZE | {"num_patches": 9, "num_channels": 1}),
    }),
    "siglip2_text_model": ("Siglip2TextConfig", {"Siglip2TextModel": (WORDS,)}),
    "siglip2": ("Siglip2Config", {"Siglip2Model": (PAIR_2,)}),
    "dinov2": ("Dinov2Config", {
        "Dinov2Model": (EYE, EYE | {"use_swiglu_ffn": True, "qkv_bias": False, "use_mask_token": False}),
        "Dinov2Backbone": (EYE | {"mlp_ratio": 3},),
        "Dinov2ForImageClassification": (EYE | {"num_labels": 4},),
    }),
    "internvl_vision": ("InternVLVisionConfig", {
        "InternVLVisionModel": (
            INTERN_EYE,
            INTERN_EYE | BIAS | {"use_qk_norm": True, "norm_type": "rms_norm", "use_mask_token": True},
            INTERN_EYE | {"use_absolute_position_embeddings": False, "use_mean_pooling": False},
        ),
    }),
    "internvl": ("InternVLConfig", {
        "InternVLForConditionalGeneration": (INTERNVL, INTERNVL | {"downsample_ratio": 0.25}),
    }),
    "llava": ("LlavaConfig", {
        "LlavaForConditionalGeneration": (LLAVA, QWEN_SIGLIP, LLAVA | {"multimodal_projector_bias": False}),
    }),
    "llava_next": ("LlavaNextConfig", {
        "LlavaNextForConditionalGeneration": (LLAVA | {"image_grid_pinpoints": [[28, 56]]},),
    }),
    "llava_onevision": ("LlavaOnevisionConfig", {
        "LlavaOnevisionForConditionalGeneration": (QWEN_SIGLIP | {"image_grid_pinpoints": [[28, 56]]},),
    }),
}  # fmt: skip

# Settings that no tensor shows, other than any class has them: a config that loses one gives other logits.
NO_DEFAULTS: dict[str, Any] = {"rope_theta": 50.0, "rms_norm_eps": 1e-2}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 5, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "rope_local_base_freq": 20.0},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "deepseek_v3": {"routed_scaling_factor": 1.5},
}


def held(kind: str, config_class: str, sizes: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Returns what the directory of a saved model holds, None where this version lacks the class, or refuses."""
    import transformers
    from safetensors import safe_open

    if not hasattr(transformers, kind):
        return None
    folder.mkdir()
    try:
        config = getattr(transformers, config_class)(**json.loads(json.dumps(sizes)))
        model = getattr(transformers, kind)(config)
    except Exception as error:  # noqa: BLE001  # whatever its validation raises
        print(f"{kind} {sizes}: {error}", file=sys.stderr)
        return None
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    memory = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {"config": json.loads((folder / "config.json").read_text("utf-8")), "files": tensors, "memory": memory}


def defaults(config_class: str) -> dict[str, Any] | None:
    """Returns what a configuration class has where nothing is said."""
    import transformers

    made = getattr(transformers, config_class, None)
    return made().to_dict() if made else None


def keep(folder: Path) -> None:
    """Saves a causal model of each text family that this version has, and the logits of a few tokens."""
    import torch
    import transformers
    from safetensors.torch import save_file

    for model_type, (config_class, kinds) in CASES.items():
        kind, cases = next(iter(kinds.items()))
        if kind.endswith("ForCausalLM") and hasattr(transformers, kind):
            torch.manual_seed(1)
            sizes = cases[0] | NO_DEFAULTS | OWN_SETTINGS.get(model_type, {})
            config = getattr(transformers, config_class)(**sizes, attn_implementation=EAGER)
            model = getattr(transformers, kind)(config).eval()
            for parameter in model.parameters():  # large enough that each setting shows in the logits
                torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / model_type)
            save_file({"logits": logits(model)}, folder / model_type / "logits.st")


def logits(model: Any) -> Any:
    """Returns what a model makes of a few tokens."""
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 40).reshape(1, -1)).logits.contiguous()


def load(folder: Path) -> dict[str, Any]:
    """Loads every directory in a folder; returns what is missing or left over, and how far the logits are off."""
    import transformers
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, attn_implementation=EAGER
        )
        keys = [sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
        expected = load_file(place / "logits.st")["logits"]
        found[place.name] = (keys, float((logits(model.eval()) - expected).abs().max() / expected.abs().max()))
    return found


def main() -> None:
    """Writes what the installed version does: ``[save FOLDER | load FOLDER]``."""
    import transformers

    transformers.logging.set_verbosity_error()
    match sys.argv[1:]:
        case ["load", folder]:
            with contextlib.redirect_stdout(sys.stderr):
                loaded = load(Path(folder))
            sys.stdout.write(json.dumps(loaded))
            return
        case ["save", folder]:
            keep(Path(folder))
    found: dict[str, Any] = {"cases": [], "defaults": {}}
    with tempfile.TemporaryDirectory() as top, contextlib.redirect_stdout(sys.stderr):
        for config_class, kinds in CASES.values():
            for kind, cases in kinds.items():
                found["cases"] += [
                    (kind, number, held(kind, config_class, sizes, Path(top, f"{kind}{number}")))
                    for number, sizes in enumerate(cases)
                ]
        found["defaults"] = {model_type: defaults(config_class) for model_type, (config_class, _) in CASES.items()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
