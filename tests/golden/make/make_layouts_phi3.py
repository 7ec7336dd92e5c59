"""Makes the golden Phi-3 checkpoints (fused qkv_proj and gate_up_proj) and their truth as Llama.

    python make_layouts_phi3.py --out DIR --script convert_phi_to_llama.py

source/ is saved by transformers' Phi3ForCausalLM. With as many key-value heads as heads the truth is made by XTuner's
convert_phi_to_llama.py, run as it is (xtuner/configs/llava/phi3_mini_4k_instruct_clip_vit_large_p14_336/ of the xtuner
0.2.0 wheel); it cuts qkv_proj in thirds, so with fewer key-value heads the rows are cut here at the sizes of the heads,
as torchtune's phi3_hf_to_tune does. Both are proved by the logits of a LlamaForCausalLM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import tempfile
from typing import Any

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, contiguous, fresh, generator, largest_difference, randomize
from layouts import stand_in, versions, write_case, write_config, write_truth
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

HEADS, INTERMEDIATE = 4, 96
IDS = torch.randint(0, VOCAB, (2, 9), generator=generator("ids"))


def phi3_config(kv_heads: int) -> Any:
    return Phi3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=64,
        original_max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, pad_token_id=None, bos_token_id=1,
        eos_token_id=2, sliding_window=None, attn_implementation="eager",
    )  # fmt: skip


def by_xtuner(script: pathlib.Path, source: pathlib.Path, target: pathlib.Path) -> None:
    stand_in("mmengine")
    spec = importlib.util.spec_from_file_location("convert_phi_to_llama", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.mkdir_or_exist = lambda path: pathlib.Path(path).mkdir(exist_ok=True)
    module.AutoTokenizer = stand_in_tokenizer()
    module.convert_phi_to_llama(str(source), str(target))


def stand_in_tokenizer() -> Any:
    class Tokenizer:
        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            return Tokenizer

        @staticmethod
        def save_pretrained(path: str) -> None:
            pass

    return Tokenizer


def by_heads(state: dict[str, torch.Tensor], kv_heads: int) -> dict[str, torch.Tensor]:
    head = HIDDEN // HEADS
    truth = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            parts = tensor.split([HEADS * head, kv_heads * head, kv_heads * head])
            truth |= {name.replace("qkv", letter): part for letter, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            truth |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            truth[name] = tensor
    return truth


def make(out: pathlib.Path, name: str, kv_heads: int, script: pathlib.Path) -> None:
    case = fresh(out, name)
    model = Phi3ForCausalLM(phi3_config(kv_heads)).eval()
    randomize(model, case.name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    state = {key: tensor.bfloat16() for key, tensor in contiguous(model.state_dict()).items()}
    all_distinct(state)
    # small pieces, so that there is the index that the script reads
    model.save_pretrained(case / "source", state_dict=state, max_shard_size="40KB")
    saved = json.loads((case / "source" / "config.json").read_text())  # the model in memory is float32
    write_config(case / "source", saved | {"torch_dtype": "bfloat16"})
    if kv_heads == HEADS:
        with tempfile.TemporaryDirectory() as scratch:
            config = json.loads((case / "source" / "config.json").read_text())
            # the script drops these without asking whether they are there
            absent = {"_name_or_path": "", "embd_pdrop": 0.0, "resid_pdrop": 0.0}
            source, target = pathlib.Path(scratch, "in"), pathlib.Path(scratch, "out")
            source.mkdir()
            for file in (case / "source").iterdir():
                (source / file.name).write_bytes(file.read_bytes())
            (source / "config.json").write_text(json.dumps(absent | config))
            by_xtuner(script, source, target)
            truth = {}
            for file in sorted(target.glob("*.safetensors")):
                truth |= load_file(file)
            written = json.loads((target / "config.json").read_text())
        function, made_with = "convert_phi_to_llama of XTuner's convert_phi_to_llama.py", {"xtuner": "0.2.0"}
    else:
        truth = by_heads(state, kv_heads)
        written = json.loads((case / "source" / "config.json").read_text())
        written |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        function, made_with = "make_layouts_phi3.by_heads", {}
    all_distinct(truth)
    write_truth(case, truth, written)
    twin = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in written.items() if k != "model_type"})).eval()
    twin.load_state_dict({key: tensor.float() for key, tensor in truth.items()}, strict=True)
    with torch.no_grad():
        difference = largest_difference(model(IDS).logits, twin(IDS).logits, 2e-5)
    write_case(
        case, tool="transformers Phi3ForCausalLM", made_with=versions("transformers", "safetensors") | made_with,
        function=function, entry="", forward=kv_heads == HEADS, backward=False,
        checks={"logits_source_model_vs_truth": difference},
        sizes={
            "heads": HEADS, "kv_heads": kv_heads, "head_dim": HIDDEN // HEADS, "hidden": HIDDEN,
            "intermediate": INTERMEDIATE, "layers": LAYERS, "vocab": VOCAB,
        },
        notes=["sharded safetensors with an index"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--script", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    make(arguments.out, "phi3_to_llama_mha", 4, arguments.script)
    make(arguments.out, "phi3_to_llama_gqa", 2, arguments.script)


if __name__ == "__main__":
    main()
