"""Makes the golden ZeRO checkpoints of the DeepSpeed that is installed.

    python make_deepspeed.py --out DIR [--only NAME ...] [--list]

Every case trains a tiny model for two steps on W processes and saves it with DeepSpeed's own
`save_checkpoint`. The truth beside it is DeepSpeed's own consolidation of the same version where that
works, and is checked against the parameters in memory.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import shutil
import sys
import traceback
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from processes import installed_version, prepare_deepspeed, spawn, version_tuple


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: str
    stage: int
    world: int
    dtype: str = "bf16"
    groups: int = 1
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    exclude_frozen: bool = False
    frozen_in_groups: bool = False
    hostile_state: bool = False
    tags: tuple[str | None, ...] = (None,)
    seed: int = 20240229
    reverse: bool = False  # the optimizer is given the parameters of a group in the reverse of the model's order
    universal_info: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a model says of its parameters
    fused: bool = False  # DeepSpeed's FusedAdam (its CPU build), which makes stage 0 keep flat masters
    features: tuple[str, ...] = ()
    notes: str = ""


FAILED: list[str] = []


class UserThing:
    """A class of the training script: readable only where that script is `__main__`."""

    def __init__(self) -> None:
        self.note = "made by the user's script"
        self.numbers = [1, 2, 3]


def hostile_state() -> dict[str, Any]:
    import numpy as np
    import torch

    counts: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
    counts["seen"].append(3)
    return {
        "args": argparse.Namespace(lr=1e-2, name="tiny", nested=argparse.Namespace(deep=True)),
        "started": datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc),
        "took": datetime.timedelta(seconds=90),
        "array": np.arange(6, dtype=np.float64).reshape(2, 3),
        "scalar": np.float32(0.5),
        "thing": UserThing(),
        "thing_class": UserThing,
        "path": pathlib.PurePosixPath("models/tiny"),
        "counts": counts,
        "tags": {"a", "b"},
        "complex": 1 + 2j,
        "device": torch.device("cpu"),
        "torch_dtype": torch.bfloat16,
        "rng_state": torch.get_rng_state()[:32].clone(),
        "extra_tensor": torch.arange(5),
        "none": None,
        "module_like_key": {"weight": torch.ones(2, 2, dtype=torch.float64)},
    }


BAG = ("odd shapes", "one-element parameter", "frozen parameters", "int64, bool and scalar buffers",
       "non-persistent buffer")  # fmt: skip


def cases_of(version: tuple[int, ...]) -> list[Case]:
    """The cases of one DeepSpeed version; only the newest has them all."""
    if version < (0, 19):
        prefix = "v" + "_".join(str(part) for part in version) + "_"
        old = [Case(f"{prefix}llama_z{s}_w2_bf16", "llama", s, 2) for s in (1, 2, 3)]
        old += [Case(f"{prefix}bag_z{s}_w3_fp16", "bag", s, 3, "fp16", groups=3,
                     features=(*BAG, "3 param groups")) for s in (2, 3)]  # fmt: skip
        old += [Case(f"{prefix}bag_z1_w2_bf16", "bag", 1, 2, groups=2, features=(*BAG, "2 param groups"))]
        old += [Case(f"{prefix}tied_z2_w2_bf16", "tied", 2, 2, features=("tied weights",))]
        if version < (0, 10):
            old = [case for case in old if case.stage != 3]  # its ZeRO-3 does not start on a CPU
        if version < (0, 17):
            old.append(Case(f"{prefix}llama_z0_w2_bf16", "llama", 0, 2, features=("BF16_Optimizer",)))
        return old

    cases = [Case(f"llama_z{s}_w2_bf16", "llama", s, 2) for s in (0, 1, 2, 3)]
    cases += [Case("llama_z0_w2_fp16", "llama", 0, 2, "fp16"), Case("llama_z0_w2_fp32", "llama", 0, 2, "fp32")]
    cases += [Case("llama_z2_w2_fp16", "llama", 2, 2, "fp16"), Case("llama_z2_w2_fp32", "llama", 2, 2, "fp32"),
              Case("llama_z3_w2_fp16", "llama", 3, 2, "fp16"), Case("llama_z3_w2_fp32", "llama", 3, 2, "fp32"),
              Case("llama_z1_w2_fp16", "llama", 1, 2, "fp16"), Case("llama_z2_w1_bf16", "llama", 2, 1),
              Case("llama_z3_w1_bf16", "llama", 3, 1)]  # fmt: skip
    for s in (1, 2, 3):
        cases += [
            Case(f"bag_z{s}_w3_bf16", "bag", s, 3, groups=3,
                 features=(*BAG, "3 param groups", "a group that leaves whole ranks empty")),
            Case(f"tied_z{s}_w2_bf16", "tied", s, 2, features=("tied weights",)),
            Case(f"exclude_frozen_z{s}_w2_bf16", "bag", s, 2, groups=2, exclude_frozen=True,
                 features=(*BAG, "exclude_frozen_parameters")),
        ]  # fmt: skip
    cases += [
        Case("bag_z2_w3_fp16", "bag", 2, 3, "fp16", groups=2, features=(*BAG, "2 param groups")),
        Case("bag_z3_w3_fp32", "bag", 3, 3, "fp32", groups=2, features=(*BAG, "2 param groups")),
        Case("subgroups_z3_w2_bf16", "llama", 3, 2, groups=2, zero={"sub_group_size": 200},
             features=("sub_group_size 200", "2 param groups")),
        Case("subgroups_bag_z3_w3_bf16", "bag", 3, 3, groups=3, zero={"sub_group_size": 50},
             features=(*BAG, "sub_group_size 50", "3 param groups")),
        Case("specks_z3_w4_bf16", "specks", 3, 4, features=("1- and 2-element parameters on 4 ranks", "frozen parameters")),
        Case("specks_z2_w4_bf16", "specks", 2, 4, features=("1- and 2-element parameters on 4 ranks", "frozen parameters")),
        Case("alignment_z2_w3_bf16", "bag", 2, 3, groups=2, zero={"parameter_alignment": True},
             features=(*BAG, "parameter_alignment", "2 param groups")),
        Case("alignment_z1_w2_bf16", "bag", 1, 2, groups=3, zero={"parameter_alignment": True},
             features=(*BAG, "parameter_alignment", "3 param groups")),
        Case("round_robin_z2_w3_bf16", "bag", 2, 3, groups=2, zero={"round_robin_gradients": True},
             features=(*BAG, "round_robin_gradients", "2 param groups")),
        Case("bf16_optimizer_z1_w2_bf16", "bag", 1, 2, groups=2, config={"data_types": {"grad_accum_dtype": "fp32"}},
             features=(*BAG, "BF16_Optimizer", "2 param groups")),
        Case("bf16_optimizer_z1_w3_bf16", "llama", 1, 3, config={"data_types": {"grad_accum_dtype": "fp32"}},
             features=("BF16_Optimizer",)),
        Case("hostile_state_z2_w2_bf16", "specks", 2, 2, hostile_state=True, features=("hostile client_state", "frozen parameters")),
        Case("hostile_state_z3_w2_bf16", "specks", 3, 2, hostile_state=True, features=("hostile client_state", "frozen parameters")),
        Case("lora_z2_w2_bf16", "lora", 2, 2, features=("peft LoRA", "frozen parameters")),
        Case("lora_z3_w2_bf16", "lora", 3, 2, features=("peft LoRA", "frozen parameters")),
        Case("frozen_in_groups_z2_w2_bf16", "bag", 2, 2, groups=2, frozen_in_groups=True,
             features=(*BAG, "frozen parameters inside the optimizer's groups")),
        Case("two_tags_z2_w2_bf16", "llama", 2, 2, tags=("global_step1", "epoch=1-step=2.ckpt"),
             features=("two tag directories",), notes="latest names the second tag"),
        Case("two_saves_z1_w2_bf16", "bag", 1, 2, groups=2, tags=("global_step1", "global_step2"),
             features=(*BAG, "2 param groups", "two tag directories"), notes="latest names the second tag"),
        Case("two_saves_z3_w2_bf16", "bag", 3, 2, groups=2, tags=("global_step1", "global_step2"),
             features=(*BAG, "2 param groups", "two tag directories"), notes="latest names the second tag"),
        Case("other_run_z2_w2_bf16", "llama", 2, 2, seed=20240301, features=("the settings of llama_z2_w2_bf16, another seed",)),
        Case("order_z0_w2_bf16", "llama", 0, 2, groups=2, reverse=True,
             features=("2 param groups", "the optimizer has the parameters in another order than the model")),
        Case("fused_z0_w2_fp16", "llama", 0, 2, "fp16", fused=True, features=("flat fp32 masters",)),
        Case("fused_order_z0_w2_fp16", "llama", 0, 2, "fp16", groups=2, reverse=True, fused=True,
             features=("flat fp32 masters", "2 param groups", "the optimizer has the parameters in another order than the model")),
        Case("elastic_z2_w2_bf16", "llama", 2, 2, zero={"elastic_checkpoint": True}, features=("elastic_checkpoint",)),
    ]  # fmt: skip
    return cases


# ---------------------------------------------------------------------------------------------------
# one rank


def run_case(case: Case, version: tuple[int, ...]) -> None:
    """Train, save, and on rank 0 write and check the truth. The working directory is the output."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from tiny_models import build, groups_of, loss_of

    rank = dist.get_rank()
    here = pathlib.Path(case.name)
    if rank == 0:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
    dist.barrier()

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    torch.manual_seed(case.seed)
    model = build(case.model)
    expected = list(model.state_dict())
    buffers = [n for n, _ in model.named_buffers() if n in expected]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    parameters = groups_of(model, case.model, case.groups, case.frozen_in_groups)
    if case.reverse:
        parameters = [{**group, "params": group["params"][::-1]} for group in parameters]
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(p)] for group in parameters for p in group["params"]]
    optimizer: Any = torch.optim.AdamW(parameters, lr=1e-2)
    if case.fused:
        from deepspeed.ops.adam import FusedAdam

        optimizer = FusedAdam(parameters, lr=1e-2)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.config,
    }
    if case.stage:
        config["zero_optimization"] = {"stage": case.stage, "overlap_comm": False, **case.zero}
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    before = live_weights(engine, case.stage)
    for step in range(2):
        loss = loss_of(engine, case.model, step, rank, dtype)
        engine.backward(loss)
        engine.step()
        tag = case.tags[step] if len(case.tags) == 2 else (case.tags[0] if step == 1 else "")
        if tag != "":
            more = {"exclude_frozen_parameters": True} if case.exclude_frozen else {}
            state = hostile_state() if case.hostile_state else {"epoch": 1, "note": "tiny"}
            if case.universal_info:
                state["universal_checkpoint_info"] = case.universal_info
            engine.save_checkpoint(str(here / "ckpt"), tag=tag, client_state=state, **more)
    live = live_weights(engine, case.stage)
    masters = live_masters(engine, case)
    moved = [n for n in live if n in before and not torch.equal(live[n], before[n])]
    dist.barrier()
    if rank == 0:
        try:
            finish(case, version, here, live, masters, expected, buffers, frozen, moved, order)
        except Exception:
            print(f"FAILED {case.name}\n{traceback.format_exc()}", flush=True)
            FAILED.append(case.name)
    dist.barrier()


