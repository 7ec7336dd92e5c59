"""Makes the golden InternVL checkpoints in OpenGVLab's names and their truth in transformers' names.

    python make_layouts_internvl.py --out DIR

OpenGVLab's model code is on the model hub alone, so source/ is random tensors in its names and shapes. The rules are
those of transformers' convert_internvl_weights_to_hf.py (huggingface/transformers, commit 015d3b27,
src/transformers/models/internvl/): its three tables of names, attn.qkv in thirds, and wqkv as [key-value heads, heads
per key-value head + 2, head_dim] with q first, then k, then v. The truth is loaded into
InternVLForConditionalGeneration with nothing missing and nothing unexpected, and saved by it again with the same bits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from typing import Any

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, contiguous, fresh, is_norm, random_tensor, same_bits, versions
from layouts import write_case, write_truth
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

HEADS, KV_HEADS, HEAD, INTERMEDIATE = 4, 2, 8, 96
VIT, VIT_HEADS, VIT_INTERMEDIATE, IMAGE, PATCH = 24, 3, 48, 28, 7
NAMES = {  # of a whole name or a part of it between dots
    "mlp1.0.": "multi_modal_projector.layer_norm.",
    "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2.",
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.": "vision_tower.embeddings.patch_embeddings.projection.",
    "vision_model.encoder.layers.": "vision_tower.encoder.layer.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".tok_embeddings.": ".embed_tokens.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    "language_model.output.": "language_model.lm_head.",
}


def vision_shapes(big: bool) -> dict[str, tuple[int, ...]]:
    """InternViT; the big one (6B) has q_norm and k_norm, RMSNorm and no bias of qkv."""
    tokens = (IMAGE // PATCH) ** 2 + 1
    root = "vision_model.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        root + "class_embedding": (1, 1, VIT), root + "position_embedding": (1, tokens, VIT),
        root + "patch_embedding.weight": (VIT, 3, PATCH, PATCH), root + "patch_embedding.bias": (VIT,),
    }  # fmt: skip
    for layer in range(LAYERS):
        here = f"vision_model.encoder.layers.{layer}."
        shapes |= {here + "ls1": (VIT,), here + "ls2": (VIT,), here + "attn.qkv.weight": (3 * VIT, VIT)}
        shapes |= {here + "attn.proj.weight": (VIT, VIT), here + "attn.proj.bias": (VIT,)}
        shapes |= {here + "mlp.fc1.weight": (VIT_INTERMEDIATE, VIT), here + "mlp.fc1.bias": (VIT_INTERMEDIATE,)}
        shapes |= {here + "mlp.fc2.weight": (VIT, VIT_INTERMEDIATE), here + "mlp.fc2.bias": (VIT,)}
        shapes |= {here + "norm1.weight": (VIT,), here + "norm2.weight": (VIT,)}
        if big:
            shapes |= {here + "attn.q_norm.weight": (VIT,), here + "attn.k_norm.weight": (VIT,)}
        else:
            shapes |= {here + "attn.qkv.bias": (3 * VIT,), here + "norm1.bias": (VIT,), here + "norm2.bias": (VIT,)}
    shapes |= {"mlp1.0.weight": (4 * VIT,), "mlp1.0.bias": (4 * VIT,), "mlp1.1.weight": (HIDDEN, 4 * VIT)}
    return shapes | {"mlp1.1.bias": (HIDDEN,), "mlp1.3.weight": (HIDDEN, HIDDEN), "mlp1.3.bias": (HIDDEN,)}


def internlm2_shapes() -> dict[str, tuple[int, ...]]:
    root = "language_model.model."
    shapes: dict[str, tuple[int, ...]] = {root + "tok_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        here = f"{root}layers.{layer}."
        shapes |= {
            here + "attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
            here + "attention.wo.weight": (HIDDEN, HIDDEN), here + "feed_forward.w1.weight": (INTERMEDIATE, HIDDEN),
            here + "feed_forward.w2.weight": (HIDDEN, INTERMEDIATE),
            here + "feed_forward.w3.weight": (INTERMEDIATE, HIDDEN), here + "attention_norm.weight": (HIDDEN,),
            here + "ffn_norm.weight": (HIDDEN,),
        }  # fmt: skip
    return shapes | {root + "norm.weight": (HIDDEN,), "language_model.output.weight": (VOCAB, HIDDEN)}


def qwen2_shapes() -> dict[str, tuple[int, ...]]:
    root, kv = "language_model.model.", KV_HEADS * HEAD
    shapes: dict[str, tuple[int, ...]] = {root + "embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        here = f"{root}layers.{layer}."
        for letter, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            shapes |= {f"{here}self_attn.{letter}_proj.weight": (rows, HIDDEN)}
            shapes |= {f"{here}self_attn.{letter}_proj.bias": (rows,)}
        shapes |= {
            here + "self_attn.o_proj.weight": (HIDDEN, HIDDEN), here + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            here + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN), here + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            here + "input_layernorm.weight": (HIDDEN,), here + "post_attention_layernorm.weight": (HIDDEN,),
        }  # fmt: skip
    return shapes | {root + "norm.weight": (HIDDEN,), "language_model.lm_head.weight": (VOCAB, HIDDEN)}


def renamed(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    truth = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                truth[renamed(name).replace("attention.qkv", f"attention.{letter}_proj")] = part
        elif ".attention.wqkv." in name:
            groups = tensor.unflatten(0, (KV_HEADS, HEADS // KV_HEADS + 2, HEAD))
            for letter, part in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
                target = renamed(name).replace("attention.wqkv", f"self_attn.{letter}_proj")
                truth[target] = part.reshape(-1, HIDDEN)
        else:
            truth[renamed(name)] = tensor
    return contiguous(truth)


def configs(big: bool) -> tuple[dict[str, Any], InternVLConfig]:
    """OpenGVLab's config.json (what of it the conversion reads) and that of transformers."""
    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": VIT, "intermediate_size": VIT_INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": VIT_HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm" if big else "layer_norm",
    }  # fmt: skip
    kind = {"architectures": ["Qwen2ForCausalLM" if big else "InternLM2ForCausalLM"]}
    kind |= {"model_type": "qwen2" if big else "internlm2"}
    theirs = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "select_layer": -1, "torch_dtype": "bfloat16", "llm_config": text | kind,
        "vision_config": vision | {"image_size": IMAGE, "patch_size": PATCH, "qk_normalization": big,
                                   "qkv_bias": not big, "architectures": ["InternVisionModel"],
                                   "model_type": "intern_vit_6b"},
    }  # fmt: skip
    ours = InternVLConfig(
        text_config=text | {"model_type": "qwen2" if big else "llama"},
        vision_config=vision | {
            "model_type": "internvl_vision", "image_size": [IMAGE, IMAGE], "patch_size": [PATCH, PATCH],
            "use_qk_norm": big, "attention_bias": not big, "use_absolute_position_embeddings": True,
        },
        image_token_id=VOCAB - 2, architectures=["InternVLForConditionalGeneration"], tie_word_embeddings=False,
    )  # fmt: skip
    ours.dtype = "bfloat16"
    return theirs, ours


