"""Makes the golden checkpoints of pipeline stages, and one of them as a universal checkpoint.

    python make_pipeline.py --out DIR [--only NAME ...] [--list]

Every case trains a `PipelineModule` for two steps and saves it with DeepSpeed's own `save_checkpoint`. DeepSpeed's
`zero_to_fp32` does not read these. The truth is what is in memory: the fp32 masters by DeepSpeed's own accessor where
it has it, else the weights themselves, gathered from the first data-parallel rank of every stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from make_universal import to_universal
from processes import installed_version, prepare_deepspeed, spawn


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    stage: int
    world: int = 2
    stages: int = 2
    dtype: str = "bf16"
    tied: str = ""  # "modules": both uses are the module itself; "function": the second one is a function of it
    two_ties: bool = False
    bias: bool = False  # of the tied module: DeepSpeed ties its `weight` alone, each stage trains a bias of its own
    frozen: bool = False
    shared: bool = False  # two layers of one stage share a parameter, without TiedLayerSpec
    groups: int = 1
    universal: bool = False
    tags: int = 1
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = [
    Case("pp2_z1_w2_bf16", 1),
    Case("pp2_z1_w4_bf16", 1, world=4, groups=2),
    Case("pp1_z1_w2_bf16", 1, stages=1),
    Case("pp1_shared_z1_w2_bf16", 1, stages=1, shared=True),
    Case("pp2_bf16_optimizer_z1_w2_bf16", 1, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case("pp2_frozen_z1_w2_bf16", 1, frozen=True),
    Case("pp2_tied_z1_w2_bf16", 1, tied="modules", config={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case("pp2_tied_function_z1_w2_fp16", 1, dtype="fp16", tied="function"),
    Case("pp2_tied_bias_z1_w2_bf16", 1, tied="modules", bias=True),
    Case("pp2_two_ties_z1_w2_bf16", 1, tied="function", two_ties=True),
    Case("pp2_z0_w2_bf16", 0),
    Case("pp2_z0_w4_bf16", 0, world=4),
    Case("pp2_z0_w2_fp32", 0, dtype="fp32"),
    Case("pp2_tied_z0_w2_bf16", 0, tied="function"),
    Case("pp2_two_saves_z1_w2_bf16", 1, tags=2),
    Case("universal_pp2_z1_w4_bf16", 1, world=4, universal=True),
    Case("universal_pp2_tied_z1_w2_bf16", 1, tied="function", universal=True),
]
if installed_version() < (0, 19):
    prefix = "v" + "_".join(map(str, installed_version())) + "_"
    old = ("pp2_z1_w4_bf16", "pp2_tied_function_z1_w2_fp16", "pp2_z0_w2_bf16")
    CASES = [dataclasses.replace(case, name=prefix + case.name) for case in CASES if case.name in old]


def build(case: Case) -> Any:
    """Layers of two kinds, one of them with a buffer, a function between them, and ties around."""
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from torch import nn

    class Block(nn.Module):
        counted: torch.Tensor

        def __init__(self, frozen: bool = False) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5)
            self.b = nn.Linear(5, 6, bias=False)
            self.b.weight.requires_grad_(not frozen)
            self.register_buffer("counted", torch.arange(3) * 1_000_000_007)
            self.register_buffer("scale", torch.tensor(0.75))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.tanh(self.a(x))) * self.scale.to(x.dtype)

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    def again(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x) * 0.5

    layers: list[Any] = [LayerSpec(nn.Linear, 6, 6), LayerSpec(Block, case.frozen), torch.tanh, LayerSpec(Block), LayerSpec(nn.LayerNorm, 6)]
    if case.shared:
        layers[0] = nn.Linear(6, 6)
        layers.append(nn.Linear(6, 6))
        layers[-1].weight = layers[0].weight
    if case.frozen:
        layers.insert(1, LayerSpec(Frozen))
    for key in (["one", "two"] if case.two_ties else ["one"]) if case.tied else []:
        second = {"forward_fn": again} if case.tied == "function" else {}
        arguments = (key, nn.Linear, 6, 6, case.bias)
        layers = [TiedLayerSpec(*arguments), *layers, TiedLayerSpec(*arguments, **second)]
    return PipelineModule(layers=layers, num_stages=case.stages, loss_fn=nn.MSELoss(), partition_method="uniform")


def has_masters(case: Case) -> bool:
    """Whether the files name masters: at stage 0 `param_shapes` went with 0.17, and FP16_Optimizer never had it."""
    return bool(case.stage) or (case.dtype == "bf16" and installed_version() < (0, 17))


def live(engine: Any, masters_too: bool) -> dict[str, Any]:
    """What this stage holds, by DeepSpeed's names: masters, else the weights and buffers themselves."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}
    masters = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False) if masters_too else ():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if value is not None:
            masters[name] = value.detach().clone().reshape(parameter.shape)
            if not masters[name].to(parameter.dtype).equal(parameter):
                raise AssertionError(f"{name} in memory is not its master, rounded")
    return found | masters