def live_weights(engine: Any, stage: int) -> dict[str, Any]:
    """Every parameter and persistent buffer as it stands in memory, whole, in the model's dtype."""
    import deepspeed

    out = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                out[name] = parameter.detach().clone()
        else:
            out[name] = parameter.detach().clone()
    saved = set(engine.module.state_dict())
    for name, buffer in engine.module.named_buffers():
        if name in saved:
            out[name] = buffer.detach().clone()
    return out


def live_masters(engine: Any, case: Case) -> dict[str, Any]:
    """The fp32 master weights by DeepSpeed's own accessor, where it has one that tells the truth."""
    sharded = case.stage or type(engine.optimizer).__name__ == "BF16_Optimizer"
    if not sharded or case.zero.get("round_robin_gradients"):
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    out = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            if value is not None:
                out[name] = value.detach().clone().reshape(getattr(parameter, "ds_shape", parameter.shape))
    return out


# ---------------------------------------------------------------------------------------------------
# rank 0, after saving


def finish(case, version, here, live, masters, expected, buffers, frozen, moved, order) -> None:  # type: ignore[no-untyped-def]
    import torch
    from safetensors.torch import save_file

    save_dir = here / "ckpt"
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (save_dir / script).unlink(missing_ok=True)
    tags = sorted(p.name for p in save_dir.iterdir() if p.is_dir())
    latest = (save_dir / "latest").read_text().strip()
    truth, made_by, notes = consolidate(case, save_dir, latest, live, masters, frozen, order)

    wanted = set(expected) - (set(frozen) if case.exclude_frozen else set())
    lost = sorted(wanted - set(truth))
    if lost:
        # DeepSpeed's own answer lacks them; the aliases of tied tensors are known from memory
        alias = {n: o for n in lost for o in truth if o not in buffers and torch.equal(live[n], live[o])}
        if set(alias) != set(lost):
            raise AssertionError(f"{case.name}: truth lacks {lost}")
        truth.update({n: truth[o] for n, o in alias.items()})
        made_by += "; plus the tied names it lost"
        notes.append(f"DeepSpeed's own consolidation lost {lost}")
    if set(truth) != wanted:
        raise AssertionError(f"{case.name}: truth has too much: {sorted(set(truth) - wanted)}")
    for name in buffers:
        if not live[name].is_floating_point() and truth[name].is_floating_point():
            if not torch.equal(truth[name], live[name].float()):
                raise AssertionError(f"{case.name}: {name} differs from the buffer in memory")
            truth[name] = live[name]
            if "; integer" not in made_by:
                made_by += "; integer and boolean buffers from memory"
                notes.append("this DeepSpeed's own consolidation turns integer and boolean buffers into float32")
    checked = 0
    for name, value in truth.items():
        same = torch.equal(value.to(live[name].dtype), live[name])
        if not same:
            raise AssertionError(f"{case.name}: {name} differs from the parameter in memory")
        if name in masters:
            if not torch.equal(value, masters[name]):
                raise AssertionError(f"{case.name}: {name} differs from the master weight in memory")
            checked += 1
    if not moved:
        raise AssertionError(f"{case.name}: no parameter moved in training")
    if set(moved) & set(frozen):
        raise AssertionError(f"{case.name}: a frozen parameter moved")
    save_file({n: t.detach().clone().contiguous() for n, t in sorted(truth.items())}, str(here / "truth.safetensors"))
    if len(tags) > 1:
        for tag in tags:
            if tag != latest:
                other = from_zero(save_dir, tag)
                if case.stage == 1:  # it omits the frozen parameters
                    other.update({n: live[n] for n in frozen})
                save_file({n: t.clone().contiguous() for n, t in sorted(other.items())}, str(here / "truth_first_tag.safetensors"))
                notes.append(f"truth_first_tag.safetensors belongs to the tag {tag}")
    if case.notes:
        notes.append(case.notes)
    record = {
        "name": case.name,
        "deepspeed": ".".join(str(part) for part in version),
        "torch": torch.__version__,
        "stage": case.stage,
        "world": case.world,
        "dtype": case.dtype,
        "features": list(case.features),
        "entry": "ckpt",
        "tags": tags,
        "latest": latest,
        "truth_made_by": made_by,
        "checks": {
            "tensors": len(truth),
            "equal_after_rounding_to_the_weights_in_memory": len(truth),
            "bit_equal_to_the_masters_in_memory": checked,
            "parameters_moved_by_training": len(moved),
        },
        "frozen": frozen,
        "notes": "; ".join(notes),
    }
    (here / "case.json").write_text(json.dumps(record, indent=1) + "\n")
    size = sum(p.stat().st_size for p in here.rglob("*") if p.is_file())
    print(f"OK {case.name}: {len(truth)} tensors, {checked} masters, {size} bytes", flush=True)


