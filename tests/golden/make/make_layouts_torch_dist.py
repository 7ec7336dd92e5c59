"""Makes the golden checkpoints of Megatron-Core's format `torch_dist`, and their Hugging Face truth.

    python make_layouts_torch_dist.py --out DIR [--only NAME ...]

Every rank is a process with megatron-core's own GPTModel of random weights, over gloo; megatron-core's own
dist_checkpointing saves it. The `args` beside the weights are the part of Megatron-LM's arguments that describes the
model. The truth is made by the rules below from what torch's own reader finds in the files, and proved: the model of all
the ranks together gives the logits of the transformers model that loads the truth.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from layouts import all_distinct, fresh, generator, is_norm, largest_difference, random_tensor, versions, write_case
from layouts import write_truth
from processes import spawn

SCRIPT = pathlib.Path(__file__).resolve()
HIDDEN, LAYERS, HEADS, GROUPS, HEAD, FFN = 16, 2, 4, 2, 8, 24
VOCAB, PADDED, CONTEXT = 50, 64, 64
EXPERTS, CHOSEN = 4, 2


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: str  # the model type of transformers
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    numbered: bool = False  # every layer has a number in its name, instead of a leading dimension for all
    grouped: bool = True  # heads share keys and values
    split: bool = False  # so has every expert, and gate and up are two tensors (singleton_local_shards)
    engine: bool = False  # the norm before experts is called as TransformerEngine's layers call it
    tied: bool = False
    prefix: str = ""  # what NeMo puts before every name
    stated: bool = False  # `args` says the vocabulary without its padding

    @property
    def world(self) -> int:
        return max(self.tensor * self.pipeline, self.expert)

    @property
    def groups(self) -> int:
        return GROUPS if self.grouped else HEADS

    @property
    def experts(self) -> int | None:
        return EXPERTS if self.kind in ("mixtral", "qwen3_moe") else None

    @property
    def qk_norm(self) -> bool:
        return self.kind.startswith("qwen3")


CASES = (
    Case("torch_dist_llama_tp2_pp2", "llama", tensor=2, pipeline=2),
    Case("torch_dist_llama_mha", "llama", grouped=False),
    Case("torch_dist_llama_numbered_tp2", "llama", tensor=2, numbered=True, stated=True),
    Case("torch_dist_qwen2_tied_pp2", "qwen2", pipeline=2, tied=True),
    Case("torch_dist_qwen3_tp2", "qwen3", tensor=2),
    Case("torch_dist_mixtral_ep2", "mixtral", expert=2),
    Case("torch_dist_mixtral_numbered", "mixtral", numbered=True, engine=True),
    Case("torch_dist_mixtral_split_ep2", "mixtral", expert=2, numbered=True, split=True),
    Case("torch_dist_llama_split", "llama", numbered=True, split=True),
    Case("torch_dist_qwen3_moe_ep2", "qwen3_moe", expert=2),
    Case("torch_dist_nemo1_tp2", "llama", tensor=2, prefix="model."),
    Case("torch_dist_nemo2_tied", "llama", tied=True, prefix="module."),
)


def build(case: Case) -> Any:
    import megatron.core.tensor_parallel as tensor_parallel
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # a name that 0.16.1 leaves undefined without TransformerEngine
    # megatron-core asks CUDA for the device of its rotary table and for its dropout's random state, waits for its
    # streams before it saves, and brings a tied head to it
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment,method-assign]
    tensor_parallel.get_cuda_rng_tracker = lambda: types.SimpleNamespace(fork=contextlib.nullcontext)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(case.tensor, case.pipeline, expert_model_parallel_size=case.expert)
    experts: dict[str, Any] = {
        "num_moe_experts": case.experts, "moe_router_topk": CHOSEN, "moe_ffn_hidden_size": FFN,
        "expert_model_parallel_size": case.expert, "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none", "moe_grouped_gemm": False,
    } if case.experts else {}  # fmt: skip
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=case.groups,
        ffn_hidden_size=FFN, kv_channels=HEAD, tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline, use_cpu_initialization=True, perform_initialization=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=case.kind == "qwen2", qk_layernorm=case.qk_norm, normalization="RMSNorm", layernorm_epsilon=1e-5,
        hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        params_dtype=torch.float32, pipeline_dtype=torch.float32, **experts,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=case.experts, qk_layernorm=case.qk_norm, normalization="RMSNorm")
    if case.engine:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(
        config, spec, vocab_size=PADDED, max_sequence_length=CONTEXT,
        position_embedding_type="rope", rotary_base=10000, share_embeddings_and_output_weights=case.tied,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
    ).eval()  # fmt: skip


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, 9), generator=generator("ids"))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor | None:
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
    if parallel_state.is_pipeline_last_stage():
        return output
    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


@torch.no_grad()
def randomize(case: Case, model: Any) -> None:
    """Give every parameter values of its own, and replicas of one parameter the same; bf16 values in float32."""
    from megatron.core import parallel_state

    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    ep = parallel_state.get_expert_model_parallel_rank()
    for name, parameter in model.named_parameters():
        vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        shared = "shared" if case.tied and vocabulary else f"{pp}/{name}"
        cut = getattr(parameter, "tensor_model_parallel", False)
        owner = f"{tp if cut else 'all'}/{ep if '.experts.' in name else 'all'}"
        value = random_tensor(f"{case.name}/{owner}/{shared}", parameter.shape, torch.bfloat16, is_norm(name))
        parameter.copy_(value)


def arguments_of(case: Case) -> argparse.Namespace:
    """The part of Megatron-LM's arguments that describes the model, as it is pickled beside the weights."""
    return argparse.Namespace(
        tensor_model_parallel_size=case.tensor, pipeline_model_parallel_size=case.pipeline, num_layers=LAYERS,
        expert_model_parallel_size=case.expert, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        kv_channels=HEAD, group_query_attention=case.grouped, num_query_groups=case.groups if case.grouped else 1,
        swiglu=True, normalization="RMSNorm",
        norm_epsilon=1e-5, position_embedding_type="rope", rotary_base=10000, add_bias_linear=False,
        add_qkv_bias=case.kind == "qwen2", qk_layernorm=case.qk_norm, untie_embeddings_and_output_weights=not case.tied,
        make_vocab_size_divisible_by=PADDED // case.tensor, padded_vocab_size=PADDED, vocab_size=VOCAB if case.stated else None,
        max_position_embeddings=CONTEXT, params_dtype=torch.bfloat16, iteration=1, transformer_impl="local",
        num_experts=case.experts, moe_router_topk=CHOSEN, moe_ffn_hidden_size=FFN if case.experts else None,
        moe_router_pre_softmax=False, moe_router_score_function="softmax", moe_layer_freq=1,
        moe_shared_expert_intermediate_size=None,
    )  # fmt: skip


