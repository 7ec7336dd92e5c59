"""Makes the golden torchtune checkpoints (plain, LoRA, DoRA, Phi-3) and checks the Meta cases with torchtune's model.

    python make_layouts_torchtune.py --out DIR [--only NAME ...]

The models are torchtune's own, their weights random; torchtune's FullModelTorchTuneCheckpointer writes source/, and
its convert_weights (through FullModelHFCheckpointer for the adapters) makes truth/. Every truth is loaded into the
transformers model and gives the logits of the torchtune model. The Meta cases in DIR are read by
torchtune's meta_to_tune and give the logits of their truth too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import tempfile
from typing import Any

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, contiguous, fresh, generator, largest_difference, randomize
from layouts import same_bits, versions, write_case, write_truth
from safetensors.torch import load_file, save_file
from torchtune import training
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.phi3 import phi3
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune, phi3_tune_to_hf
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt
from torchtune.training.checkpointing import FullModelHFCheckpointer, FullModelTorchTuneCheckpointer
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

HEADS, KV_HEADS, INTERMEDIATE, RANK, ALPHA = 4, 2, 96, 4, 12.0
TUNE = {
    "vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "embed_dim": HIDDEN,
    "intermediate_dim": INTERMEDIATE, "max_seq_len": 64, "norm_eps": 1e-5,
}  # fmt: skip
HEAD_SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "dim": HIDDEN}
HF = {
    "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIZES = {
    "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "hidden": HIDDEN, "intermediate": INTERMEDIATE,
    "layers": LAYERS, "vocab": VOCAB,
}  # fmt: skip
CONFIG = LlamaConfig(**HF, rope_theta=500000.0, architectures=["LlamaForCausalLM"])
# configs of transformers 5 alone hold rope_parameters; older ones read rope_theta
WRITTEN = CONFIG.to_dict() | {"rope_theta": 500000.0, "rope_scaling": None}
PHI3_CONFIG = Phi3Config(**HF, rope_theta=10000.0, architectures=["Phi3ForCausalLM"])
PHI3_WRITTEN = PHI3_CONFIG.to_dict() | {"rope_theta": 10000.0, "rope_scaling": None}
IDS = torch.randint(0, VOCAB, (2, 9), generator=generator("ids"))
MADE_WITH = versions("torchtune", "torchao", "transformers", "safetensors")


@torch.no_grad()
def hf_logits(config: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model(IDS).logits


@torch.no_grad()
def agree(model: torch.nn.Module, config: Any, state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compares the logits of the torchtune model and of the transformers model, both in float32."""
    return {"logits_source_model_vs_truth": largest_difference(model.eval()(IDS), hf_logits(config, state), 2e-4)}


@torch.no_grad()
def bf16_state(model: torch.nn.Module, salt: str) -> dict[str, torch.Tensor]:
    """Random bf16 weights, which the model has too; it stays float32, since its rotary table must."""
    randomize(model, salt)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    state = {name: tensor.bfloat16() for name, tensor in contiguous(model.state_dict()).items()}
    all_distinct(state)
    return state


