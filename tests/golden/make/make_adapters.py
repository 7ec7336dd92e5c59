"""Makes adapters/: tiny adapters of other tools than peft, and what each tool itself merges them to.

    python make_adapters.py --out DIR [--only mergekit|mlx|lycoris|diffusers]

needs torch 2.13.0, transformers 5.24.0, peft 0.21.2 and `pip install mlx-lm==0.32.2 "mlx[cpu]"`
and `pip install --no-deps mergekit==0.1.5`; and in one of transformers 4.57.1 `pip install --no-deps lycoris-lora==4.1.3
diffusers==0.35.2` with einops and toml. Below `bases/` are the models; a case has the adapter as the
tool writes it, and `truth.safetensors`: the tensors that the tool changed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(folder: Path) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)).eval()
    model.save_pretrained(folder)
    return model


def save_truth(path: Path, base: Path, truth: dict[str, torch.Tensor]) -> None:
    """Saves what differs from the base."""
    before = load_file(base)
    save_file({name: one.contiguous() for name, one in truth.items() if not torch.equal(one, before[name])}, path)


def shaken(tensors: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: one + torch.randn(one.shape, generator=generator) * 0.1 for name, one in sorted(tensors.items())}


def before_peft(name: str) -> str:
    """The name that diffusers 0.17 gave a tensor."""
    layer = "lora_linear_layer" if name.startswith("text_encoder.") else "lora"
    return name.replace(".lora_A.", f".{layer}.down.").replace(".lora_B.", f".{layer}.up.")


def make_mlx(out: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    layers = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    for case, kind, keys in (
        ("mlx_lora", "lora", layers),
        ("mlx_dora", "dora", layers),
        ("mlx_embedding", "lora", [*layers, "model.embed_tokens", "lm_head"]),
    ):
        folder = out / case
        base = out / "bases" / "llama"
        llama(base)
        model, _ = load_model(base, lazy=False)
        parameters = {"rank": 4, "dropout": 0.0, "scale": 1.5, "keys": keys}
        linear_to_lora_layers(model, 2, parameters, use_dora=kind == "dora")
        parts = dict(tree_flatten(model.parameters()))
        ours = {name: one for name, one in parts.items() if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}
        moved = shaken({name: torch.tensor(one.tolist()) for name, one in ours.items()})
        weights = {name: mx.array(one.numpy()) for name, one in moved.items()}
        model.load_weights(list(weights.items()), strict=False)
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), weights)
        config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "batch_size": 4, "iters": 100}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=4))
        fused = {}
        for name, module in model.named_modules():
            if hasattr(module, "fuse"):
                fused[f"{name}.weight"] = module.fuse(dequantize=False).weight
        truth = {name: torch.tensor(one.tolist()) for name, one in fused.items()}
        save_truth(folder / "truth.safetensors", base / "model.safetensors", truth)


def by_forward(model: torch.nn.Module, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the forward pass of LoHa and LoKr has; ``merge_to`` of 4.1.3 counts their scale twice."""
    truth = {name: one.detach().clone() for name, one in model.state_dict().items()}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    for one in network.loras:
        name = names[id(one.org_module[0])]
        truth[name] += (one.get_weight(one.shape) * one.scalar).detach().reshape(truth[name].shape)
    return truth


def make_lycoris(out: Path) -> None:
    from lycoris import LycorisNetwork, create_lycoris
    from transformers import CLIPVisionConfig, CLIPVisionModel

    def clip(folder: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).eval()
        model.save_pretrained(folder)
        return model

    for case, make, settings in (
        ("lycoris_locon", llama, {"algo": "locon"}),
        ("lycoris_loha", llama, {"algo": "loha"}),
        ("lycoris_lokr", llama, {"algo": "lokr", "factor": 2}),
        ("lycoris_lokr_whole", llama, {"algo": "lokr", "factor": 2, "full_matrix": True}),
        ("lycoris_rslora", llama, {"algo": "locon", "rs_lora": True}),
        ("lycoris_loha_conv", clip, {"algo": "loha", "conv_dim": 2, "conv_alpha": 1}),
        ("lycoris_loha_tucker", clip, {"algo": "loha", "conv_dim": 2, "conv_alpha": 1, "use_tucker": True}),
        ("lycoris_lokr_conv", clip, {"algo": "lokr", "factor": 2, "conv_dim": 1, "conv_alpha": 1}),
        ("lycoris_dora", llama, {"algo": "locon", "dora_wd": True}),
    ):
        folder = out / case
        folder.mkdir(parents=True, exist_ok=True)
        base = out / "bases" / make.__name__
        model = make(base)
        torch.manual_seed(1)
        targets = ["LlamaAttention", "LlamaMLP"] if make is llama else ["CLIPMLP", "CLIPVisionEmbeddings"]
        LycorisNetwork.apply_preset({"target_module": targets})
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, **settings)
        network.apply_to()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        network.save_weights(str(folder / "adapter.safetensors"), torch.float32, {})
        network.restore()
        if settings["algo"] == "locon":
            network.merge_to(1.0)
            truth = {name: one.detach().clone() for name, one in model.state_dict().items()}
        else:
            truth = by_forward(model, network)
        save_truth(folder / "truth.safetensors", base / "model.safetensors", truth)