def place(case: Case, folder: pathlib.Path) -> pathlib.Path:
    """Where the checkpoint itself is: NeMo 2 keeps it in weights/, beside context/."""
    return folder / "source" / ("weights" if case.prefix == "module." else "iter_0000001")


def worker(case: Case, folder: pathlib.Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state

    torch.set_num_threads(1)
    model = build(case)
    randomize(case, model)
    logits = logits_of(model)
    if logits is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        torch.save(logits, folder / "logits.tmp")
    model.bfloat16()
    metadata = {"non_homogeneous_layers": case.numbered, "singleton_local_shards": case.split}
    state = model.sharded_state_dict(prefix=case.prefix, metadata=metadata)
    nemo2 = case.prefix == "module."
    common = {"epoch": 0, "global_step": 1} if nemo2 else {"args": arguments_of(case), "checkpoint_version": 3.0}
    target = place(case, folder)
    if torch.distributed.get_rank() == 0:
        target.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save({**common, "iteration": 1, **state}, str(target))
    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def whole_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """What torch's own reader makes of the files, on one rank."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in described.items()
        if isinstance(one, TensorStorageMetadata)
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def layers_of(case: Case, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each layer, by their names inside of it."""
    if case.numbered:
        start = "decoder.layers.{}."
        return [
            {name.removeprefix(start.format(i)): one for name, one in state.items() if name.startswith(start.format(i))}
            for i in range(LAYERS)
        ]
    stacked = {name.removeprefix("decoder.layers."): one for name, one in state.items() if ".layers." in name}
    return [{name: one[i] for name, one in stacked.items()} for i in range(LAYERS)]


def together(case: Case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole model in Hugging Face names."""
    state = {name.removeprefix(case.prefix): one for name, one in state.items()}
    truth = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][:VOCAB],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    if not case.tied:
        truth["lm_head.weight"] = state["output_layer.weight"][:VOCAB]
    for i, layer in enumerate(layers_of(case, state)):
        truth |= {f"model.layers.{i}.{name}": one for name, one in attention(case, layer)}
        truth |= {f"model.layers.{i}.{name}": one for name, one in feed_forward(case, layer)}
    return truth


def attention(case: Case, layer: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", layer["self_attention.linear_qkv.layer_norm_weight"]
    for kind in ("weight", "bias") if case.kind == "qwen2" else ("weight",):
        whole = layer[f"self_attention.linear_qkv.{kind}"].unflatten(0, (case.groups, HEADS // case.groups + 2, HEAD))
        for name, part in (("q", whole[:, :-2]), ("k", whole[:, -2:-1]), ("v", whole[:, -1:])):
            yield f"self_attn.{name}_proj.{kind}", part.flatten(0, 2)
    yield "self_attn.o_proj.weight", layer["self_attention.linear_proj.weight"]
    for name in ("q", "k") if case.qk_norm else ():
        yield f"self_attn.{name}_norm.weight", layer[f"self_attention.{name}_layernorm.weight"]


def feed_forward(case: Case, layer: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    norm = "pre_mlp_layernorm.weight" if case.engine else "mlp.linear_fc1.layer_norm_weight"
    yield "post_attention_layernorm.weight", layer[norm]
    block, parts = {
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    }.get(case.kind, ("mlp", ("gate_proj", "up_proj", "down_proj")))  # fmt: skip
    if not case.experts:
        for name, part in zip(parts, projections(case, layer, "mlp.", None), strict=True):
            yield f"mlp.{name}.weight", part
        return
    yield f"{block}.gate.weight", layer["mlp.router.weight"]
    for e in range(EXPERTS):
        prefix = f"mlp.experts.experts.{e}." if case.split else "mlp.experts.experts."
        for name, part in zip(parts, projections(case, layer, prefix, None if case.split else e), strict=True):
            yield f"{block}.experts.{e}.{name}.weight", part


def projections(
    case: Case, layer: dict[str, torch.Tensor], prefix: str, expert: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate, up and down of a layer, or of one of its stacked experts."""
    whole = {name: one if expert is None else one[expert] for name, one in layer.items() if name.startswith(prefix)}
    if case.split:
        gate, up = (whole[f"{prefix}linear_fc1.weight_{half}"] for half in "wv")
    else:
        gate, up = whole[f"{prefix}linear_fc1.weight"].chunk(2)
    return gate, up, whole[f"{prefix}linear_fc2.weight"]


def config_of(case: Case) -> Any:
    import transformers

    kinds = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}
    family = kinds[case.kind]
    experts = {
        "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN},
        "qwen3_moe": {
            "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": FFN, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        },
    }.get(case.kind, {})  # fmt: skip
    return getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=case.groups, head_dim=HEAD, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=case.tied, architectures=[f"{family}ForCausalLM"],
        bos_token_id=1, eos_token_id=2, **experts,
    )  # fmt: skip


