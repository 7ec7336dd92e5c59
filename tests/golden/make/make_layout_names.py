"""What versions of transformers call the tensors of tiny models, on disk and in memory: ``layout_names.json.gz``.

    PYTHONPATH=ROOT python make_layout_names.py --out DIR        # in an environment of each version
    python make_layout_names.py --join VERSION.json... --out layout_names.json.gz

Every class of ``tests/families.py`` and of ``MORE`` that a version has is built with random weights, saved, and read again by
safetensors. A set of names is written once, with the versions and places (``disk``, ``memory``) that have it. No training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

Named = dict[str, list[int]]


def more(families: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns vision-language models that ``tests/families.py`` does not have, and text models of LLaMA's names."""
    from tests.families import EXPERTS, EYE, QWEN_EYE, QWEN_IDS, TEXT

    untied = {"tie_word_embeddings": False}
    clip = {"model_type": "clip_vision_model", **EYE, "projection_dim": 16}
    siglip = {"model_type": "siglip_vision_model", **EYE, "vision_use_head": False}
    pixtral = {"model_type": "pixtral", **EYE, "head_dim": 4}
    llama, qwen2 = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}
    mistral = {"model_type": "mistral", **TEXT, "head_dim": 4}
    pins = {"image_token_index": 9, "image_grid_pinpoints": [[28, 56]], **untied}
    qwen_eye = {**QWEN_EYE, "hidden_size": 20, "intermediate_size": 36, "out_hidden_size": 24,
                "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    mrope = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}, "rope_theta": 5000.0}
    perceiver = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 3, "resampler_head_dim": 4,
                 "num_key_value_heads": 1}  # fmt: skip
    eye_2 = {key: value for key, value in EYE.items() if key != "num_hidden_layers"}
    mllama_eye = {**eye_2, "attention_heads": 5, "num_hidden_layers": 2, "num_global_layers": 1,
                  "vision_output_dim": 40, "intermediate_layers_indices": [0], "max_num_tiles": 2,
                  "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}  # fmt: skip
    mllama_eye.pop("num_attention_heads")
    return {
        "LlamaForCausalLM": ("llama", TEXT),
        "LlamaForSequenceClassification": ("llama", {**TEXT, "num_labels": 3}),
        "MistralForCausalLM": ("mistral", TEXT),
        "Qwen2ForCausalLM": ("qwen2", TEXT),
        "CLIPModel": ("clip", {"text_config": {**EYE, "vocab_size": 50}, "vision_config": EYE}),
        "CLIPVisionModel": ("clip_vision_model", EYE),
        "SiglipVisionModel": ("siglip_vision_model", EYE),
        "LlavaForConditionalGeneration": (
            "llava", {"text_config": llama, "vision_config": clip, "image_token_index": 9}),
        "LlavaForConditionalGeneration, Pixtral": (
            "llava", {"text_config": mistral, "vision_config": pixtral, "image_token_index": 9}),
        "LlavaNextForConditionalGeneration": ("llava_next", {**pins, "text_config": llama, "vision_config": clip}),
        "LlavaOnevisionForConditionalGeneration": (
            "llava_onevision", {**pins, "text_config": qwen2, "vision_config": siglip}),
        "Mistral3ForConditionalGeneration": (
            "mistral3", {"text_config": mistral, "vision_config": pixtral, "image_token_index": 9, **untied}),
        "InternVLForConditionalGeneration": (
            "internvl", {"text_config": qwen2, "image_token_id": 9, **untied,
                         "vision_config": {**EYE, "image_size": [28, 28], "patch_size": [7, 7]}}),
        "MllamaForConditionalGeneration": (
            "mllama", {"text_config": {**TEXT, "cross_attention_layers": [1], "rope_theta": 5000.0,
                                       "rope_scaling": {"rope_type": "default"}},
                       "vision_config": mllama_eye, "image_token_index": 9}),
        "Qwen3VLForConditionalGeneration": (
            "qwen3_vl", {**QWEN_IDS, **untied, "text_config": {**TEXT, "head_dim": 4, **mrope},
                         "vision_config": qwen_eye}),
        "Qwen3VLMoeForConditionalGeneration": (
            "qwen3_vl_moe", {**QWEN_IDS, **untied, "vision_config": qwen_eye,
                             "text_config": {**TEXT, **EXPERTS, "num_experts": 4, "head_dim": 4, **mrope}}),
        "Idefics2ForConditionalGeneration": (
            "idefics2", {"text_config": mistral, "vision_config": EYE, "image_token_id": 9,
                         "perceiver_config": {**perceiver, "hidden_size": 24}}),
        "VipLlavaForConditionalGeneration": (
            "vipllava", {"text_config": llama, "vision_config": clip, "image_token_index": 9,
                         "vision_feature_layers": [-2, -1]}),
    }  # fmt: skip


def made() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every class of this version: its model type, its names on disk and in memory."""
    import torch
    import transformers
    from safetensors import safe_open

    from tests.families import FAMILIES

    transformers.logging.set_verbosity_error()
    for kind, (model_type, values) in {**FAMILIES, **more(FAMILIES)}.items():
        cls = getattr(transformers, kind.partition(",")[0], None)
        if cls is None:
            continue
        torch.manual_seed(1)
        try:
            model = cls(transformers.AutoConfig.for_model(model_type, **deepcopy(values)))
        except Exception as error:  # noqa: BLE001  # an older version that wants another config
            print(f"LEFT OUT: {kind} of {transformers.__version__}: {error!r}"[:300])
            continue
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads(Path(folder, "config.json").read_text())
            with safe_open(Path(folder, "model.safetensors"), "pt") as file:
                disk = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        memory = {name: list(value.shape) for name, value in model.state_dict().items()}
        yield kind, {"model_type": config["model_type"], "names": {"disk": disk, "memory": memory}}


def joined(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns each class with its different sets of names."""
    found: dict[str, Any] = {}
    for version, report in reports.items():
        for kind, told in report.items():
            entry = found.setdefault(kind, {"model_type": told["model_type"], "sets": []})
            for place, names in told["names"].items():
                same = next((one for one in entry["sets"] if one["tensors"] == names), None)
                if same is None:
                    entry["sets"].append(same := {"of": [], "tensors": names})
                same["of"].append(f"{version} {place}")
    return found


def main() -> None:
    """Makes what this version has, or joins what several made."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--join", nargs="*", type=Path)
    given = parser.parse_args()
    if given.join:
        text = json.dumps(joined({path.stem: json.loads(path.read_text()) for path in given.join}))
        given.out.write_bytes(gzip.compress(text.encode(), mtime=0))
        return
    import transformers

    (given.out / f"{transformers.__version__}.json").write_text(json.dumps(dict(made())))


if __name__ == "__main__":
    main()