def make_diffusers(out: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    def pipeline() -> StableDiffusionPipeline:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
        )
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=24, max_position_embeddings=8))
        parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(
            unet=unet, text_encoder=text, scheduler=DDIMScheduler(), requires_safety_checker=False, **parts
        )

    for case in ("diffusers_new", "diffusers_old", "kohya"):
        folder = out / case
        pipe = pipeline()
        folder.mkdir(parents=True, exist_ok=True)
        pipe.unet.save_pretrained(out / "bases" / "unet")
        pipe.text_encoder.save_pretrained(out / "bases" / "text_encoder")
        torch.manual_seed(1)
        rank, alpha = 2, 2 if case == "diffusers_old" else 1
        attention = ["to_q", "to_v", "to_out.0"]
        # diffusers 0.35 does not read attention of a text encoder by names that it has itself turned into kohya's.
        linear = ["fc1"] if case == "kohya" else ["q_proj", "fc1"]
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=attention))
        pipe.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear))
        unet = shaken(get_peft_model_state_dict(pipe.unet, adapter_name="default"))
        text = shaken(get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"), 2)
        if case == "diffusers_new":
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=attention)
            others = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear)
            metadata = {
                "unet_lora_adapter_metadata": config.to_dict(),
                "text_encoder_lora_adapter_metadata": others.to_dict(),
            }
            StableDiffusionPipeline.save_lora_weights(folder, unet, text, **metadata)
        else:
            named = {f"unet.{name}": one for name, one in unet.items()}
            named |= {f"text_encoder.{name}": one for name, one in text.items()}
            if case == "kohya":
                flat = convert_state_dict_to_kohya(named)
                flat = {name.replace("lora_unet_unet_", "lora_unet_"): one for name, one in flat.items()}
                modules = [name.removesuffix(".lora_down.weight") for name in flat if name.endswith(".lora_down.weight")]
                flat |= {f"{module}.alpha": torch.tensor(float(alpha)) for module in modules}
            else:
                flat = {before_peft(name): one for name, one in named.items()}
            save_file({name: one.contiguous() for name, one in flat.items()}, folder / "pytorch_lora_weights.safetensors")
        fresh = pipeline()
        fresh.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        fresh.fuse_lora()
        fresh.unload_lora_weights()
        for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
            truth = {key: one.detach().clone() for key, one in getattr(fresh, name).state_dict().items()}
            save_truth(folder / f"{name}_truth.safetensors", out / "bases" / name / f"{file}.safetensors", truth)


def make_mergekit(out: Path) -> None:
    """A tuned llama, and the adapter that mergekit-extract-lora makes of it."""
    base, folder = out / "bases" / "llama", out / "mergekit_extract"
    model = llama(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.002
            if parameter.ndim == 2 and "embed" not in name:
                noise += torch.randn(len(parameter), 3) @ torch.randn(3, parameter.shape[1]) * 0.02
            if "norm" not in name:
                parameter.add_(noise)
    model.save_pretrained(folder / "tuned")
    command = [Path(sys.executable).with_name("mergekit-extract-lora"), "--model", folder / "tuned", "--base-model", base]
    command += ["--out-path", folder / "adapter", "--max-rank", "4", "--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run(command, check=True)


MAKERS = {"mergekit": make_mergekit, "mlx": make_mlx, "lycoris": make_lycoris, "diffusers": make_diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=MAKERS)
    arguments = parser.parse_args()
    for name, make in MAKERS.items():
        if arguments.only in (None, name):
            make(arguments.out)


if __name__ == "__main__":
    main()
