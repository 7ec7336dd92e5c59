"""Compares finished LLaVA directories with the same models assembled in memory. Runs in an environment of its own.

    python llava_in_memory.py LLM CLIP OUT TRUTH [OUT TRUTH ...]    prints one line of JSON for each OUT

TRUTH holds what was trained, under XTuner's names; LLM and CLIP are the base directories. The assembly goes through the
model's own submodules and never through the names that shardmerge writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def base_tensors(folder: Path) -> Tensors:
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def grown(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The vocabulary step, said again in torch: the mean of all rows for every new one."""
    mean = weight.double().mean(dim=0, keepdim=True).to(torch.bfloat16)
    return torch.cat([weight.to(torch.bfloat16), mean.expand(rows - len(weight), -1)])


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """What a bfloat16 output keeps, in fp32 for the computation."""
    return tensor.to(torch.bfloat16).float()


def load(module: torch.nn.Module, tensors: Tensors) -> None:
    own = module.state_dict()
    if not any(name.startswith("vision_model.") for name in own):  # transformers >= 5.6 in a standalone CLIP
        tensors = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    module.load_state_dict({name: rounded(tensors[name]) for name in own}, strict=True)


def assembled(out: Path, truth: Tensors, llm: Path, clip: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(out)
    model = transformers.LlavaForConditionalGeneration(config).float()  # buffers such as inv_freq stay fp32
    # The golden runs have (r, alpha) = (4, 8) for the language model and (2, 1) for the encoder.
    text = with_adapter(base_tensors(llm), under(truth, "llm."), 2.0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        text[name] = grown(text[name], config.text_config.vocab_size)
    vision = with_adapter(base_tensors(clip), under(truth, "visual_encoder."), 0.5)
    projector = under(truth, "projector.model.")
    core = getattr(model, "model", model)
    if core is model:  # before 4.52 the language model had its head inside
        load(model.language_model, text)
    else:
        load(core.language_model, under(text, "model."))
        model.lm_head.load_state_dict({"weight": rounded(text["lm_head.weight"])})
    load(core.vision_tower, vision)
    for layer, index in (("linear_1", "0."), ("linear_2", "2.")):
        load(getattr(core.multi_modal_projector, layer), under(projector, index))
    return model


def with_adapter(base: Tensors, own: Tensors, scale: float) -> Tensors:
    """The base with what a run trained of it: whole tensors, or LoRA, said again in torch."""
    found = dict(base)
    for name, tensor in own.items():
        if "lora_A" in name:
            place = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            product = own[name.replace("lora_A", "lora_B")].double() @ tensor.double()
            found[place] = (base[place].double() + scale * product).float()
        elif "lora_B" not in name:
            found[name] = tensor
    return found


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def main(out: Path, truth: Path, llm: Path, clip: Path) -> dict[str, object]:
    transformers.logging.set_verbosity_error()
    processor = transformers.AutoProcessor.from_pretrained(out)
    colours = [(x * 9 % 256, y * 7 % 256, x * y % 256) for y in range(40) for x in range(40)]
    image = Image.new("RGB", (40, 40))
    image.putdata(colours)
    inputs = processor(images=image, text="<image>\nwhat is it?", return_tensors="pt")
    loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, torch_dtype=torch.float32
    )
    found = logits(loaded, inputs)
    expected = logits(assembled(out, load_file(truth), llm, clip), inputs)
    config = loaded.config
    return {
        "transformers": transformers.__version__,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
        "equal": torch.equal(found, expected),
        "finite": bool(torch.isfinite(found).all()),
        "difference": float((found - expected).abs().max()),
        "image_tokens": int((inputs["input_ids"] == config.image_token_index).sum()),
        "rows": config.text_config.vocab_size,
        "feature_layer": config.vision_feature_layer,
    }


if __name__ == "__main__":
    base_llm, base_clip, *pairs = map(Path, sys.argv[1:])
    for finished, trained in zip(pairs[::2], pairs[1::2], strict=True):
        print(json.dumps(main(finished, trained, base_llm, base_clip)))
