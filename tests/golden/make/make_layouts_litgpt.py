"""Makes the golden litgpt checkpoint of the litgpt that is importable, and its Hugging Face truth.

    python make_layouts_litgpt.py --out DIR

litgpt 0.5 names the fused projection attn.qkv and keeps q, k and v one after the other; up to 0.4 it is attn.attn, and
q, k and v are interleaved per group of heads. source/ is litgpt's own GPT, truth/ what convert_lit_checkpoint makes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import tempfile

import torch
from layouts import HIDDEN, LAYERS, VOCAB, all_distinct, contiguous, fresh, generator, largest_difference, randomize
from layouts import same_bits, versions, write_case, write_truth
from litgpt.model import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, INTERMEDIATE = 4, 96
IDS = torch.randint(0, VOCAB, (2, 9), generator=generator("ids"))


def make(out: pathlib.Path, kv_heads: int, nested: bool) -> None:
    made_with = versions("litgpt", "lightning", "transformers", "safetensors")
    old = made_with["litgpt"].startswith("0.4")
    name = f"litgpt{'_old' if old else ''}_llama_{'mha' if kv_heads == HEADS else 'gqa'}"
    case = fresh(out, name)
    config = Config(
        name="tiny-llama", block_size=64, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS,
        n_query_groups=kv_heads, n_embd=HIDDEN, intermediate_size=INTERMEDIATE, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = GPT(config)
    randomize(model, case.name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    state = {key: tensor.bfloat16() for key, tensor in contiguous(model.state_dict()).items()}
    all_distinct(state)
    source = case / "source"
    torch.save({"model": state} if nested else state, source / "lit_model.pth")
    save_config(config, source)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        convert_lit_checkpoint(source, pathlib.Path(scratch))
        loaded = torch.load(pathlib.Path(scratch) / "model.pth", map_location="cpu", weights_only=False)
    truth = contiguous(loaded)
    back: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, back, dict(truth))
    same_bits(back, state)
    hf = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_theta=10000.0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    twin = LlamaForCausalLM(hf).eval()
    twin.load_state_dict({key: tensor.float() for key, tensor in truth.items()}, strict=True)
    with torch.no_grad():
        difference = largest_difference(model.eval()(IDS), twin(IDS).logits, 2e-5)
    written = hf.to_dict() | {"rope_theta": 10000.0, "rope_scaling": None, "dtype": "bfloat16"}
    write_truth(case, truth, written)
    write_case(
        case, tool="litgpt", made_with=made_with,
        function="litgpt.scripts.convert_lit_checkpoint.convert_lit_checkpoint", entry="lit_model.pth", forward=True,
        backward=True,
        checks={
            "logits_source_model_vs_truth": difference, "copy_weights_hf_llama_of_truth": "bit-equal to source",
        },
        sizes={
            "heads": HEADS, "kv_heads": kv_heads, "head_dim": HIDDEN // HEADS, "hidden": HIDDEN,
            "intermediate": INTERMEDIATE, "layers": LAYERS, "vocab": VOCAB,
        },
        notes=[
            "attn.attn.weight: q, k and v interleaved per group of heads" if old
            else "attn.qkv.weight: q, k and v one after the other",
            "lit_model.pth has the key 'model', as after training" if nested
            else "lit_model.pth is the bare state dict, as convert_hf_checkpoint writes it",
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    make(arguments.out, 2, nested=True)
    make(arguments.out, 4, nested=False)


if __name__ == "__main__":
    main()
