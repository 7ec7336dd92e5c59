"""Checkpoints of LoRA runs that hold the frozen base beside the adapter: merged with nothing else, and exported.

The judge is peft: what it merges in memory, and what it saves as the adapter.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardmerge as sm
from shardmerge.adapters.types import as_base, as_frozen
from shardmerge.dtypes import DTYPES
from shardmerge.tensors import Catalog, Extent, TensorEntry, dense
from tests.adapter_runs import WEIGHTS, assert_same, gpt2, llama, merged_state, refusal, saved, trained
from tests.conftest import GOLDEN, read_all

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
State = dict[str, torch.Tensor]
FAST = sm.Options(sync=False)


def as_safetensors(state: State, folder: Path) -> None:
    save_file({name: one.contiguous() for name, one in state.items()}, folder / "model.safetensors")


def as_bin(state: State, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def wrapped(state: State, folder: Path) -> None:
    """DistributedDataParallel around activation checkpointing."""
    inner = {name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): one for name, one in state.items()}
    torch.save({f"module.{name}": one for name, one in inner.items()}, folder / "pytorch_model.bin")


def as_dcp(state: State, folder: Path) -> None:
    dcp.save({"model": state}, checkpoint_id=folder, no_dist=True)


def before_base_layer(state: State, folder: Path) -> None:
    """peft 0.5 and older: the weight below an adapter is called like any other."""
    torch.save({name.replace(".base_layer.", "."): one for name, one in state.items()}, folder / "pytorch_model.bin")


FORMATS = [as_safetensors, as_bin, wrapped, as_dcp, before_base_layer]
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "plain": (llama, {}),
    "head": (llama, {"modules_to_save": ["lm_head"]}),
    "tokens": (llama, {"trainable_token_indices": [1, 5]}),
    "biases": (lambda: llama(attention_bias=True), {"bias": "lora_only"}),
    "all biases": (lambda: llama(attention_bias=True, mlp_bias=True), {"bias": "all"}),
    "dora": (llama, {"use_dora": True}),
    "embedding": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}
CASES = [("plain", one) for one in FORMATS] + [(kind, as_bin) for kind in KINDS if kind != "plain"]


def run_of(folder: Path, kind: str, write: Callable[[State, Path], None]) -> State:
    """The whole state of a run as ``run``, its adapter as peft saves it as ``lora``; returns what peft merges."""
    make, settings = KINDS[kind]
    model = trained(make(), folder / "lora", **settings)
    (folder / "run").mkdir()
    write({name: one.detach().clone() for name, one in model.state_dict().items()}, folder / "run")
    shutil.copy(folder / "lora" / "adapter_config.json", folder / "run")
    return merged_state(model)


@pytest.mark.parametrize(("kind", "write"), CASES)
def test_merged_without_another_base(tmp_path: Path, kind: str, write: Callable[[State, Path], None]) -> None:
    truth = run_of(tmp_path, kind, write)
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/merge", options=FAST)
    assert_same(read_all(sm.inspect(tmp_path / "out")), truth)


@pytest.mark.parametrize(("kind", "write"), CASES)
def test_exported_without_its_base(tmp_path: Path, kind: str, write: Callable[[State, Path], None]) -> None:
    run_of(tmp_path, kind, write)
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/export", options=FAST)
    wanted, found = load_file(tmp_path / "lora" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    wanted = {name: one for name, one in wanted.items() if not name.endswith("embed_tokens.base_layer.weight")}
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == KINDS[kind][1].get("trainable_token_indices")


ONTO = ["t", '"t:{rest...}"', '"t:base_model.model.{rest...}"']


@pytest.mark.parametrize("onto", ONTO)
def test_onto_itself_in_a_mapping(tmp_path: Path, onto: str) -> None:
    """Names of the result are those that ``onto`` makes."""
    truth = run_of(tmp_path, "head", as_bin)
    prefix = "base_model.model." if "base_model" in onto else ""
    text = f"shardmerge: 1\nsources: {{t: run}}\noutput: out\nadapters: [{{from: t, onto: {onto}}}]\n"
    (tmp_path / "mapping.yaml").write_text(f'{text}tensors: {{"{{rest...}}": "t:{prefix}{{rest...}}"}}\n')
    sm.run(tmp_path / "mapping.yaml", options=FAST)
    assert_same(read_all(sm.inspect(tmp_path / "out")), truth)


def test_with_itself_as_the_base_and_its_config(tmp_path: Path) -> None:
    truth = run_of(tmp_path, "plain", as_bin)
    saved(llama(), tmp_path / "base")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "run")
    run = tmp_path / "run"
    sm.convert(run, tmp_path / "out", use="peft/merge", bases={"base": str(run)}, options=FAST)
    assert_same(read_all(sm.inspect(tmp_path / "out")), truth)
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"config.json", "shardmerge.json"}


# --- DeepSpeed: masters of what was trained, beside what was frozen


ZERO = GOLDEN / "zero"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def zero_run(folder: Path, case: str) -> State:
    """A golden run with an adapter_config.json, and W + 2 B A in float64 of what DeepSpeed's own script gathers."""
    shutil.copytree(ZERO / case / "ckpt", folder / "run")
    state = load_file(ZERO / case / "truth.safetensors")
    rank = next(len(one) for name, one in state.items() if "lora_A" in name)
    modules = sorted({name.split(".")[-4] for name in state if "lora_A" in name})
    config = CONFIG | {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / "run" / "adapter_config.json").write_text(json.dumps(config))
    found = {}
    for name, tensor in state.items():
        a, b = (state.get(name.replace("base_layer", f"lora_{half}.default")) for half in "AB")
        adds = "base_layer" in name and a is not None and b is not None
        if ".lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            found[plain] = tensor.double() + (2 * b.double() @ a.double() if adds else 0)
    return found


