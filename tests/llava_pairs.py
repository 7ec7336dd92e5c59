"""Compares LLaVAs of many pairs with the same models put together in memory. Runs in an environment of its own.

    python llava_pairs.py CASES.json    prints one line of JSON for each case

A case says the directory, the class, the parts with the settings that they were made with, and the settings around
them. Configs are made of those settings and never of the finished config.json; weights go through transformers' own
classes of the parts, and never through the names that shardmerge writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
Case = dict[str, Any]


def text_model(case: Case) -> torch.nn.Module:
    folder, settings = Path(case["text"]), case["text_settings"]
    if settings["model_type"] != "internlm2":
        config = transformers.AutoConfig.for_model(**settings)
        return whole(transformers.AutoModelForCausalLM, folder, config)
    plain = {key: value for key, value in settings.items() if key not in ("model_type", "bias")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain, attention_bias=settings["bias"])).float()
    model.load_state_dict(split(load_file(folder / "model.safetensors"), plain), strict=True)
    return model


def whole(kind: Any, folder: Path, config: Any) -> torch.nn.Module:
    model, info = kind.from_pretrained(folder, config=config, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(info[f"{key}_keys"] for key in ("missing", "unexpected", "mismatched")), info
    return model


def vision_model(folder: Path, config: Any, *, cut: bool) -> torch.nn.Module:
    """An encoder; 5.6 took `vision_model.` out of the names of one that stands alone, which no 4.x loads."""
    if config.model_type == "dinov2":
        return whole(transformers.AutoModel, folder, config)
    model, tensors = transformers.AutoModel.from_config(config), load_file(folder / "model.safetensors")
    level = "vision_model." if next(iter(model.state_dict())).startswith("vision_model.") else ""
    tensors = {level + name.removeprefix("vision_model."): one for name, one in tensors.items()}
    if cut:
        tensors = {name: one for name, one in tensors.items() if name in model.state_dict()}
    model.load_state_dict(tensors, strict=True)
    return model


# What `modeling_internlm2.py` calls the parts of a LLaMA.
INTERNLM2 = (
    ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w3", "mlp.up_proj"),
    ("feed_forward.w2", "mlp.down_proj"), ("attention_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"), ("tok_embeddings", "embed_tokens"), ("output.weight", "lm_head.weight"),
)  # fmt: skip


def split(tensors: Tensors, settings: dict[str, int]) -> Tensors:
    """As InternLM2Attention.forward takes its `wqkv` apart: `(h gs d)`, the last two of a group are key and value."""
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    head_dim = settings["hidden_size"] // heads
    found: Tensors = {}
    for name, value in tensors.items():
        if "wqkv" in name:
            rows = value.view(groups, heads // groups + 2, head_dim, *value.shape[1:])
            parts = {"q_proj": rows[:, :-2], "k_proj": rows[:, -2], "v_proj": rows[:, -1]}
            for part, own in parts.items():
                place = name.replace("attention.wqkv", f"self_attn.{part}")
                found[place] = own.reshape(-1, *value.shape[1:]).contiguous()
            continue
        place = name
        for own, other in INTERNLM2:
            place = place.replace(own, other)
        found[place] = value
    return found


def assembled(case: Case) -> torch.nn.Module:
    text = text_model(case)
    vision_config = transformers.AutoConfig.for_model(**case["vision_settings"])
    vision = vision_model(Path(case["vision"]), vision_config, cut=case["cut"])
    kind = case["class"].removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{kind}Config")(
        text_config=text.config, vision_config=vision_config, tie_word_embeddings=text.config.tie_word_embeddings,
        **case["around"],
    )  # fmt: skip
    model = getattr(transformers, case["class"])._from_config(config, attn_implementation="eager").float()
    core = getattr(model, "model", model)
    if core is model:  # before 4.52 the language model had its head inside
        model.language_model.load_state_dict(text.state_dict(), strict=True)
    else:
        core.language_model.load_state_dict(text.model.state_dict(), strict=True)
        model.lm_head.load_state_dict(text.lm_head.state_dict())
    core.vision_tower.load_state_dict(vision.state_dict(), strict=True)
    own = load_file(case["own"])
    core.multi_modal_projector.load_state_dict({name: own[name] for name in core.multi_modal_projector.state_dict()})
    if hasattr(core, "image_newline"):
        core.image_newline.data.copy_(own["image_newline"])
    return model.eval()


def image() -> Image.Image:
    made = Image.new("RGB", (50, 32))
    made.putdata([(x * 9 % 256, y * 7 % 256, x * y % 256) for y in range(32) for x in range(50)])
    return made


def inputs(out: Path, kind: str) -> dict[str, torch.Tensor]:
    """What the processor makes of an image and a question.

    A OneVision's wants torchvision, for videos, from 4.52 on. Its halves do without, and so does its arithmetic.
    """
    question = "<image>\nwhat is it?"
    if "Onevision" not in kind:
        return dict(transformers.AutoProcessor.from_pretrained(out)(images=image(), text=question, return_tensors="pt"))
    settings = json.loads((out / "processor_config.json").read_text("utf-8"))
    halves = transformers.AutoImageProcessor.from_pretrained(out, use_fast=False)
    made = object.__new__(transformers.LlavaOnevisionProcessor)
    made.__dict__ |= {"image_processor": halves, **settings}
    pixels = halves(image(), return_tensors="pt")
    count = made._get_number_of_features(32, 50, *pixels["pixel_values"].shape[-2:])
    question = question.replace("<image>", settings["image_token"] * count)
    words = transformers.AutoTokenizer.from_pretrained(out)(question, return_tensors="pt")
    given = {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"]}
    return given | {key: pixels[key] for key in ("pixel_values", "image_sizes")}


def answer(case: Case) -> dict[str, object]:
    out = case["out"]
    loaded, info = getattr(transformers, case["class"]).from_pretrained(
        out, output_loading_info=True, torch_dtype=torch.float32, attn_implementation="eager"
    )
    loaded, expected = loaded.eval(), assembled(case)
    with_image = inputs(Path(out), case["class"])
    words = torch.arange(3, 20)[None]
    with torch.no_grad():
        pairs = [
            (loaded(input_ids=words).logits, expected(input_ids=words).logits),
            (loaded(**with_image).logits, expected(**with_image).logits),
        ]
    return {
        "case": case["name"],
        "version": transformers.__version__,
        **{key: sorted(map(str, info[f"{key}_keys"])) for key in ("missing", "unexpected", "mismatched")},
        "equal": [torch.equal(found, other) and bool(found.isfinite().all()) for found, other in pairs],
        "difference": [float((found - other).abs().max()) for found, other in pairs],
        "image_tokens": int((with_image["input_ids"] == loaded.config.image_token_index).sum()),
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        try:
            print(json.dumps(answer(one)), flush=True)
        except Exception as error:  # noqa: BLE001, whatever it is, the other cases are answered
            print(json.dumps({"case": one["name"], "error": f"{type(error).__name__}: {error}"}), flush=True)