def from_zero(save_dir: pathlib.Path, tag: str | None) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(str(save_dir), tag))


def load(path: pathlib.Path) -> dict[str, Any]:
    import torch

    return dict(torch.load(path, map_location="cpu", weights_only=False))


def natural(path: pathlib.Path) -> int:
    return int(path.name.split("_pp_rank_")[1].split("_")[0])


def consolidate(case, save_dir, latest, live, masters, frozen, order):  # type: ignore[no-untyped-def]
    """(tensors, how they were made, notes)."""
    notes: list[str] = []
    tag = save_dir / latest
    kept_frozen = {} if case.exclude_frozen else {n: live[n] for n in frozen}
    if case.stage == 0 and not list(tag.glob("*optim_states.pt")):
        return *stage_0(case, tag, live, notes, order), notes
    try:
        truth = from_zero(save_dir, None)
    except Exception as error:
        notes.append(f"DeepSpeed refuses it: {type(error).__name__}: {str(error)[:120]}")
        truth = from_partitions(tag, case.world)
        model = load(tag / "mp_rank_00_model_states.pt")
        truth.update({n: model["module"][n] for n in model["buffer_names"]})
        truth.update(kept_frozen)
        return truth, "concatenation of the partitions with torch, checked against the masters in memory", notes
    made_by = "DeepSpeed zero_to_fp32"
    missing = {n: t for n, t in kept_frozen.items() if n not in truth}
    if missing:
        truth.update(missing)
        made_by += "; plus the frozen parameters in memory, which it omits"
        notes.append("DeepSpeed's own consolidation omits the frozen parameters; the module of the model file has them")
    return truth, made_by, notes


