"""Makes the golden open_clip checkpoint and its Hugging Face truth.

    python make_layouts_clip.py --out DIR

source/ is open_clip's own CLIP with random weights, truth/ what the copy functions of transformers'
convert_clip_original_pytorch_to_hf.py make of it; the script's own comparison wants full sizes and is replaced by one of
the image and the text features. torchvision and OpenAI's `clip` are stand-ins: imported, never called.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import torch
from layouts import all_distinct, contiguous, fresh, generator, largest_difference, randomize, stand_in, versions
from layouts import write_case, write_truth

stand_in("torchvision")
stand_in("clip")

import open_clip  # noqa: E402
from transformers import CLIPConfig, CLIPModel  # noqa: E402
from transformers.models.clip import convert_clip_original_pytorch_to_hf as script  # noqa: E402

EMBED = 20
VISION = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 99, "width": 24, "heads": 3, "layers": 2, "mlp_ratio": 2.0}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip


def hf_config(quick_gelu: bool) -> CLIPConfig:
    act = "quick_gelu" if quick_gelu else "gelu"
    vision = {
        "hidden_size": VISION["width"], "intermediate_size": int(VISION["width"] * VISION["mlp_ratio"]),
        "num_hidden_layers": VISION["layers"], "num_attention_heads": VISION["width"] // VISION["head_width"],
        "image_size": VISION["image_size"], "patch_size": VISION["patch_size"], "hidden_act": act,
        "projection_dim": EMBED,
    }  # fmt: skip
    text = {
        "hidden_size": TEXT["width"], "intermediate_size": int(TEXT["width"] * TEXT["mlp_ratio"]),
        "num_hidden_layers": TEXT["layers"], "num_attention_heads": TEXT["heads"], "vocab_size": TEXT["vocab_size"],
        "max_position_embeddings": TEXT["context_length"], "hidden_act": act, "bos_token_id": 97, "eos_token_id": 98,
        "pad_token_id": 1, "projection_dim": EMBED,
    }  # fmt: skip
    return CLIPConfig(projection_dim=EMBED, vision_config=vision, text_config=text, architectures=["CLIPModel"])


@torch.no_grad()
def make(out: pathlib.Path, name: str, quick_gelu: bool, trained: bool) -> None:
    case = fresh(out, name)
    cfg = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    model = open_clip.CLIP(**cfg).eval()
    randomize(model, case.name)
    model.logit_scale.copy_(torch.tensor(2.659))
    dtype = torch.bfloat16 if trained else torch.float16
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    state = {key: tensor.to(dtype) for key, tensor in contiguous(model.state_dict()).items()}
    all_distinct(state)
    if trained:
        prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
        entry = "epoch_1.pt"
        torch.save({"epoch": 1, "name": "tiny", "state_dict": prefixed}, case / "source" / entry)
    else:
        entry = "open_clip_pytorch_model.bin"
        torch.save(state, case / "source" / entry)
    described = {"model_cfg": cfg, "preprocess_cfg": PREPROCESS}
    (case / "source" / "open_clip_config.json").write_text(json.dumps(described, indent=1) + "\n")
    config = hf_config(quick_gelu)
    twin = CLIPModel(config).eval()
    script.copy_text_model_and_projection(twin, model)
    script.copy_vison_model_and_projection(twin, model)
    twin.logit_scale = model.logit_scale
    truth = {key: tensor.to(dtype) for key, tensor in contiguous(twin.state_dict()).items()}
    all_distinct(truth)
    write_truth(case, truth, json.loads(config.to_json_string()) | {"torch_dtype": str(dtype)[6:]})
    ids = torch.randint(3, 97, (2, TEXT["context_length"]), generator=generator("text"))
    ids[:, 0], ids[0, 8], ids[1, 5] = 97, 98, 98
    pixels = torch.randn(2, 3, VISION["image_size"], VISION["image_size"], generator=generator("pixels"))
    checks = {
        "image_features_source_model_vs_truth": largest_difference(
            model.encode_image(pixels), twin.get_image_features(pixel_values=pixels), 2e-5
        ),
        "text_features_source_model_vs_truth": largest_difference(
            model.encode_text(ids), twin.get_text_features(input_ids=ids), 2e-5
        ),
    }
    write_case(
        case, tool="transformers convert_clip_original_pytorch_to_hf.py, on an open_clip model",
        made_with=versions("open_clip_torch", "transformers", "safetensors"),
        function="copy_text_model_and_projection and copy_vison_model_and_projection of"
        " transformers.models.clip.convert_clip_original_pytorch_to_hf",
        entry=entry, forward=True, backward=False, checks=checks,
        sizes={"embed_dim": EMBED, "vision": VISION, "text": TEXT, "quick_gelu": quick_gelu},
        notes=[
            "as open_clip's training saves it: key state_dict, every name below 'module.'" if trained
            else "as open_clip publishes models: a bare state dict and open_clip_config.json",
            "visual.proj and text_projection are transposed in the truth",
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    make(arguments.out, "open_clip_published", quick_gelu=True, trained=False)
    make(arguments.out, "open_clip_trained", quick_gelu=False, trained=True)


if __name__ == "__main__":
    main()