def save_as_torchtune(state: dict[str, Any], folder: pathlib.Path, adapter_only: bool = False) -> None:
    """What FullModelTorchTuneCheckpointer leaves in its output_dir after one epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.save({}, pathlib.Path(scratch) / "model.pt")
        saver = FullModelTorchTuneCheckpointer(scratch, ["model.pt"], "LLAMA3", str(folder))
        saver.save_checkpoint(state, epoch=0, adapter_only=adapter_only)


def make_llama3(out: pathlib.Path) -> None:
    case = fresh(out, "torchtune_llama3_gqa")
    model = llama3(**TUNE, rope_base=500_000)
    state = bf16_state(model, case.name)
    save_as_torchtune({training.MODEL_KEY: state}, case / "source")
    truth = convert_weights.tune_to_hf(state, **HEAD_SIZES)
    same_bits(convert_weights.hf_to_tune(truth, **HEAD_SIZES), state)
    write_truth(case, truth, WRITTEN | {"dtype": "bfloat16"})
    checks = agree(model, CONFIG, truth)
    write_case(
        case, tool="torchtune", made_with=MADE_WITH, function="torchtune.models.convert_weights.tune_to_hf",
        entry="epoch_0", forward=True, backward=True, sizes=SIZES,
        checks=checks | {"hf_to_tune_of_truth": "bit-equal to source"},
        notes=["written by FullModelTorchTuneCheckpointer", "HF config.json is the transformers one of these sizes"],
    )  # fmt: skip


def make_phi3(out: pathlib.Path) -> None:
    case = fresh(out, "torchtune_phi3_gqa")
    model = phi3(**TUNE, rope_base=10_000)
    state = bf16_state(model, case.name)
    save_as_torchtune({training.MODEL_KEY: state}, case / "source")
    truth = phi3_tune_to_hf(state)
    same_bits(phi3_hf_to_tune(truth, **HEAD_SIZES), state)
    write_truth(case, truth, PHI3_WRITTEN | {"dtype": "bfloat16"})
    checks = agree(model, PHI3_CONFIG, truth)
    write_case(
        case, tool="torchtune", made_with=MADE_WITH,
        function="torchtune.models.phi3._convert_weights.phi3_tune_to_hf", entry="epoch_0", forward=True,
        backward=True, sizes=SIZES, checks=checks | {"phi3_hf_to_tune_of_truth": "bit-equal to source"},
        notes=["q, k, v and w1, w3 are fused in the truth, without a permutation of the heads"],
    )  # fmt: skip


def make_lora(out: pathlib.Path, name: str, dora: bool) -> None:
    case = fresh(out, name)
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3(
        modules, apply_lora_to_mlp=True, apply_lora_to_output=not dora, **TUNE, rope_base=500_000, lora_rank=RANK,
        lora_alpha=ALPHA, use_dora=dora,
    )  # fmt: skip
    randomize(model, case.name)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("magnitude"):
                parameter.copy_(1.0 + 0.1 * torch.rand(parameter.shape, generator=generator(parameter_name)))
    whole = contiguous(model.state_dict())
    all_distinct(whole)
    adapter = contiguous(get_adapter_state_dict(whole))
    base = {key: tensor for key, tensor in whole.items() if key not in adapter}
    merged = get_merged_lora_ckpt(contiguous(whole), rank=RANK, alpha=ALPHA)
    targets = [*modules, "w1", "w2", "w3", *([] if dora else ["output"])]
    config = {"r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "target_modules": targets, "peft_type": "LORA"}
    save_as_torchtune(
        {training.MODEL_KEY: merged, training.ADAPTER_KEY: adapter, training.ADAPTER_CONFIG: dict(config)},
        case / "source",
        adapter_only=True,
    )
    torch.save(base, case / "source" / "base.pt")
    (case / "source" / "lora.json").write_text(json.dumps(config, indent=1) + "\n")
    truth = convert_weights.tune_to_hf(merged, **HEAD_SIZES)
    write_truth(case, truth, WRITTEN | {"dtype": "float32"})
    with tempfile.TemporaryDirectory() as scratch:
        before, after = pathlib.Path(scratch, "in"), pathlib.Path(scratch, "out")
        before.mkdir()
        save_file(contiguous(convert_weights.tune_to_hf(base, **HEAD_SIZES)), before / "model.safetensors")
        (before / "config.json").write_text(json.dumps(WRITTEN))
        saver = FullModelHFCheckpointer(str(before), ["model.safetensors"], "LLAMA3", str(after))
        saver.load_checkpoint()
        saver.save_checkpoint(
            {training.MODEL_KEY: dict(merged), training.ADAPTER_KEY: dict(adapter), training.ADAPTER_CONFIG: config},
            epoch=0,
        )
        written = load_file(after / "epoch_0" / "model-00001-of-00001.safetensors")
        same_bits(written, contiguous(truth))
        (case / "truth" / "adapter").mkdir()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(after / "epoch_0" / file, case / "truth" / "adapter" / file)
        checks = agree(model, CONFIG, truth) | peft_agrees(load_file(before / "model.safetensors"), case, truth)
    write_case(
        case, tool="torchtune", made_with=MADE_WITH | versions("peft"),
        function="torchtune.modules.peft.get_merged_lora_ckpt, then convert_weights.tune_to_hf; adapter/ by"
        " tune_to_peft_adapter_weights and tune_to_peft_adapter_config in FullModelHFCheckpointer",
        entry="", forward=True, backward=False, checks=checks,
        sizes=SIZES | {"rank": RANK, "alpha": ALPHA, "dora": dora},
        notes=[
            "source/base.pt: the base weights in torchtune's names; source/epoch_0/adapter_model.pt: as"
            " FullModelTorchTuneCheckpointer writes it with adapter_only; source/lora.json: rank, alpha and target"
            " modules in torchtune's words, which torchtune keeps in its recipe and in no file of its own",
            "truth/: the merged model; truth/adapter/: the adapter in PEFT's form, as FullModelHFCheckpointer writes it",
            *(["torchtune permutes the rows of q_proj's and k_proj's lora_B for PEFT but not their magnitude: its own"
               " adapter is wrong for those two (see peft_merge_vs_truth), while the merged model is right"]
              if dora else []),
            "float32, so that the merge can be compared with a tolerance of 1e-6",
        ],
    )  # fmt: skip


def peft_agrees(
    base: dict[str, torch.Tensor], case: pathlib.Path, truth: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Merges truth/adapter into the base with peft and compares with torchtune's merge."""
    import peft.tuners.lora.torchao
    from peft import PeftModel

    peft.tuners.lora.torchao.is_torchao_available = lambda: False  # it refuses the torchao that torchtune needs
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.load_state_dict(base, strict=True)
    merged = PeftModel.from_pretrained(model, str(case / "truth" / "adapter")).merge_and_unload().state_dict()
    worst = {"q_proj and k_proj": 0.0, "all others": 0.0}
    for name, tensor in truth.items():
        kind = "q_proj and k_proj" if "q_proj" in name or "k_proj" in name else "all others"
        worst[kind] = max(worst[kind], (merged[name] - tensor).abs().max().item())
    if worst["all others"] > 1e-6:
        raise SystemExit(f"{case.name}: peft's merge differs: {worst}")
    return {"peft_merge_vs_truth": {kind: float(f"{value:.3g}") for kind, value in worst.items()}}


