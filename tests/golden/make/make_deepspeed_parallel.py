"""Makes the golden checkpoints of DeepSpeed's other parallelisms: experts, tensor parallel ranks, hpZ and MiCS.

    python make_deepspeed_parallel.py --out DIR [--only NAME ...] [--list]

Every case trains a tiny model for two steps and saves it with DeepSpeed's own `save_checkpoint`. The truth is gathered
over the ranks from the weights in memory: the fp32 masters where the optimizer is one of ZeRO's, else the weights that
the model computes with. Tensor parallel masters are joined by DeepSpeed's own `ds_to_universal` and, where it does not
know a layout, by the rule that the case itself was cut by.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import installed_version, prepare_deepspeed, spawn, version_tuple


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: str  # a function of this file
    stage: int
    world: int
    features: tuple[str, ...]
    dtype: str = "bf16"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def cases_of(version: tuple[int, ...]) -> list[Case]:
    if version < (0, 19):
        prefix = "v" + "_".join(str(part) for part in version) + "_"
        cases = [
            Case(f"{prefix}moe_z2_ep2_w4_bf16", "moe", 2, 4, ("4 experts over 2 ranks, twice",), options={"ep": (2, 2)}),
            Case(f"{prefix}moe_z0_ep2_w2_fp16", "moe", 0, 2, ("4 experts over 2 ranks",), "fp16", options={"ep": (2, 2)}),
        ]
        if version >= (0, 16):
            cases.append(Case(f"{prefix}mics_z3_s2_w4_bf16", "partitions", 3, 4, ("MiCS, shards over 2 of 4 ranks",),
                              zero={"mics_shard_size": 2}))  # fmt: skip
            cases.append(Case(f"{prefix}autotp_z1_tp2_w2_bf16", "autotp", 1, 2, ("AutoTP, says nothing of its layout",),
                              options={"model": "llama"}))  # fmt: skip
        return cases
    return [
        Case("moe_z0_ep2_w2_bf16", "moe", 0, 2, ("4 experts over 2 ranks", "residual experts"),
             options={"ep": (2,), "residual": True}),
        Case("moe_z2_ep1_w2_bf16", "moe", 2, 2, ("4 experts on each of 2 ranks",), options={"ep": (1, 1)}),
        Case("moe_z2_ep2_w2_bf16", "moe", 2, 2, ("4 experts over 2 ranks", "frozen parameters", "frozen experts"),
             options={"ep": (2, 2), "frozen": True}),
        Case("moe_z1_ep2_w4_bf16", "moe", 1, 4, ("4 experts over 2 ranks, twice",), options={"ep": (2, 2)}),
        Case("moe_z2_ep1_ep2_w2_bf16", "moe", 2, 2, ("layers with 4 experts on each rank and over both",),
             options={"ep": (1, 2)}),
        Case("moe_z2_data_first_w4_bf16", "moe", 2, 4, ("4 experts over 2 ranks", "use_data_before_expert_parallelism"),
             config={"use_data_before_expert_parallelism": True}, options={"ep": (2, 2)}),
        Case("autotp_z1_tp2_w2_bf16", "autotp", 1, 2, ("rows, columns, vocabulary, replicated",), options={"model": "llama"}),
        Case("autotp_z2_tp2_w4_bf16", "autotp", 2, 4, ("rows, columns, vocabulary, replicated", "2 data-parallel ranks"),
             options={"model": "llama"}),
        Case("autotp_z3_tp2_w4_bf16", "autotp", 3, 4, ("rows, columns, vocabulary, replicated", "2 data-parallel ranks"),
             options={"model": "llama"}),
        Case("autotp_z0_tp2_w2_bf16", "autotp", 0, 2, ("rows, columns, vocabulary, replicated",), options={"model": "llama"}),
        Case("autotp_uneven_z1_tp3_w3_bf16", "autotp", 1, 3, ("3 ranks, 2 key-value heads: one rank has none of them",),
             options={"model": "llama", "tp": 3}),
        Case("autotp_tied_z1_tp2_w2_bf16", "autotp", 1, 2, ("tied embedding, cut along the vocabulary",),
             options={"model": "llama", "tied": True}),
        Case("autotp_fused_z1_tp2_w4_bf16", "autotp", 1, 4, ("fused q, k, v of unequal sizes", "fused gate and up", "biases"),
             options={"model": "fused"}),
        Case("megatron_z1_tp2_w4_bf16", "megatron", 1, 4, ("padded vocabulary", "two sub-parameters", "rows", "replicated"),
             config={}, options={}),
        Case("hpz_z3_w4_bf16", "partitions", 3, 4, ("hpZ, 2 of 4 ranks",), zero={"zero_hpz_partition_size": 2}),
    ]  # fmt: skip


def config_of(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.config,
    }
    if case.stage:
        config["zero_optimization"] = {"stage": case.stage, "overlap_comm": False, **case.zero}
    config[case.dtype] = {"enabled": True} | ({"initial_scale_power": 4} if case.dtype == "fp16" else {})
    return config


def train(case: Case, engine: Any, batch: Any, **client: Any) -> None:
    """Two steps; `batch` gives a loss for a step and a data-parallel rank's seed."""
    for step in range(2):
        engine.backward(batch(step))
        engine.step()
    engine.save_checkpoint(f"{case.name}/ckpt", client_state={"note": "tiny", **client})


def gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """What all ranks hold under their names; those of one name are equal."""
    import torch
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if not torch.equal(found.setdefault(name, value), value):
                raise AssertionError(f"{name} differs over the ranks")
    return found


def weights(engine: Any, stage: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's parameters and buffers as the model has them, and its fp32 masters, whole over its partitions."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    live, masters = {}, {}
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                live[name] = parameter.detach().clone()
        else:
            live[name] = parameter.detach().clone()
        if stage and not live[name].numel():  # an optimizer has nothing of it
            masters[name] = live[name].float()
        elif stage and parameter.requires_grad:
            masters[name] = safe_get_full_fp32_param(parameter).detach().clone().reshape(live[name].shape)
    saved = set(engine.module.state_dict())
    live |= {name: buffer.detach().clone() for name, buffer in engine.module.named_buffers() if name in saved}
    return live, masters


# ---- experts


def moe(case: Case, rank: int) -> dict[str, Any]:
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp = nn.Linear(6, 8)
            self.register_buffer("offset", torch.linspace(0, 1, 8))
            self.moes = nn.ModuleList(
                MoE(8, nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), num_experts=4, ep_size=ep, k=1, use_residual=case.options.get("residual", False))
                for ep in case.options["ep"]
            )
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, total = self.inp(x) + self.offset.to(x.dtype), 0.0
            for layer in self.moes:
                hidden, balance, _ = layer(hidden)
                total = total + balance.float()
            return self.out(self.norm(hidden)).float().pow(2).mean() + total

    model = Model()
    for name, parameter in model.named_parameters():
        # every rank and expert starts with values of its own
        local = [int(part) for part in name.split(".") if part.isdigit()]
        own = [1 + case.world * local[1] + rank] if "experts" in name else [0]
        generator = torch.Generator().manual_seed(1000 * sum(map(ord, name.replace(f".{local[1]}.", "") if own[0] else name)) + own[0])
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        if case.options.get("frozen") and ("inp" in name or name.startswith("moes.0") and name.endswith("1.bias")):
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        split_params_into_different_moe_groups_for_optimizer({"params": trained, "name": "all"}), lr=1e-2
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case))
    dtype = next(engine.module.parameters()).dtype

    def loss(step: int) -> Any:
        generator = torch.Generator().manual_seed(10 * step + rank)
        return engine(torch.randn(2, 12, 6, generator=generator).to(dtype))

    train(case, engine, loss)
    live, masters = weights(engine, case.stage)
    key = "deepspeed_experts."

    def whole_model(name: str) -> str:
        """The name with the number of the expert in the model, not in the rank."""
        if key not in name:
            return name
        head, _, tail = name.partition(key)
        number, _, rest = tail.partition(".")
        layer = engine.module.get_submodule(head.partition(".deepspeed_moe")[0])
        first = groups._get_expert_parallel_rank(layer.expert_group_name) * layer.num_local_experts
        return f"{head}{key}{first + int(number)}.{rest}"

    live, masters = ({whole_model(n): t for n, t in found.items()} for found in (live, masters))
    live, masters = gathered(live), gathered(masters)
    check_rounding(live, masters)
    return {**live, **masters}


