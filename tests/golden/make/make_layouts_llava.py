"""Makes the golden official LLaVA checkpoints (1.5 and NeXT) and their Hugging Face truth.

    python make_layouts_llava.py --out DIR

source/ is saved by the llava package's own LlavaLlamaForCausalLM, its vision tower loaded as the official models'
is; truth/ is what convert_state_dict_to_hf of transformers' convert_llava(_next)_weights_to_hf.py makes, loaded strictly
into the transformers model. The script's random rows for new tokens are left out: the vocabulary keeps its size.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, contiguous, fresh, generator, largest_difference, randomize
from layouts import stand_in, versions, write_case, write_config, write_truth

stand_in("torchvision")

from llava.model.language_model.llava_llama import LlavaConfig as OfficialConfig  # noqa: E402
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM  # noqa: E402
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig  # noqa: E402
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig  # noqa: E402
from transformers import LlavaNextForConditionalGeneration  # noqa: E402
from transformers.models.llava import convert_llava_weights_to_hf as llava_script  # noqa: E402
from transformers.models.llava_next import convert_llava_next_weights_to_hf as next_script  # noqa: E402

HEADS, KV_HEADS, INTERMEDIATE = 4, 2, 96
IMAGE, PATCH = 28, 7
IMAGE_TOKEN, PLACEHOLDER = VOCAB - 2, -200
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attn_implementation": "eager",
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": IMAGE, "patch_size": PATCH, "hidden_act": "quick_gelu", "projection_dim": 16,
}  # fmt: skip


def official(case: pathlib.Path, unpad: bool) -> LlavaLlamaForCausalLM:
    """The llava package's model with a loaded tower and random weights that float16 holds exactly."""
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    tower.save_pretrained("clip-tiny")
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}).save_pretrained(
        "clip-tiny"
    )
    merge = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if unpad else {}
    config = OfficialConfig(
        **TEXT, mm_vision_tower="clip-tiny", mm_hidden_size=VISION["hidden_size"], mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_use_im_start_end=False,
        mm_use_im_patch_token=False, use_mm_proj=True, unfreeze_mm_vision_tower=True, tokenizer_model_max_length=64,
        **merge,
    )  # fmt: skip
    if unpad:
        config.image_grid_pinpoints = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
    model = LlavaLlamaForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    randomize(model, case.name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def hf_config(unpad: bool) -> Any:
    text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)
    if not unpad:
        return LlavaConfig(
            vision, text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=False, image_seq_length=(IMAGE // PATCH) ** 2,
            architectures=["LlavaForConditionalGeneration"],
        )  # fmt: skip
    return LlavaNextConfig(
        vision, text, image_token_index=IMAGE_TOKEN, use_image_newline_parameter=True, tie_word_embeddings=False,
        image_grid_pinpoints=[[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]],
        architectures=["LlavaNextForConditionalGeneration"],
    )  # fmt: skip


@torch.no_grad()
def compare(model: Any, twin: Any, unpad: bool) -> dict[str, float]:
    """Logits for text alone, the projected image features, and (1.5) logits for text and an image."""
    ids = torch.randint(0, VOCAB - 2, (1, 9), generator=generator("ids"))
    pixels = torch.randn(1, 3, IMAGE, IMAGE, generator=generator("pixels"))
    layer = twin.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    checks = {
        "text_logits_source_model_vs_truth": largest_difference(
            model(input_ids=ids).logits, twin(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, 2e-5
        ),
        "image_features_source_model_vs_truth": largest_difference(
            model.encode_images(pixels), twin.multi_modal_projector(layer), 2e-5
        ),
    }
    if not unpad:
        patches = (IMAGE // PATCH) ** 2
        theirs = torch.cat([ids[:, :3], torch.tensor([[PLACEHOLDER]]), ids[:, 3:]], 1)
        expanded = torch.cat([ids[:, :3], torch.full((1, patches), IMAGE_TOKEN), ids[:, 3:]], 1)
        ours = twin(input_ids=expanded, pixel_values=pixels, attention_mask=torch.ones_like(expanded)).logits
        checks["image_logits_source_model_vs_truth"] = largest_difference(
            model(input_ids=theirs, images=pixels).logits, ours, 2e-5
        )
    return checks


def make(out: pathlib.Path, name: str, unpad: bool) -> None:
    case = fresh(out, name)
    model = official(case, unpad)
    state = {key: tensor.half() for key, tensor in contiguous(model.state_dict()).items()}
    all_distinct(state)
    # the pieces are small so that there are several of them and an index, as in the published models
    model.save_pretrained(
        case / "source", state_dict=state, safe_serialization=unpad, max_shard_size="60KB"
    )
    saved = json.loads((case / "source" / "config.json").read_text())  # the model in memory is float32
    write_config(case / "source", saved | {"torch_dtype": "float16"})
    script = next_script if unpad else llava_script
    truth = script.convert_state_dict_to_hf(state)
    all_distinct(truth)
    config = hf_config(unpad)
    twin = (LlavaNextForConditionalGeneration if unpad else LlavaForConditionalGeneration)(config).eval()
    twin.load_state_dict(truth, strict=True)
    twin.float()
    config.torch_dtype = "float16"
    write_truth(case, truth, config)
    write_case(
        case, tool=f"transformers {script.__name__.rpartition('.')[2]}.py, on a model of the llava package",
        made_with=versions("llava-torch", "transformers", "safetensors"),
        function=f"{script.__name__}.convert_state_dict_to_hf", entry="", forward=True, backward=False,
        checks=compare(model, twin, unpad),
        sizes={"text": TEXT, "vision": VISION, "image_token": IMAGE_TOKEN},
        notes=[
            "the checkpoint has the vision tower, as after unfreeze_mm_vision_tower; mm_vision_tower in config.json"
            " names a folder that is not here",
            "the vocabulary keeps its size: the script's random rows for <image> and <pad> are left out",
            "model.image_newline is image_newline in the truth" if unpad else "pytorch_model-*.bin with an index",
            "truth names are the legacy ones (language_model.model.*), which every transformers version loads",
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that config.json names the tower by a relative path
        make(out, "llava15_official", unpad=False)
        make(out, "llava_next_official", unpad=True)
        os.chdir(out)


if __name__ == "__main__":
    main()