def check_meta(case: pathlib.Path) -> None:
    """Puts the ranks of a Meta case together, and runs torchtune's model on it beside the truth."""
    described = json.loads((case / "case.json").read_text())
    sizes = described["sizes"]
    files = sorted((case / "source").glob("*.pth"))
    ranks = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    whole = {}
    for name, tensor in ranks[0].items():
        dim = {"wo": 1, "w2": 1, "tok_embeddings": sizes["embedding_split_dim"]}.get(name.split(".")[-2], 0)
        alone = tensor.ndim == 1 or len(ranks) == 1
        whole[name] = tensor if alone else torch.cat([rank[name] for rank in ranks], dim)
    state = convert_weights.meta_to_tune(whole)
    tune = TUNE | {"num_heads": sizes["heads"], "num_kv_heads": sizes["kv_heads"]}
    tune |= {"intermediate_dim": sizes["intermediate"]}
    third = sizes["generation"] == "3"
    theta = 500_000 if third else 10_000
    # rope_base of llama2 cannot be chosen in every version: it is 10000
    model = llama3(**tune, rope_base=theta) if third else llama2(**tune)
    model.load_state_dict(state)
    heads = {"num_attention_heads": sizes["heads"], "num_key_value_heads": sizes["kv_heads"]}
    config = LlamaConfig(**HF | heads | {"intermediate_size": sizes["intermediate"]}, rope_theta=float(theta))
    truth = load_file(case / "truth" / "model.safetensors")
    same_bits(
        contiguous(convert_weights.tune_to_hf(state, sizes["heads"], sizes["kv_heads"], HIDDEN)), truth
    )
    described["checks"] = agree(model, config, truth) | {"torchtune_meta_to_tune_then_tune_to_hf": "bit-equal to truth"}
    described["checks_made_with"] = versions("torchtune", "transformers")
    (case / "case.json").write_text(json.dumps(described, indent=1) + "\n")
    print(f"{case.name}: {described['checks']}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    makers = {
        "torchtune_llama3_gqa": make_llama3,
        "torchtune_phi3_gqa": make_phi3,
        "torchtune_llama3_lora": lambda out: make_lora(out, "torchtune_llama3_lora", dora=False),
        "torchtune_llama3_dora": lambda out: make_lora(out, "torchtune_llama3_dora", dora=True),
    }
    for name, maker in makers.items():
        if not arguments.only or name in arguments.only:
            maker(arguments.out)
    for case in sorted(arguments.out.glob("meta_*")):
        if not arguments.only or case.name in arguments.only:
            check_meta(case)


if __name__ == "__main__":
    main()