def make(case: Case, out: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = fresh(out, case.name)
    if spawn(str(SCRIPT), ["--worker", case.name, "--out", str(out)], case.world):
        raise SystemExit(f"{case.name}: a rank failed")
    if case.prefix != "module.":
        (folder / "source" / "latest_checkpointed_iteration.txt").write_text("1")
    truth = together(case, whole_tensors(place(case, folder)))
    all_distinct(truth)
    # configs of transformers 5 alone hold rope_parameters; older ones read rope_theta
    write_truth(folder, truth, config_of(case).to_dict() | {"rope_theta": 10000.0, "dtype": "bfloat16"})
    twin, told = AutoModelForCausalLM.from_pretrained(
        folder / "truth", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    with torch.no_grad():
        ours = torch.load(folder / "logits.tmp")
        difference = largest_difference(ours[..., :VOCAB], twin.eval()(ids()).logits, 2e-5)
    (folder / "logits.tmp").unlink()
    write_case(
        folder, tool="megatron-core GPTModel and dist_checkpointing.save; truth proved by the logits",
        made_with=versions("megatron-core", "transformers", "safetensors"),
        function="torch.distributed.checkpoint's reader, then make_layouts_torch_dist.together",
        entry="", forward=False, backward=False, checks={"logits_source_model_vs_truth": difference},
        sizes={
            "tensor_parallel": case.tensor, "pipeline_parallel": case.pipeline, "expert_parallel": case.expert,
            "heads": HEADS, "kv_heads": case.groups, "head_dim": HEAD, "hidden": HIDDEN, "intermediate": FFN,
            "layers": LAYERS, "vocab": VOCAB, "padded_vocab": PADDED, "experts": case.experts or 0,
        },
        notes=[
            f"rows from {VOCAB} on of the embedding and the head are padding of the vocabulary, random here",
            "every layer has its number in its names" if case.numbered else "layers are stacked in the leading dimension",
            *([f"NeMo's prefix {case.prefix!r} before every name, given to sharded_state_dict"] if case.prefix else []),
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    os.chdir(arguments.out)  # the path of the checkpoint stands in its .metadata
    arguments.out = pathlib.Path()
    if arguments.worker:
        case = next(case for case in CASES if case.name == arguments.worker)
        worker(case, arguments.out / case.name)
        return
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            make(case, arguments.out)


if __name__ == "__main__":
    main()