def stage_0(case, tag, live, notes, order):  # type: ignore[no-untyped-def]
    """Without ZeRO: the fp32 copies are whole tensors, or parts of a flat one, in the order of the optimizer's groups."""
    import torch

    state = load(tag / "mp_rank_00_model_states.pt")
    truth = {n: state["module"][n] for n in live}
    optimizer = state.get("optimizer") or {}
    key = "fp32_groups_flat" if "fp32_groups_flat" in optimizer else "fp32_groups"
    if key not in optimizer:
        notes.append("no fp32 copies in the file: the module is all there is")
        return truth, "the module of the model file, checked against the parameters in memory"
    if key == "fp32_groups":
        flat = [t for group in optimizer[key] for t in group]
    else:
        whole = torch.cat([t.detach().reshape(-1) for t in optimizer[key]])
        flat = [t.reshape(live[n].shape) for n, t in zip(order, whole.split([live[n].numel() for n in order]), strict=True)]
    if [t.shape for t in flat] != [live[n].shape for n in order]:
        raise AssertionError("the fp32 groups do not follow the optimizer's parameters")
    truth.update({n: t.detach().to(torch.float32).clone() for n, t in zip(order, flat, strict=True)})
    notes.append(f"the fp32 copies are in optimizer.{key} of the model file, without names")
    return truth, f"optimizer.{key} of the model file, checked against the parameters in memory"