# ---- tensor parallelism


def autotp(case: Case, rank: int) -> dict[str, Any]:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(20240229)
    if installed_version() < (0, 19):
        from deepspeed.accelerator import get_accelerator

        type(get_accelerator()).current_device = lambda self: "cpu"  # it broadcasts batches to the device "1"
    if case.options["model"] == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=34, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=16, use_cache=False, attn_implementation="eager",
            tie_word_embeddings=case.options.get("tied", False),
        ))  # fmt: skip
        parallel: dict[str, Any] = {"autotp_size": case.options.get("tp", 2)}
    else:
        model = fused_model()
        parallel = {"autotp_size": 2, "partition_config": FUSED}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {**config_of(case), "tensor_parallel": parallel}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def loss(step: int) -> Any:
        # all tensor parallel ranks of a data-parallel rank see one batch
        ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(10 * step + rank // parallel["autotp_size"]))
        return engine(input_ids=ids, labels=ids).loss

    train(case, engine, loss)
    masters = {} if case.stage == 0 else weights(engine, case.stage)[1]
    whole = {name: tensor.clone() for name, tensor in (engine._consolidated_16bit_state_dict() or {}).items()}
    buffers = {name: tensor.detach().clone() for name, tensor in engine.module.named_buffers() if name in before}
    whole |= buffers  # DeepSpeed does not gather them
    if rank == 0 and set(before) != set(whole):  # the others get none
        raise AssertionError(f"the model in memory has other names: {set(before) ^ set(whole)}")
    truth = with_masters(case, rank, whole, masters)
    if rank == 0 and case.options.get("tied"):
        if not torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"]):
            raise AssertionError("the head is not the embedding")
        truth["lm_head.weight"] = truth["model.embed_tokens.weight"]
    return truth


# A model with fused projections and biases, cut as this says (deepspeed/module_inject/autotp_config.py).
FUSED = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.qkv\.weight$"], "partition_type": "column", "shape": [[8, 4, 4], -1], "partition_dim": 0},
        {"patterns": [r".*\.gate_up\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
        {"patterns": [r".*\.(o|down)\.weight$"], "partition_type": "row"},
    ],
}


def fused_model() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 16)
            self.o = nn.Linear(8, 8)
            self.gate_up = nn.Linear(8, 24, bias=False)
            self.down = nn.Linear(12, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.qkv(self.norm(x))
            size = parts.shape[-1] // 4
            q, k, v = parts.split([2 * size, size, size], -1)
            x = x + self.o(q * torch.cat([k, v], -1))
            gate, up = self.gate_up(x).chunk(2, -1)
            return x + self.down(gate.sigmoid() * up)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(33, 8)
            self.register_buffer("scale", torch.tensor(1.25))
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(8, 33)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            x = self.embed(input_ids) * self.scale.to(self.embed.weight.dtype)
            for block in self.blocks:
                x = block(x)
            loss = nn.functional.cross_entropy(self.head(x).float().reshape(-1, 33), labels.reshape(-1))
            return argparse.Namespace(loss=loss)

    return Model()


class Grid:
    """The `mpu` that Megatron-DeepSpeed gives to DeepSpeed: tensor parallel ranks beside each other."""

    def __init__(self, tensor: int) -> None:
        import torch.distributed as dist

        world, rank = dist.get_world_size(), dist.get_rank()
        self.size, self.rank, self.data_rank, self.data_size = tensor, rank % tensor, rank // tensor, world // tensor
        for first in range(0, world, tensor):
            group = dist.new_group(list(range(first, first + tensor)))
            self.tensor_group = group if first <= rank < first + tensor else getattr(self, "tensor_group", None)
        for first in range(tensor):
            group = dist.new_group(list(range(first, world, tensor)))
            self.data_group = group if rank % tensor == first else getattr(self, "data_group", None)

    def get_model_parallel_rank(self) -> int:
        return self.rank

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> Any:
        return self.data_group


# What Megatron-DeepSpeed's GPTModelPipe.universal_checkpoint_info says, for the parameters of the model below.
MEGATRON_INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 33,
    "padded_vocab_size": 36,
    "vocabulary_parameter_patterns": [r"tied_modules.embed.word_embeddings.weight"],
    "tp_replicated_parameter_patterns": [
        r"\d+.input_layernorm.weight", r"\d+.input_layernorm.bias", r"\d+.self_attention.dense.bias",
        r"\d+.mlp.dense_4h_to_h.bias",
    ],
    "parameter_with_row_parallelism_patterns": [r"\d+.mlp.dense_4h_to_h.weight", r"\d+.self_attention.dense.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+.mlp.dense_h_to_4h.weight"],
    "parameter_with_sub_params": [
        {"patterns": [r"\d+.self_attention.query_key_value.weight"], "shape": ((8, 4, 4), -1), "partition_dim": 0},
    ],
}  # fmt: skip