def loaded_and_saved(truth: dict[str, torch.Tensor], config: InternVLConfig) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        save_file(truth, pathlib.Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(scratch)
        model, told = InternVLForConditionalGeneration.from_pretrained(
            scratch, dtype=torch.bfloat16, output_loading_info=True
        )
        if told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]:
            raise SystemExit(f"{told}")
        model.save_pretrained(scratch + "/again")
        return load_file(scratch + "/again/model.safetensors")


def make(out: pathlib.Path, name: str, big: bool) -> None:
    case = fresh(out, name)
    shapes = vision_shapes(big) | (qwen2_shapes() if big else internlm2_shapes())
    state = {
        key: random_tensor(f"{name}/{key}", shape, torch.bfloat16, is_norm(key) or key.endswith(("mlp1.0.weight")))
        for key, shape in shapes.items()
    }
    all_distinct(state)
    theirs, ours = configs(big)
    save_file(state, case / "source" / "model.safetensors", metadata={"format": "pt"})
    (case / "source" / "config.json").write_text(json.dumps(theirs, indent=1) + "\n")
    truth = convert(state)
    all_distinct(truth)
    same_bits(loaded_and_saved(truth, ours), truth)
    write_truth(case, truth, ours)
    write_case(
        case, tool="transformers convert_internvl_weights_to_hf.py (its rules, written again)",
        made_with=versions("transformers", "safetensors"), function="make_layouts_internvl.convert", entry="",
        forward=True, backward=False,
        checks={"from_pretrained_then_save_pretrained": "nothing missing or unexpected, bit-equal to truth"},
        sizes={
            "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD, "hidden": HIDDEN, "intermediate": INTERMEDIATE,
            "layers": LAYERS, "vocab": VOCAB, "vision_hidden": VIT, "vision_layers": LAYERS,
        },
        notes=[
            "no source model: OpenGVLab's code is not in a package; the order of q, k and v is the script's alone",
            "InternViT-6B style: q_norm, k_norm, no bias of qkv; Qwen2 language model" if big
            else "InternViT-300M style; InternLM2 language model with wqkv, Llama in the truth",
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    make(arguments.out, "internvl_internlm2", big=False)
    make(arguments.out, "internvl_qwen2", big=True)


if __name__ == "__main__":
    main()