def from_partitions(tag: pathlib.Path, world: int) -> dict[str, Any]:
    """Stage 1 and 2 by hand: join the ranks' parts of each flat group and cut it up."""
    import torch

    shapes = load(tag / "mp_rank_00_model_states.pt")["param_shapes"]
    files = sorted(tag.glob("*_optim_states.pt"), key=natural)
    if len(files) != world:
        raise AssertionError(f"{len(files)} optimizer files")
    parts = [load(f)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for f in files]
    out = {}
    for index, group in enumerate(shapes):
        flat = torch.cat([part[index].detach().reshape(-1) for part in parts])
        start = 0
        for name, shape in group.items():
            out[name] = flat[start : start + shape.numel()].reshape(shape).clone()
            start += shape.numel()
    return out


# ---------------------------------------------------------------------------------------------------


def worker(names: list[str], cases: list[Case] | None = None) -> int:
    version = version_tuple(prepare_deepspeed())
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    failed = 0
    for case in cases_of(version) if cases is None else cases:
        if case.name in names:
            try:
                run_case(case, version)
            except Exception:
                failed = 1
                print(f"FAILED {case.name} rank {os.environ['RANK']}\n{traceback.format_exc()}", flush=True)
    return failed or int(bool(FAILED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        return worker(given.worker)
    cases = cases_of(installed_version())
    cases = [c for c in cases if not given.only or c.name in given.only]
    if given.list:
        print("\n".join(c.name for c in cases))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    script = os.path.abspath(__file__)
    os.chdir(given.out)
    status = 0
    for world in sorted({c.world for c in cases}):
        names = [c.name for c in cases if c.world == world]
        status = spawn(script, ["--out", ".", "--worker", *names], world) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
