"""Writes tests/golden/quantized: one tiny LLaMA as quantization libraries save it.

    python make_quantized.py OUT

compressed-tensors compresses each linear layer with the scales of its own ``calculate_qparams``; the other libraries are
called through transformers, or by their own functions where transformers does not save their files. ``truth.safetensors``
holds what compressed-tensors itself decompresses float8 weights to, in float32 from float32 scales.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

OUT = Path(sys.argv[1])
# 160 columns are a block of 128 and a rest.
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
FORMATS = {
    "FP8": "float-quantized", "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized", "MXFP8A16": "mxfp8-quantized",
    "INT8": "int-quantized", "W4A16": "pack-quantized", "NVFP4A16": "nvfp4-pack-quantized", "MXFP4A16": "mxfp4-pack-quantized",
}  # fmt: skip


TRUTH = ("k_proj.weight", "down_proj.weight")


def base() -> Path:
    folder = OUT / "bf16"
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(folder)
    return folder


def scales(weight: torch.Tensor, args) -> dict[str, torch.Tensor]:
    """The library's scales for the largest magnitudes of a tensor, its rows, groups or blocks."""
    rows, columns = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    block = {"tensor": (rows, columns), "channel": (1, columns)}.get(strategy)
    block = block or (tuple(args.block_structure) if strategy == "block" else (1, args.group_size))
    padded = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).float()
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    if strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    extra = {}
    if strategy == "tensor_group":
        extra["weight_global_scale"] = (448 * 6 / weight.abs().max()).float().reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=extra.get("weight_global_scale"))
    return {"weight_scale": scale.float() if scale.is_floating_point() else scale, "weight_zero_point": zero, **extra}


def compressed(name: str, folder: Path) -> None:
    scheme = preset_name_to_scheme(name, ["Linear"])
    tool = BaseCompressor.get_value_from_registry(FORMATS[name])
    if FORMATS[name] == "pack-quantized":
        scheme.weights.group_size = 16  # 128 in the preset, and no weight here is so wide
    group = scheme.weights.group_size or 1
    state, truth = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if "_proj." not in key or weight.shape[1] % max(group, 1):
            state[key] = weight
            continue
        found = tool.compress({"weight": weight.float(), **scales(weight, scheme.weights)}, scheme)
        module = key.removesuffix("weight")
        state |= {module + part: value.contiguous() for part, value in found.items() if value is not None}
        if FORMATS[name] in ("float-quantized", "mxfp8-quantized") and key.endswith(TRUTH):
            truth[key] = tool.decompress(dict(found), scheme)["weight"].float().contiguous()
    said = QuantizationConfig(
        config_groups={"group_0": scheme}, format=FORMATS[name], quantization_status="compressed", ignore=["lm_head"]
    ).model_dump(mode="json", exclude_none=True)
    write(f"compressed-tensors-{name.lower()}", folder, state, truth, said | {"quant_method": "compressed-tensors"})


def write(name: str, folder: Path, state: dict, truth: dict, said: dict) -> None:
    out = OUT / name
    out.mkdir(parents=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    if truth:
        save_file(truth, out / "truth.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def through_transformers(name: str, folder: Path, config) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink()


def quanto(folder: Path) -> None:
    from optimum.quanto import freeze, qint8, quantize

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    state: dict = {}
    for key, value in model.state_dict().items():
        state[key] = value.contiguous()
    write("quanto-int8", folder, state, {}, {"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": ["lm_head"]})


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    folder = base()
    for name in FORMATS:
        compressed(name, folder)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    through_transformers("bitsandbytes-nf4", folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    through_transformers("bitsandbytes-fp4-nested", folder, BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True))  # fmt: skip
    through_transformers("bitsandbytes-int8", folder, BitsAndBytesConfig(load_in_8bit=True))
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    through_transformers("torchao-int8", folder, TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    through_transformers("torchao-float8", folder, TorchAoConfig(Float8WeightOnlyConfig()))
    quanto(folder)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