def megatron(case: Case, rank: int) -> dict[str, Any]:
    """Layers of a Megatron model, cut by its rules over two ranks; the names are those of its pipeline form."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch import nn

    grid = Grid(2)
    generator = torch.Generator().manual_seed(20240229)

    def reduced(x: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor ranks; the gradient passes."""
        total = x.detach().clone()
        dist.all_reduce(total, group=grid.tensor_group)
        return x + (total - x).detach()

    def cut(*shape: int, dim: int | None = None, parts: tuple[int, ...] | None = None) -> nn.Parameter:
        whole = torch.randn(*shape, generator=generator) / 3
        if dim is None:
            return nn.Parameter(whole)
        mine = [part.chunk(2, dim)[grid.rank] for part in whole.split(list(parts or (shape[dim],)), dim)]
        return nn.Parameter(torch.cat(mine, dim).contiguous())

    def linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
        held = nn.Module()
        held.weight = weight
        if bias is not None:
            held.bias = bias
        return held

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm = nn.LayerNorm(8)
            self.self_attention = nn.Module()
            self.self_attention.query_key_value = linear(cut(16, 8, dim=0, parts=(8, 4, 4)), cut(16, dim=0))
            self.self_attention.dense = linear(cut(8, 8, dim=1), cut(8))
            self.mlp = nn.Module()
            self.mlp.dense_h_to_4h = linear(cut(24, 8, dim=0, parts=(12, 12)))
            self.mlp.dense_4h_to_h = linear(cut(8, 12, dim=1), cut(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attention, mlp = self.self_attention, self.mlp
            parts = self.input_layernorm(x) @ attention.query_key_value.weight.T + attention.query_key_value.bias
            q, k, v = parts.split([4, 2, 2], -1)
            x = x + reduced((q * torch.cat([k, v], -1)) @ attention.dense.weight.T) + attention.dense.bias
            gate, up = (x @ mlp.dense_h_to_4h.weight.T).chunk(2, -1)
            return x + reduced((gate.sigmoid() * up) @ mlp.dense_4h_to_h.weight.T) + mlp.dense_4h_to_h.bias

    model = nn.Module()
    model.add_module("tied_modules", nn.Module())
    model.tied_modules.embed = nn.Module()
    model.tied_modules.embed.word_embeddings = linear(cut(36, 8, dim=0))  # 33 words, padded to 36
    for number in (2, 3):
        model.add_module(str(number), Layer())

    def forward(ids: torch.Tensor) -> torch.Tensor:
        table = model.tied_modules.embed.word_embeddings.weight
        mine = ids - 18 * grid.rank
        inside = (mine >= 0) & (mine < 18)
        x = reduced(table[mine.clamp(0, 17)] * inside[..., None])
        for number in (2, 3):
            x = model.get_submodule(str(number))(x)
        return (x @ table.T).float().pow(2).mean()

    model.forward = forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case), mpu=grid)

    def replicas_follow() -> None:
        """Replicated parameters have one gradient: Megatron's autograd functions see to that, here a sum does."""
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.shape[0] == 8 and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=grid.tensor_group)

    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        if name.endswith("bias") and "query" not in name or "layernorm" in name:
            parameter.register_hook(lambda grad: (dist.all_reduce(grad := grad.clone(), group=grid.tensor_group), grad)[1])

    def loss(step: int) -> Any:
        ids = torch.randint(0, 33, (2, 6), generator=torch.Generator().manual_seed(10 * step + grid.data_rank))
        return engine(ids)

    train(case, engine, loss, universal_checkpoint_info=MEGATRON_INFO)
    live, masters = weights(engine, case.stage)
    return with_masters(case, rank, {}, masters, live=live)


