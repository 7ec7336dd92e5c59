"""Makes the golden Megatron-Core checkpoints (tensor and pipeline parallel) and their Hugging Face truth.

    python make_layouts_megatron.py --out DIR [--only NAME ...]

Every rank is a process with megatron-core's own GPTModel of random weights, over gloo. The state dicts are put into the
envelope of Megatron-LM's `torch` checkpoints (iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt), which is not part of
megatron-core. The truth is made by the rules below and proved: the model of all the ranks together gives the logits
of the transformers model with the truth. The rules are those of Megatron-LM tools/checkpoint (loader_core.py,
saver_hf.py) and of megatron/core/transformer: linear_qkv is [groups, heads per group + 2, head_dim], linear_fc1 is [gate;
up] on every rank, the vocabulary is padded, and every pipeline stage counts its layers from zero.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import types
from typing import Any

import torch
from layouts import HIDDEN, VOCAB, all_distinct, contiguous, fresh, generator, is_norm, largest_difference
from layouts import random_tensor, versions, write_case, write_truth
from processes import spawn

HEAD, INTERMEDIATE, PADDED = 8, 96, 128


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    tensor: int
    pipeline: int
    layers: int
    kv_heads: int = 2
    qkv_bias: bool = False
    fused_norms: bool = False  # the names that TransformerEngine's fused layers give

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    @property
    def heads(self) -> int:
        return HIDDEN // HEAD


CASES = (
    Case("megatron_tp1_pp1_gqa", 1, 1, 2),
    Case("megatron_tp2_pp1_mha", 2, 1, 2, kv_heads=4),
    Case("megatron_tp2_pp1_gqa_te_names", 2, 1, 2, fused_norms=True),
    Case("megatron_tp2_pp2_gqa", 2, 2, 4),
    Case("megatron_tp2_pp1_gqa_qkv_bias", 2, 1, 2, qkv_bias=True),
)
FUSED = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)


def build(case: Case) -> Any:
    import megatron.core.tensor_parallel as tensor_parallel
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    # megatron-core asks CUDA for the device of its rotary table and for its dropout's random state
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(case.tensor, case.pipeline)
    config = TransformerConfig(
        num_layers=case.layers, hidden_size=HIDDEN, num_attention_heads=case.heads, num_query_groups=case.kv_heads,
        ffn_hidden_size=INTERMEDIATE, kv_channels=HEAD, tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline, use_cpu_initialization=True, perform_initialization=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=case.qkv_bias, normalization="RMSNorm", layernorm_epsilon=1e-5, hidden_dropout=0.0,
        attention_dropout=0.0, bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=PADDED, max_sequence_length=64,
        position_embedding_type="rope", rotary_base=10000, share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
    ).eval()  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, 9), generator=generator("ids"))


@torch.no_grad()
def logits_of(model: Any, last: bool) -> torch.Tensor | None:
    """One forward pass through all pipeline stages; the logits on the last."""
    from megatron.core import parallel_state

    tokens = ids()
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(length, 1, HIDDEN)
        torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received)
    output = model(tokens, torch.arange(length)[None], mask)
    if last:
        return output
    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def arguments_of(case: Case) -> argparse.Namespace:
    """The part of Megatron-LM's arguments that describes the model, as it is pickled beside the weights."""
    return argparse.Namespace(
        tensor_model_parallel_size=case.tensor, pipeline_model_parallel_size=case.pipeline, num_layers=case.layers,
        hidden_size=HIDDEN, ffn_hidden_size=INTERMEDIATE, num_attention_heads=case.heads, kv_channels=HEAD,
        group_query_attention=case.kv_heads != case.heads, num_query_groups=case.kv_heads, swiglu=True,
        normalization="RMSNorm", norm_epsilon=1e-5, position_embedding_type="rope", rotary_base=10000,
        add_bias_linear=False, add_qkv_bias=case.qkv_bias, untie_embeddings_and_output_weights=True,
        make_vocab_size_divisible_by=64, padded_vocab_size=PADDED, vocab_size=VOCAB, max_position_embeddings=64,
        params_dtype=torch.bfloat16, iteration=1,
        transformer_impl="transformer_engine" if case.fused_norms else "local",
    )  # fmt: skip


