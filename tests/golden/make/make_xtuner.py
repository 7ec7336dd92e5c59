"""Makes tests/golden/xtuner: tiny LLaVA runs of XTuner's own LLaVAModel, and the base models they started from.

    python make_xtuner.py OUT

Environment: xtuner 0.2.0, mmengine 0.10.7, deepspeed 0.16.9, transformers 4.48.3, torch 2.13.0 (CPU); see README.md. The
model is XTuner's, the directories are written by DeepSpeed with the arguments of XTuner's DeepSpeedStrategy (tag is
the name of the .pth, no `latest`, frozen parameters left out), the files by mmengine's save_checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import sys
import types
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file

import transformers  # before the stand-ins below: it looks for the real packages


class _StandIn(types.ModuleType):
    """Stands for an image package whose transforms no model code calls."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for missing in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "skimage", "skimage.io"):
    sys.modules.setdefault(missing, _StandIn(missing))

IMAGE, PATCH, VISION, TEXT = 28, 14, 16, 16

CASES = {
    "frozen_z2": {"stage": 2, "freeze_visual_encoder": True},
    "frozen_z3": {"stage": 3, "freeze_visual_encoder": True},
    "pretrain_z2": {"stage": 2, "freeze_visual_encoder": True, "freeze_llm": True},
    "single_frozen": {"dtype": "bfloat16", "freeze_visual_encoder": True},
    "single_trainvit": {"dtype": "float32", "optimizer": True},
    "lora_llm": {"dtype": "float32", "freeze_llm": True, "freeze_visual_encoder": True, "lora": True},
}


def make_tokenizer(folder: Path) -> int:
    """A byte-level BPE as Llama-3's, of the 256 bytes and a few merges; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["what is it? it is what it is."] * 8, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return len(fast)


def make_bases(out: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llm, clip = out / "base_llm", out / "base_clip"
    for folder in (llm, clip):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    size = make_tokenizer(llm)
    config = LlamaConfig(
        vocab_size=size, hidden_size=TEXT, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=500000.0, rms_norm_eps=1e-5,
        bos_token_id=size - 2, eos_token_id=size - 1, torch_dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(llm)
    vision = {
        "hidden_size": VISION, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": IMAGE, "patch_size": PATCH,
    }
    text = {
        "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 7,
    }
    full = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    full.config.save_pretrained(clip)
    state = dict(full.state_dict())
    # What hub files of 2022 also hold.
    state["text_model.embeddings.position_ids"] = torch.arange(7).reshape(1, -1)
    state["vision_model.embeddings.position_ids"] = torch.arange(5).reshape(1, -1)
    torch.save(state, clip / "pytorch_model.bin")
    size_of = {"height": IMAGE, "width": IMAGE}
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size_of).save_pretrained(clip)


def config_of(case: dict):
    """The training config as XTuner's recipes write it; its text travels in the checkpoint."""
    from mmengine.config import Config

    llm = "dict(type='transformers.AutoModelForCausalLM.from_pretrained', pretrained_model_name_or_path=llm_name_or_path)"
    vit = "dict(type='transformers.CLIPVisionModel.from_pretrained', pretrained_model_name_or_path=visual_encoder_name_or_path)"
    lora = "dict(type='peft.LoraConfig', r=4, lora_alpha=8, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM')"
    text = f"""
llm_name_or_path = 'base_llm'
visual_encoder_name_or_path = 'base_clip'
tokenizer = dict(type='transformers.AutoTokenizer.from_pretrained', pretrained_model_name_or_path=llm_name_or_path, padding_side='right')
image_processor = dict(type='transformers.CLIPImageProcessor.from_pretrained', pretrained_model_name_or_path=visual_encoder_name_or_path)
model = dict(
    type='xtuner.model.LLaVAModel',
    freeze_llm={case.get("freeze_llm", False)},
    freeze_visual_encoder={case.get("freeze_visual_encoder", False)},
    llm={llm},
    visual_encoder={vit},
    {"llm_lora=" + lora + "," if case.get("lora") else ""}
    visual_select_layer=-2,
    projector_depth=2)
max_iters = 2
"""
    return Config.fromstring(text, ".py")