def with_masters(case: Case, rank: int, whole: dict[str, Any], mine: dict[str, Any], live: Any = None) -> dict[str, Any]:
    """The masters, joined by DeepSpeed's own `ds_to_universal`, checked against whole weights and this rank's shards."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    if installed_version() < (0, 19):
        return whole
    if case.stage == 0 or case.options.get("tp", 2) > 2:
        found = joined_by_maps(case, unpartitioned_masters(case) if case.stage == 0 else every_ranks(mine))
        check_rounding(whole, {name: value for name, value in found.items() if name in whole})
        return {**whole, **found}
    found: dict[str, Any] = {}
    if rank == 0:
        tag = next(path for path in pathlib.Path(case.name, "ckpt").iterdir() if path.is_dir())
        out = pathlib.Path("universal_" + case.name)
        subprocess.run(
            [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag),
             "--output_folder", str(out), "--num_extract_workers", "1", "--num_merge_workers", "1"], check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for path in sorted(out.glob("zero/*/fp32.pt")):
            value = torch.load(path, weights_only=False)
            found[path.parent.name] = (value["param"] if isinstance(value, dict) else value).clone()
        shutil.rmtree(out)
    shared = [found]
    dist.broadcast_object_list(shared, 0)
    found = shared[0]
    if set(mine) - set(found):
        raise AssertionError(f"ds_to_universal lacks {set(mine) - set(found)}")
    for name, value in mine.items():
        pieces = set(found[name].flatten().tolist())
        if not set(value.flatten().tolist()) <= pieces and "embed" not in name:
            raise AssertionError(f"{name}: this rank's masters are not all in the whole one")
    check_rounding(whole, {name: value for name, value in found.items() if name in whole})
    return {**whole, **{name: found[name] for name in mine}}  # it makes float32 of buffers


def unpartitioned_masters(case: Case) -> list[dict[str, Any]]:
    """The masters of stage 0, which stand in the order of the parameters, by tensor rank."""
    import torch

    files = [torch.load(path, weights_only=False) for path in sorted(pathlib.Path(case.name).rglob("mp_rank_*"))]
    found = []
    for file in files:
        tensors = [tensor.detach() for group in file["optimizer"]["fp32_groups"] for tensor in group]
        if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in file["module"].values()]:
            raise AssertionError("the masters do not follow the parameters")
        found.append(dict(zip(file["module"], tensors, strict=True)))
    return found


def every_ranks(mine: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def joined_by_maps(case: Case, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The masters of all ranks, joined by DeepSpeed's own `ParamAffineMap`."""
    import torch
    from deepspeed.checkpoint.affine import ParamAffineMap

    path = next(pathlib.Path(case.name).rglob("*mp_rank_00_model_states.pt"))
    maps = torch.load(path, weights_only=False)["universal_checkpoint_info"]["affine_map"]["params"]
    return {
        name: ParamAffineMap.from_dict(maps["^" + name.replace(".", r"\.") + "$"]).rebuild(
            {rank: mine[name] for rank, mine in enumerate(shards)}
        )
        for name in shards[0]
    }


