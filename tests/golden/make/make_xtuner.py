"""Makes the golden XTuner checkpoints: a tiny LLaVA trained by XTuner's own `train`.

    python make_xtuner.py --out DIR [--only NAME ...]

DIR gets base_llm/ and base_clip/ (the pretrained parts, in the layout of the model hub) and one folder
per case. XTuner runs inside DIR, so that every path in a checkpoint is relative.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import traceback
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import prepare_deepspeed, spawn

HERE = pathlib.Path(__file__).resolve().parent
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SENTENCES = [
    "What is in this picture?",
    "A red square in the middle of the image.",
    "Please describe the colours of the image.",
    "The image is mostly blue with some green.",
    "How many objects are there in the picture?",
    "There are two objects in the picture.",
    "Describe the picture in one sentence.",
    "It is a small picture of random colours.",
]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    stage: int | None  # None: without DeepSpeed
    freeze_llm: bool = False
    freeze_visual_encoder: bool = True
    llm_lora: bool = False
    visual_encoder_lora: bool = False
    save_optimizer: bool = True
    features: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return 1 if self.stage is None else 2


CASES = [
    Case("frozen_z2", 2, features=("frozen visual encoder", "no visual_encoder tensors")),
    Case("frozen_z3", 3, features=("frozen visual encoder", "no visual_encoder tensors")),
    Case("pretrain_z2", 2, freeze_llm=True, features=("everything frozen but the projector",)),
    Case("single_frozen", 2, save_optimizer=False,
         features=("frozen visual encoder", "one file written by DeepSpeed training without the optimizer")),
    Case("single_trainvit", None, freeze_visual_encoder=False, features=("everything trained", "plain file with optimizer")),
    Case("lora_llm", 2, freeze_llm=True, llm_lora=True, features=("LLM LoRA", "frozen visual encoder")),
    Case("lora_both", None, freeze_llm=True, llm_lora=True, visual_encoder_lora=True,
         features=("LLM LoRA", "visual encoder LoRA", "plain file with optimizer")),
]  # fmt: skip

LLM_LORA = """
    llm_lora=dict(
        type=LoraConfig,
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    ),"""
VISUAL_LORA = """
    visual_encoder_lora=dict(
        type=LoraConfig, r=2, lora_alpha=1, lora_dropout=0.0, bias="none"
    ),"""


def prepare_xtuner() -> None:
    """What XTuner asks of a machine that this one does not have."""
    import torch

    stub_vision_packages()
    torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]
    torch.cuda.set_device = lambda *args: None
    prepare_deepspeed()
    # transformers would build the parts already sharded (zero.Init); over gloo its loading then leaves
    # some of the small frozen weights uninitialised, so DeepSpeed shards them afterwards instead.
    # The files are laid out the same.
    import transformers.integrations.deepspeed as integration

    integration.set_hf_deepspeed_config = lambda config: None


def stub_vision_packages() -> None:
    """XTuner imports torchvision and skimage for transforms that LLaVA training never calls."""
    import importlib.machinery

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional",
                 "skimage", "skimage.io"):  # fmt: skip
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__version__ = "0"  # type: ignore[attr-defined]
            sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    functional = sys.modules["torchvision.transforms.functional"]
    functional.InterpolationMode = types.SimpleNamespace(BICUBIC="bicubic")  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------
# the pretrained parts and the data


def make_tokenizer(folder: pathlib.Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=293,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    # as in Llama-3 the special tokens stand behind the vocabulary
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", core.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_base_llm(folder: pathlib.Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    vocabulary = make_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        bos_token_id=vocabulary - 5,
        eos_token_id=vocabulary - 4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=vocabulary - 5,
        eos_token_id=[vocabulary - 4, vocabulary - 1],
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    model.save_pretrained(folder, safe_serialization=True)


def make_base_clip(folder: pathlib.Path) -> None:
    """A whole CLIP as the hub holds it since 2022: torch.save, with the position_ids buffers."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(2)
    config = CLIPConfig(
        text_config={"vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 8, "projection_dim": 12,
                     "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 1},
        vision_config={"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 3,
                       "num_attention_heads": 4, "image_size": 28, "patch_size": 7, "projection_dim": 12},
        projection_dim=12,
        architectures=["CLIPModel"],
        torch_dtype="float32",
    )  # fmt: skip
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.02)
        elif "norm" in name:
            parameter.data.normal_(1.0, 0.05)
    config.save_pretrained(folder)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("position_embedding.weight"):
            ids = torch.arange(tensor.shape[0]).reshape(1, -1)
            state[name.replace("position_embedding.weight", "position_ids")] = ids
        state[name] = tensor.clone()
    torch.save(state, folder / "pytorch_model.bin")
    CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)