@pytest.mark.parametrize("case", ["lora_z2_w2_bf16", "lora_z3_w2_bf16"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_zero_run_is_of_one_type(tmp_path: Path, case: str, dtype: str | None) -> None:
    """That of the frozen weights; in float32 no 16-bit rounding lies between."""
    truth = zero_run(tmp_path, case)
    sm.convert(tmp_path / "run", tmp_path / "out", use="peft/merge", options=sm.Options(sync=False, dtype=dtype))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(truth)
    assert {one.dtype for one in found.values()} == {torch.float32 if dtype else torch.bfloat16}
    near = torch.finfo(torch.float32 if dtype else torch.bfloat16).eps
    for name, tensor in truth.items():
        assert (found[name].double() - tensor).abs().max() <= near * tensor.abs().max(), name


def test_masters_get_the_type_of_what_was_frozen() -> None:
    def entry(name: str, dtype: str, origin: str) -> TensorEntry:
        size = DTYPES[dtype].itemsize
        return TensorEntry(name, DTYPES[dtype], (4,), dense(Extent("f", 0, 4 * size), 4), origin)

    made = [
        entry("a", "BF16", "frozen parameters"),
        entry("b", "F32", "fp32 partitions"),
        entry("c", "F32", "frozen parameters"),
    ]
    found = as_frozen(Catalog("run", "DeepSpeed ZeRO-2", {one.name: one for one in made[:2]}))
    assert {name: one.dtype.name for name, one in found.entries.items()} == {"a": "BF16", "b": "BF16"}
    assert "1 trained tensor of F32 beside frozen ones of BF16" in found.warnings[0]
    beside = as_base(
        Catalog("run", "DeepSpeed ZeRO-2", {"b": made[1]}), Catalog("base", "safetensors", {"a": made[0]}), ()
    )
    assert beside["b"].dtype.name == "BF16"
    live = Catalog("run", "torch zip", {"b": made[1]})
    assert as_base(live, Catalog("base", "safetensors", {"a": made[0]}), ()) is live
    whole = Catalog("run", "DeepSpeed ZeRO-2", {one.name: one for one in made[1:]})
    assert as_frozen(whole) is whole


@pytest.mark.parametrize("case", ["exclude_frozen_z2_w2_bf16", "exclude_frozen_z3_w2_bf16"])
def test_a_run_without_its_base_asks_for_one(tmp_path: Path, case: str) -> None:
    """What is absent is not taken for frozen: nothing is merged into nothing."""
    shutil.copytree(ZERO / case / "ckpt", tmp_path / "run")
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(tmp_path / "run", tmp_path / "out", use="peft/merge", options=FAST)
    assert "[missing-source]" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- refused


def test_an_adapter_onto_a_run_with_its_own(tmp_path: Path) -> None:
    run_of(tmp_path, "plain", as_bin)
    text = "shardmerge: 1\nsources: {t: run, l: lora}\noutput: out\nadapters: [{from: l, onto: t}]\n"
    (tmp_path / "mapping.yaml").write_text(text + 'tensors: {"{rest...}": "t:{rest...}"}\n')
    assert "[base-with-adapter]" in refusal(tmp_path)


def test_tokens_that_nobody_numbers_are_not_exported(tmp_path: Path) -> None:
    run_of(tmp_path, "tokens", as_bin)
    (tmp_path / "run" / "adapter_config.json").unlink()
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(tmp_path / "run", tmp_path / "out", use="peft/export", options=FAST)
    assert "[adapter-tokens]" in str(caught.value)


# --- a conversion that keeps every name


def plain_words(run: Path, out: Path) -> str:
    """What a conversion without a preset says, which publishes every tensor under its own name."""
    held = sm.inspect(run)
    result = sm.convert(run, out, options=FAST)
    assert set(sm.inspect(out).names()) == set(held.names())
    return " ".join(result.plan.warnings)


def followed(words: str, run: Path, out: Path) -> list[Path]:
    """The results of the commands that a warning names."""
    uses = re.findall(r"--use (\S+)( --base base=MODEL)?", words.replace(";", " "))
    made = []
    for number, (use, base) in enumerate(uses):
        bases = {"base": str(run.parent / "base")} if base else {}
        sm.convert(run, out / str(number), use=use, bases=bases, options=FAST)
        made.append(out / str(number))
    return made


@pytest.mark.parametrize("write", FORMATS)
def test_a_plain_conversion_says_that_an_adapter_is_inside(
    tmp_path: Path, write: Callable[[State, Path], None]
) -> None:
    truth = run_of(tmp_path, "plain", write)
    words = plain_words(tmp_path / "run", tmp_path / "plain")
    assert "8 of 29 tensors are those of an adapter" in words
    assert "alpha" not in words
    merged, kept = followed(words, tmp_path / "run", tmp_path)
    assert_same(read_all(sm.inspect(merged)), truth)
    assert_same(read_all(sm.inspect(kept)), load_file(tmp_path / "lora" / WEIGHTS), 0)


def test_a_plain_conversion_of_an_adapter_alone_asks_for_its_base(tmp_path: Path) -> None:
    base = llama()
    saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "lora")
    (tmp_path / "run").mkdir()
    as_bin({name: one for name, one in model.state_dict().items() if ".lora_" in name}, tmp_path / "run")
    assert "adapter_config.json" in plain_words(tmp_path / "run", tmp_path / "plain")
    shutil.copy(tmp_path / "lora" / "adapter_config.json", tmp_path / "run")
    words = plain_words(tmp_path / "run", tmp_path / "again")
    assert "Put the" not in words
    merged, kept = followed(words, tmp_path / "run", tmp_path)
    assert_same(read_all(sm.inspect(kept)), load_file(tmp_path / "lora" / WEIGHTS), 0)
    assert_same(read_all(sm.inspect(merged)), merged_state(model))


@pytest.mark.parametrize("run", ["zero/lora_z2_w2_bf16/ckpt", "ranks/fsdp2_lora_w2_fp32/actor"])
def test_a_plain_conversion_of_ranks_says_it_too(tmp_path: Path, run: str) -> None:
    assert "tensors are those of an adapter" in plain_words(GOLDEN / run, tmp_path / "plain")


def test_a_run_beside_the_config_of_its_base_is_no_model(tmp_path: Path) -> None:
    run_of(tmp_path, "plain", as_bin)
    saved(llama(), tmp_path / "base")
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "run")
    with pytest.raises(sm.ShardmergeError, match=r"unmerged-adapter") as caught:
        sm.convert(tmp_path / "run", tmp_path / "out", options=sm.Options(sync=False, partial=True))
    assert "--use peft/merge;" in caught.value.hint
    assert not (tmp_path / "out").exists()


# --- one pickle a rank


def sharded_rank(rank: int, folder: Path) -> None:
    """A rank of FSDP2 over a peft model: the state dict as verl saves it, and what verl says of the LoRA."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = trained(llama(), alpha_pattern={})
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(model.state_dict(), folder / "actor" / f"model_world_size_2_rank_{rank}.pt")
    dist.destroy_process_group()


def test_rank_files_of_a_lora_are_merged_and_exported(tmp_path: Path) -> None:
    """verl has no adapter_config.json: its ``lora_train_meta.json`` says alpha."""
    (tmp_path / "actor").mkdir()
    multiprocessing.spawn(sharded_rank, (tmp_path,), nprocs=2)
    meta = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    (tmp_path / "actor" / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    (tmp_path / "actor" / "lora_train_meta.json").write_text(json.dumps(meta))
    model = trained(llama(), tmp_path / "lora")
    words = plain_words(tmp_path / "actor", tmp_path / "plain")
    assert "alpha" not in words
    merged, kept = followed(words, tmp_path / "actor", tmp_path)
    assert_same(read_all(sm.inspect(kept)), load_file(tmp_path / "lora" / WEIGHTS), 0)
    config = json.loads((kept / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert_same(read_all(sm.inspect(merged)), merged_state(model))