def worker(case: Case, folder: pathlib.Path) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    model = build(case)
    tp = parallel_state.get_tensor_model_parallel_rank()
    pp = parallel_state.get_pipeline_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = "all" if parameter.ndim == 1 and is_norm(name) else tp
            value = random_tensor(f"{case.name}/{pp}/{owner}/{name}", parameter.shape, torch.bfloat16, is_norm(name))
            parameter.copy_(value)
    last = parallel_state.is_pipeline_last_stage()
    logits = logits_of(model, last)
    if last and tp == 0:
        torch.save(logits, folder / "logits.tmp")
    state = {
        name: tensor.bfloat16() if isinstance(tensor, torch.Tensor) else tensor
        for name, tensor in model.state_dict().items()
    }
    if case.fused_norms:
        for plain, fused in FUSED:
            state = {name.replace(plain, fused): tensor for name, tensor in state.items()}
        state |= {name: torch.empty(0, dtype=torch.uint8) for name in state if name.endswith("_extra_state")}
    directory = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if case.pipeline > 1 else "")
    target = folder / "source" / "iter_0000001" / directory
    target.mkdir(parents=True)
    envelope = {"args": arguments_of(case), "checkpoint_version": 3.0, "iteration": 1, "model": state}
    torch.save(envelope, target / "model_optim_rng.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def together(case: Case, shards: dict[tuple[int, int], dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The whole model in Hugging Face names."""
    first, last, per_stage = 0, case.pipeline - 1, case.layers // case.pipeline
    truth = {
        "model.embed_tokens.weight": joined(case, shards, first, "embedding.word_embeddings.weight", 0)[:VOCAB],
        "model.norm.weight": shards[0, last]["decoder.final_layernorm.weight"],
        "lm_head.weight": joined(case, shards, last, "output_layer.weight", 0)[:VOCAB],
    }
    norms = dict(FUSED)
    for layer in range(case.layers):
        stage, local = divmod(layer, per_stage)
        here, there = f"decoder.layers.{local}.", f"model.layers.{layer}."
        for plain, target in (
            ("input_layernorm.weight", "input_layernorm.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        ):
            truth[there + target] = shards[0, stage][here + (norms[plain] if case.fused_norms else plain)]
        for kind in ("weight", "bias") if case.qkv_bias else ("weight",):
            groups = [
                shards[rank, stage][f"{here}self_attention.linear_qkv.{kind}"].unflatten(0, (-1, case_rows(case), HEAD))
                for rank in range(case.tensor)
            ]
            whole = torch.cat(groups)
            for name, part in (("q", whole[:, :-2]), ("k", whole[:, -2:-1]), ("v", whole[:, -1:])):
                truth[f"{there}self_attn.{name}_proj.{kind}"] = part.flatten(0, 2)
        truth[f"{there}self_attn.o_proj.weight"] = joined(
            case, shards, stage, f"{here}self_attention.linear_proj.weight", 1
        )
        pairs = [shards[rank, stage][f"{here}mlp.linear_fc1.weight"].chunk(2) for rank in range(case.tensor)]
        truth[f"{there}mlp.gate_proj.weight"] = torch.cat([gate for gate, _ in pairs])
        truth[f"{there}mlp.up_proj.weight"] = torch.cat([up for _, up in pairs])
        truth[f"{there}mlp.down_proj.weight"] = joined(case, shards, stage, f"{here}mlp.linear_fc2.weight", 1)
    return contiguous(truth)


def case_rows(case: Case) -> int:
    return case.heads // case.kv_heads + 2


def joined(case: Case, shards: Any, stage: int, name: str, dim: int) -> torch.Tensor:
    return torch.cat([shards[rank, stage][name] for rank in range(case.tensor)], dim)


def config_of(case: Case) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    kind, architecture = (Qwen2Config, "Qwen2ForCausalLM") if case.qkv_bias else (LlamaConfig, "LlamaForCausalLM")
    return kind(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, max_position_embeddings=64,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, architectures=[architecture],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def make(case: Case, out: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = fresh(out, case.name)
    if spawn(__file__, ["--worker", case.name, "--out", str(out)], case.world):
        raise SystemExit(f"{case.name}: a rank failed")
    (folder / "source" / "latest_checkpointed_iteration.txt").write_text("1")
    shards = {}
    for path in sorted((folder / "source").glob("iter_*/mp_rank_*/model_optim_rng.pt")):
        rank = [int(part) for part in path.parent.name.split("_")[2:]]
        loaded = torch.load(path, map_location="cpu", weights_only=False)
        shards[rank[0], rank[1] if len(rank) > 1 else 0] = loaded["model"]
    truth = together(case, shards)
    all_distinct(truth)
    config = config_of(case)
    twin = AutoModelForCausalLM.from_config(config).float().eval()
    twin.load_state_dict({name: tensor.float() for name, tensor in truth.items()}, strict=True)
    with torch.no_grad():
        ours = torch.load(folder / "logits.tmp")
        difference = largest_difference(ours[..., :VOCAB], twin(ids()).logits, 2e-5)
    (folder / "logits.tmp").unlink()
    # configs of transformers 5 alone hold rope_parameters; older ones read rope_theta
    write_truth(case=folder, state=truth, config=config.to_dict() | {"rope_theta": 10000.0, "dtype": "bfloat16"})
    write_case(
        folder, tool="megatron-core GPTModel; truth by the rules of Megatron-LM tools/checkpoint, proved by the logits",
        made_with=versions("megatron-core", "transformers", "safetensors"),
        function="megatron.core.models.gpt.GPTModel.state_dict, gathered by make_layouts_megatron.together",
        entry="", forward=False, backward=False, checks={"logits_source_model_vs_truth": difference},
        sizes={
            "tensor_parallel": case.tensor, "pipeline_parallel": case.pipeline, "heads": case.heads,
            "kv_heads": case.kv_heads, "head_dim": HEAD, "hidden": HIDDEN, "intermediate": INTERMEDIATE,
            "layers": case.layers, "vocab": VOCAB, "padded_vocab": PADDED, "qkv_bias": case.qkv_bias,
        },
        notes=[
            "layout `torch` of Megatron-LM: source/iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt, key 'model'; 'args'"
            " is an argparse.Namespace",
            "rows from 112 on of the embedding and the head are padding of the vocabulary, random here",
            *(["every stage counts its layers from zero"] if case.pipeline > 1 else []),
            *(["the names of TransformerEngine's layers, put there by renaming (it needs an accelerator);"
               " *._extra_state are empty uint8 tensors"] if case.fused_norms
              else ["*._extra_state is None, as megatron-core's local layers leave it"]),
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        case = next(case for case in CASES if case.name == arguments.worker)
        worker(case, arguments.out / case.name)
        return
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            make(case, arguments.out)


if __name__ == "__main__":
    main()