def run(case: Case) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist

    model = build(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}]
    if case.groups == 2:
        groups = [{"params": [p for p in trained if p.dim() > 1]}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.config,
    }
    if case.stage:
        config["zero_optimization"] = {"stage": case.stage, "overlap_comm": False}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    generator = torch.Generator().manual_seed(5 + int(os.environ["RANK"]) % 2)
    data = iter([tuple(torch.randn(2, 6, generator=generator).to(dtype) for _ in "xy") for _ in range(2)])
    for step in range(2):
        engine.train_batch(data)
        if step == 1 or case.tags == 2:
            engine.save_checkpoint(f"{case.name}/ckpt", client_state={"note": "tiny"})
    mine = live(engine, has_masters(case))
    stages: list[Any] = [None] * case.world
    dist.all_gather_object(stages, mine)
    if dist.get_rank() == 0:
        finish(case, [stages[engine.grid.stage_to_global(stage, data=0)] for stage in range(case.stages)])
    dist.barrier()


def finish(case: Case, stages: list[dict[str, Any]]) -> None:
    import torch
    from safetensors.torch import save_file

    truth: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        for name, value in stage.items():
            if not truth.setdefault(name, value).equal(value):
                if not case.bias or name != "tied_modules.one.bias":
                    raise AssertionError(f"{case.name}: {name} is not the same in both stages")
                truth[f"stage_{number}.{name}"] = value
    here = pathlib.Path(case.name)
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (here / "ckpt" / script).unlink(missing_ok=True)
    tag = (here / "ckpt/latest").read_text()
    if not has_masters(case) and case.tied:  # its files have no names of tied modules
        truth = {name.replace("tied_modules.one", "0"): value for name, value in truth.items()}
    save_file({name: value.contiguous() for name, value in sorted(truth.items())}, str(here / "truth.safetensors"))
    if case.universal:
        to_universal(here / "ckpt", tag)
    record = {
        "name": case.name,
        "deepspeed": ".".join(map(str, installed_version())),
        "torch": torch.__version__,
        "stage": case.stage,
        "world": case.world,
        "dtype": case.dtype,
        "features": [
            f"{case.stages} pipeline stages", "int64 and scalar buffers", "a layer that is a function",
            *([f"{'two tied modules' if case.two_ties else 'a tied module'}, the second use as a {case.tied.removesuffix('s')}"] if case.tied else []),
            *(["a bias in the tied module, which is not tied"] if case.bias else []),
            *(["a frozen layer, and a frozen parameter in another"] if case.frozen else []),
            *(["a parameter of two layers"] if case.shared else []),
            *(["2 param groups"] if case.groups == 2 else []), *(["BF16_Optimizer"] if case.config else []),
            *(["ds_to_universal"] if case.universal else []), *(["two tag directories"] if case.tags == 2 else []),
        ],
        "entry": "ckpt",
        "truth_made_by": "masters in memory (safe_get_full_fp32_param), the rest as in memory" if has_masters(case) else "weights in memory",
        "tensors": len(truth),
        "notes": "",
    }  # fmt: skip
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"OK {case.name}: {len(truth)} tensors", flush=True)


def worker(name: str) -> None:
    prepare_deepspeed()
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.manual_seed(20240229)
    run(next(case for case in CASES if case.name == name))


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
    cases = [case for case in CASES if not given.only or case.name in given.only]
    if given.list:
        print("\n".join(case.name for case in cases))
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