# ---- partitions over a part of the ranks


def partitions(case: Case, rank: int) -> dict[str, Any]:
    import deepspeed
    import torch

    from tiny_models import build, groups_of, loss_of

    if case.zero.get("mics_shard_size"):
        without_coalescing()
    torch.manual_seed(20240229)
    model = build("specks" if case.zero.get("mics_shard_size") else "bag")
    optimizer = torch.optim.AdamW(groups_of(model, "bag", 2), lr=1e-2)
    config = config_of(case)
    if case.zero.get("mics_shard_size"):
        with deepspeed.zero.MiCS_Init(config_dict_or_path={**config, "train_batch_size": 2 * case.world}):
            model = build("specks")
        optimizer = torch.optim.AdamW(groups_of(model, "specks", 2), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    kind = "specks" if case.zero.get("mics_shard_size") else "bag"
    train(case, engine, lambda step: loss_of(engine, kind, step, rank, torch.bfloat16))
    live, masters = weights(engine, case.stage)
    live, masters = gathered(live), gathered(masters)
    check_rounding(live, masters)
    return {**live, **masters}


def without_coalescing() -> None:
    """Gloo gathers one tensor at a time; what is gathered is the same."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    import torch.distributed as dist

    class Done:
        def wait(self) -> None:
            pass

    def one_by_one(outputs: Any, inputs: Any, group: Any = None, async_op: bool = False) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, mine, group=group)
            output.copy_(torch.cat([part.flatten() for part in parts]).view(output.shape))
        return Done()

    import torch

    for module in (comm, importlib.import_module("deepspeed.comm")):
        module.all_gather_coalesced = one_by_one


# ---- what all kinds do


def check_rounding(live: dict[str, Any], masters: dict[str, Any]) -> None:
    import torch

    for name, value in masters.items():
        if not torch.equal(value.to(live[name].dtype), live[name]):
            raise AssertionError(f"{name}: the master does not round to the weight in memory")


def worker(name: str) -> None:
    version = prepare_deepspeed()
    import deepspeed
    import torch
    from safetensors.torch import save_file

    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=120))
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    rank = int(os.environ["RANK"])
    case = next(case for case in cases_of(version_tuple(version)) if case.name == name)
    truth = globals()[case.kind](case, rank)
    torch.distributed.barrier()
    if rank:
        return
    here = pathlib.Path(name)
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (here / "ckpt" / script).unlink(missing_ok=True)
    tensors = {key: value.detach().clone().contiguous() for key, value in sorted(truth.items())}
    save_file(tensors, here / "truth.safetensors")
    record = {
        "name": name,
        "deepspeed": version,
        "torch": torch.__version__,
        "stage": case.stage,
        "world": case.world,
        "dtype": case.dtype,
        "features": list(case.features),
        "entry": "ckpt",
        "truth_made_by": "the weights in memory, gathered over the ranks" + (
            ", joined by DeepSpeed's own rules" if case.kind in ("autotp", "megatron") else ""
        ),
        "tensors": len(tensors),
    }  # fmt: skip
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(path.stat().st_size for path in here.rglob("*") if path.is_file())
    print(f"OK {name}: {len(tensors)} tensors, {size} bytes", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return 0
    cases = [case for case in cases_of(installed_version()) if not given.only or case.name in given.only]
    if given.list:
        print("\n".join(f"{case.name}: {', '.join(case.features)}" for case in cases))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    status = 0
    for case in cases:
        shutil.rmtree(case.name, ignore_errors=True)
        if spawn(script, ["--out", ".", "--worker", case.name], case.world):
            print(f"FAILED {case.name}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