def build_model(case: dict, dtype: torch.dtype):
    """XTuner's model over the base models, which lie in the current directory."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, CLIPVisionModel
    from xtuner.model import LLaVAModel

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, bias="none", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    return LLaVAModel(
        llm=AutoModelForCausalLM.from_pretrained("base_llm", torch_dtype=dtype, attn_implementation="eager"),
        visual_encoder=CLIPVisionModel.from_pretrained("base_clip", torch_dtype=dtype),
        freeze_llm=case.get("freeze_llm", False),
        freeze_visual_encoder=case.get("freeze_visual_encoder", False),
        llm_lora=lora if case.get("lora") else None,
        use_activation_checkpointing=False,
    )


def batch(dtype: torch.dtype) -> dict:
    """One image and one sentence; -200 is where XTuner puts the image."""
    ids = torch.tensor([[5, -200, 7, 8, 9, 10]])
    pixels = torch.linspace(-1, 1, 3 * IMAGE * IMAGE).reshape(1, 3, IMAGE, IMAGE).to(dtype)
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def bookkeeping(case: dict) -> dict:
    """meta, message_hub and so on, made by mmengine's own classes."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance("golden")
    for step in range(2):
        hub.update_scalar("train/loss", 1.0 / (step + 1))
    hub.update_info("iter", 2)
    meta = {"epoch": 0, "iter": 2, "cfg": config_of(case).pretty_text, "seed": 0, "experiment_name": "golden"}
    return {"meta": meta | {"time": "20260102_030405", "mmengine_version": "0.10.7"}, "message_hub": hub.state_dict()}


def train_ranks(rank: int, case: dict, folder: str, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # a JIT build that is not needed
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = build_model(case, torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": case["stage"]},
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trainable, lr=1e-2), config=config)
    for _ in range(2):
        engine.backward(engine(batch(torch.bfloat16), mode="loss")["loss"])
        engine.step()
    state = bookkeeping(case) | {"param_schedulers": [], "optim_wrapper": {}}
    engine.save_checkpoint(folder, tag="iter_2.pth", client_state=state, save_latest=False, exclude_frozen_parameters=True)
    torch.distributed.barrier()


def train_here(case: dict, path: Path) -> None:
    from mmengine.runner import save_checkpoint

    dtype = getattr(torch, case["dtype"])
    model = build_model(case, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(batch(dtype), mode="loss")["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"state_dict": model.state_dict()} | bookkeeping(case)
    if case.get("optimizer"):
        state |= {"optimizer": optimizer.state_dict(), "param_schedulers": []}
    save_checkpoint(state, str(path))
    save_file({k: v.clone().contiguous() for k, v in state["state_dict"].items()}, path.parent.parent / "truth.safetensors")


def make(name: str, case: dict, out: Path) -> None:
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work_dirs"
    work.mkdir(parents=True)
    relative = os.path.relpath(work)
    if "stage" in case:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(train_ranks, (case, relative, port), nprocs=2)
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        read = get_fp32_state_dict_from_zero_checkpoint(relative, tag="iter_2.pth")
        save_file({k: v.clone().contiguous() for k, v in read.items()}, folder / "truth.safetensors")
        (work / "zero_to_fp32.py").unlink()
        (work / "last_checkpoint").write_text("work_dirs/iter_2.pth")
    else:
        train_here(case, work / "iter_2.pth")
    facts = {"name": name, "xtuner": "0.2.0", "mmengine": "0.10.7", "deepspeed": "0.16.9", "torch": torch.__version__, **case}
    (folder / "case.json").write_text(json.dumps(facts, indent=1) + "\n")
    print("made", name, flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_bases(target)
    os.chdir(target)  # paths in configs and pickles stay relative
    for wanted in sys.argv[2:] or CASES:
        make(wanted, CASES[wanted], Path())