def make_data(folder: pathlib.Path) -> None:
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    items = []
    for index in range(8):
        pixels = rng.integers(0, 255, (20 + index, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        items.append({
            "id": str(index),
            "image": f"{index}.png",
            "conversations": [
                {"from": "human", "value": "<image>\n" + SENTENCES[index % 4 * 2]},
                {"from": "gpt", "value": SENTENCES[index % 4 * 2 + 1]},
            ],
        })  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(items))


# ---------------------------------------------------------------------------------------------------
# one run of `xtuner train`


def config_text(case: Case) -> str:
    text = (HERE / "xtuner_config.py.txt").read_text()
    return (
        text.replace("@BATCH_SIZE@", str(4 // case.world))
        .replace("@FREEZE_LLM@", str(case.freeze_llm))
        .replace("@FREEZE_VISUAL_ENCODER@", str(case.freeze_visual_encoder))
        .replace("@LORA@", LLM_LORA * case.llm_lora + VISUAL_LORA * case.visual_encoder_lora)
        .replace("@SAVE_OPTIMIZER@", "" if case.save_optimizer else "\n        save_optimizer=False,")
    )


def deepspeed_config(stage: int) -> dict[str, Any]:
    """XTuner's own deepspeed_zero<stage>.json with its "auto" dtype decided: bf16."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "fp16": {"enabled": False, "initial_scale_power": 16},
        "bf16": {"enabled": True},
    }


def train(case: Case) -> None:
    """One rank, inside the output folder. Leaves the weights in memory in live.pt of the case."""
    prepare_xtuner()
    import deepspeed
    import torch
    from mmengine.runner import FlexibleRunner, Runner

    kept: list[Any] = []
    work = f"{case.name}/work_dirs"

    def keeping(original: Any) -> Any:
        def run(self: Any) -> Any:
            kept.append(self)
            self._work_dir = work  # mmengine made it absolute; it ends up in the checkpoint
            return original(self)

        return run

    FlexibleRunner.train = keeping(FlexibleRunner.train)
    Runner.train = keeping(Runner.train)
    sys.argv = ["train", f"{case.name}/config.py", "--work-dir", work]
    if case.stage is not None:
        sys.argv += ["--deepspeed", f"{case.name}/deepspeed.json", "--launcher", "pytorch"]
    from xtuner.tools.train import main

    main()
    model = kept[0].model
    if case.stage is not None:
        model = model.model.module
    live = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if case.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                live[name] = parameter.detach().clone()
        else:
            live[name] = parameter.detach().clone()
    if os.environ["RANK"] == "0":
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        torch.save({"live": live, "trained": trained}, f"{case.name}/live.pt")


def convert(case: Case) -> None:
    """XTuner's `convert pth_to_hf --save-format huggingface`, inside the output folder."""
    prepare_xtuner()
    import torch

    torch.manual_seed(4)
    sys.argv = ["pth_to_hf", f"{case.name}/config.py", f"{case.name}/work_dirs/iter_2.pth", f"{case.name}/to_hf",
                "--fp32", "--safe-serialization", "--save-format", "huggingface"]  # fmt: skip
    from xtuner.tools.model_converters.pth_to_hf import main

    main()


# ---------------------------------------------------------------------------------------------------
# after the run


def finish(case: Case) -> None:
    import deepspeed
    import torch
    from safetensors.torch import load_file, save_file

    here = pathlib.Path(case.name)
    work = here / "work_dirs"
    point = work / "iter_2.pth"
    kept = torch.load(here / "live.pt", weights_only=False)
    live, trained = kept["live"], kept["trained"]
    notes = []
    if point.is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        truth = dict(get_fp32_state_dict_from_zero_checkpoint(str(work), "iter_2.pth"))
        made_by = "DeepSpeed zero_to_fp32"
        header = torch.load(next(point.glob("*_model_states.pt")), weights_only=False, map_location="cpu")
    else:
        header = torch.load(point, weights_only=False, map_location="cpu")
        truth = header["state_dict"]
        made_by = "torch.load"
    for name, value in truth.items():
        if not torch.equal(value.to(live[name].dtype), live[name]):
            raise AssertionError(f"{case.name}: {name} differs from the weights in memory")
    lost = sorted(set(trained) - set(truth))
    if lost:
        raise AssertionError(f"{case.name}: trained but not in the checkpoint: {lost}")
    save_file({n: t.detach().clone().contiguous() for n, t in sorted(truth.items())}, here / "truth.safetensors")

    base = load_file("base_llm/model.safetensors")
    clip = torch.load("base_clip/pytorch_model.bin", weights_only=True)
    moved = 0
    for name, value in live.items():
        plain = name.replace("base_model.model.", "").replace("base_layer.", "")
        source = base if plain.startswith("llm.") else clip
        original = source.get(plain.split(".", 1)[1])
        if original is None:
            continue
        same = torch.equal(original.to(value.dtype), value)
        if name not in trained and not same:
            raise AssertionError(f"{case.name}: {name} was frozen and moved")
        moved += not same

    converter = "not run"
    if case.name in ("single_trainvit", "frozen_z2"):
        done = subprocess.run(
            [sys.executable, str(HERE / "make_xtuner.py"), "--out", ".", "--convert", case.name],
            capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        output = here / "to_hf"
        if done.returncode == 0:
            tensors = {}
            for file in sorted(output.glob("*.safetensors")):
                tensors.update(load_file(file))
            save_file(dict(sorted(tensors.items())), here / "to_hf_huggingface.safetensors")
            shutil.copy(output / "config.json", here / "to_hf_huggingface.config.json")
            notes.append(
                "XTuner's converter loads the tokenizer as LlamaTokenizerFast, which adds <unk> (298) first: <image> is"
                " 299 and <pad> 300 in to_hf_huggingface.config.json, not 298 and 299"
            )
            converter = f"ok, {len(tensors)} tensors in to_hf_huggingface.safetensors (its new vocabulary rows are random)"
        else:
            converter = "fails: " + [x for x in done.stderr.splitlines() if x.strip()][-1].strip()[:300]
            cause = [x.strip() for x in done.stderr.splitlines() if "Error" in x]
            if cause:
                converter = f"fails: {cause[-1][:200]} {converter[7:207]}"
        shutil.rmtree(output, ignore_errors=True)

    for extra in work.iterdir():
        if extra.name not in ("iter_2.pth", "last_checkpoint"):
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    (work / "last_checkpoint").write_text("iter_2.pth")
    (here / "live.pt").unlink()
    (here / "deepspeed.json").unlink(missing_ok=True)
    entry = "work_dirs/iter_2.pth"
    if not point.is_dir():
        point.rename(here / "iter_2.pth")
        shutil.rmtree(work)
        entry = "iter_2.pth"
    import transformers
    from mmengine import __version__ as mmengine_version
    from peft import __version__ as peft_version

    record = {
        "name": case.name,
        "xtuner": "0.2.0",
        "mmengine": mmengine_version,
        "deepspeed": deepspeed.__version__ if case.stage is not None else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft_version,
        "stage": case.stage,
        "world": case.world,
        "dtype": "fp32" if case.stage is None else "bf16",
        "features": list(case.features),
        "entry": entry,
        "kind": "directory" if "work_dirs" in entry else "file",
        "top_level_keys": list(header),
        "truth_made_by": made_by,
        "checks": {
            "tensors": len(truth),
            "equal_after_rounding_to_the_weights_in_memory": len(truth),
            "trained_parameters": len(trained),
            "base_weights_changed_by_training": moved,
        },
        "xtuner_pth_to_hf_huggingface": converter,
        "notes": "; ".join(notes),
    }
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(p.stat().st_size for p in here.rglob("*") if p.is_file())
    print(f"OK {case.name}: {len(truth)} tensors, {moved} base weights moved, {size} bytes; converter {converter}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    given = parser.parse_args()
    by_name = {case.name: case for case in CASES}
    if given.train:
        train(by_name[given.train])
        return 0
    if given.convert:
        convert(by_name[given.convert])
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    if not given.only:
        make_base_llm(pathlib.Path("base_llm"))
        make_base_clip(pathlib.Path("base_clip"))
    make_data(pathlib.Path("data"))
    status = 0
    os.environ["DS_ACCELERATOR"] = "cpu"
    for case in CASES:
        if given.only and case.name not in given.only:
            continue
        shutil.rmtree(case.name, ignore_errors=True)
        os.makedirs(case.name)
        pathlib.Path(case.name, "config.py").write_text(config_text(case))
        if case.stage is not None:
            pathlib.Path(case.name, "deepspeed.json").write_text(json.dumps(deepspeed_config(case.stage)))
        failed = spawn(script, ["--out", ".", "--train", case.name], case.world)
        if failed:
            print(f"FAILED {case.name}", flush=True)
            status = 1
            continue
        try:
            finish(case)
        except Exception:
            print(f"FAILED {case.name}\n{traceback.format_exc()}", flush=True)
            status = 1
    shutil.rmtree("data")
    return status


if __name__ == "__main__":
    sys.exit(main())
