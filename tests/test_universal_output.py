"""Results as universal checkpoints of DeepSpeed: it goes on from them at any stage and number of ranks."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.plan.universal_layout import universal_files
from shardmerge.sources.deepspeed_files import DeepSpeedView
from shardmerge.sources.deepspeed_moments import moment_flats
from shardmerge.sources.pickle_vm import interpret
from shardmerge.sources.torch_file import read_torch_file
from tests import load_universal
from tests.conftest import GOLDEN, shardmerge
from tests.killing import KILL, Machine, Trap
from tests.load_environments import DEEPSPEED, interpreter, ready
from tests.scene import claim, tree
from tests.test_dcp_output import assert_same

# By what it is, and the name of a weight.
Values: TypeAlias = "dict[str, dict[str, torch.Tensor]]"

CASE = GOLDEN / "zero" / "bag_z2_w3_bf16" / "ckpt"
OPTIONS = sm.Options(format="zero-universal", sync=False)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {name: torch.randn(tensor.shape) for name, tensor in load_universal.model().state_dict().items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def loader() -> Path:
    """The Python of an environment that has DeepSpeed."""
    if not ready(DEEPSPEED, "deepspeed"):
        pytest.skip("DeepSpeed could not be installed here: `python tests/load_environments.py` says why")
    return interpreter(DEEPSPEED, "deepspeed")


# ---- what DeepSpeed makes of it


@pytest.mark.load
@pytest.mark.parametrize(("stage", "world"), [(1, 2), (3, 3)])
def test_deepspeed_goes_on_from_it(stage: int, world: int, loader: Path, source: Path, tmp_path: Path) -> None:
    """All weights bit for bit, of both parameter groups, and a first step that is the optimizer's first."""
    sm.convert(source, tmp_path / "out", options=OPTIONS)
    found = run_deepspeed(loader, "load", tmp_path / "out", stage, world)
    assert_same(found["loaded"], weights())
    expected, moments = stepped()
    for name in weights():
        assert torch.allclose(found["exp_avg"][name], moments[name], rtol=1e-2, atol=1e-5), name
        if stage < 3 or weights()[name].dim() > 1:
            assert torch.allclose(found["stepped"][name], expected[name], rtol=1e-3, atol=1e-4), name


def run_deepspeed(loader: Path, how: str, folder: Path, stage: int, world: int) -> Values:
    (found,) = run_each(loader, how, stage, world, folder)
    return found


def run_each(loader: Path, how: str, stage: int, world: int, *folders: Path) -> list[Values]:
    """Lets the same ranks train or load one checkpoint after the other, each in an engine of its own."""
    script = [loader, load_universal.__file__, how, str(stage), str(world), *folders]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{folder}.{how}.pt", weights_only=True) for folder in folders]


def stepped() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the weights, and the first moments, after the first step that torch itself takes from these weights.

    At stage 3 DeepSpeed 0.19.8 counts a step for each sub-group: the second one is corrected as if it were at its
    second step, after a conversion of DeepSpeed's own too.
    """
    masters, half = load_universal.model(), load_universal.model().bfloat16()
    for made in (masters, half):
        made.load_state_dict(weights())
    torch.manual_seed(2)
    half(torch.randn(4, 7, dtype=torch.bfloat16)).square().sum().backward()
    for master, one in zip(masters.parameters(), half.parameters(), strict=True):
        master.grad = one.grad.float()
    optimizer = torch.optim.AdamW(load_universal.groups(masters), lr=0.01)
    optimizer.step()
    named = dict(masters.named_parameters())
    moments = {name: optimizer.state[one]["exp_avg"] for name, one in named.items()}
    return {name: one.detach() for name, one in named.items()}, moments


# ---- the moments


class Stubs:
    """A pickle module for ``torch.load`` that makes nothing of DeepSpeed's classes."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.startswith("deepspeed"):
                return type(name, (), {"__init__": lambda self, *_: None})
            return super().find_class(module, name)


def moments_by_hand(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Returns the moments of stage 1 or 2, of one tag, put together as the masters are."""
    states = torch.load(next(folder.glob("mp_rank_00_*")), pickle_module=Stubs, weights_only=False)
    ranks = sorted(folder.glob("*_optim_states.pt"))
    optims = [torch.load(rank, pickle_module=Stubs, weights_only=False)["optimizer_state_dict"] for rank in ranks]
    found = {}
    for group, shapes in enumerate(states["param_shapes"]):
        masters = [optim["single_partition_of_fp32_groups"][group] for optim in optims]
        parts = [optim["base_optimizer_state"]["state"][group][kind] for optim in optims]
        flat = torch.cat([part[: master.numel()] for part, master in zip(parts, masters, strict=True)])
        for name, shape in shapes.items():
            found[name], flat = flat[: shape.numel()].reshape(shape), flat[shape.numel() :]
    return found


@pytest.mark.parametrize("case", ["bag_z2_w3_bf16", "llama_z1_w2_bf16", "v0_9_5_bag_z1_w2_bf16"])
def test_the_moments_are_those_of_the_optimizer(case: str, tmp_path: Path) -> None:
    ckpt = GOLDEN / "zero" / case / "ckpt"
    shardmerge("convert", ckpt, tmp_path / "out", "--format", "zero-universal", "--with-optimizer", "--no-sync")
    (tag,) = (folder for folder in ckpt.iterdir() if folder.is_dir())
    zero = tmp_path / "out" / "universal" / "zero"
    for kind in ("exp_avg", "exp_avg_sq"):
        expected = moments_by_hand(tag, kind)
        found = {name: torch.load(zero / name / f"{kind}.pt", weights_only=True)["param"] for name in expected}
        assert_same(found, expected)
        assert any(tensor.any() for tensor in found.values())
        assert_same({name: tensor.torch() for name, tensor in sm.open_checkpoint(ckpt, view=kind).items()}, expected)
    steps = {float(torch.load(path, weights_only=True)) for path in zero.glob("*/step.pt")}
    state = torch.load(zero / "optimizer_state.pt", weights_only=True)
    assert steps == {float(state["optimizer_state_dict"]["state"][0]["step"])}
    assert steps != {0.0}
    sm.verify(tmp_path / "out")


@pytest.mark.parametrize(
    "case", ["zero/subgroups_bag_z3_w3_bf16", "parallel/hpz_z3_w4_bf16", "parallel/v0_16_9_mics_z3_s2_w4_bf16"]
)
@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_the_moments_of_stage_3_are_those_of_all_its_ranks(case: str, kind: DeepSpeedView) -> None:
    """Also where a second partition was in memory, and where the first group of ranks saves for all."""
    ckpt = GOLDEN / case / "ckpt"
    (tag,) = (folder for folder in ckpt.iterdir() if folder.is_dir())
    model, ranks = tag / "zero_pp_rank_0_mp_rank_00_model_states.pt", sorted(tag.glob("*_optim_states.pt"))
    groups = torch.load(model, pickle_module=Stubs, weights_only=False)["param_shapes"]
    optims = [torch.load(rank, pickle_module=Stubs, weights_only=False)["optimizer_state_dict"] for rank in ranks]
    expected = {}
    for group, shapes in enumerate(groups):
        flats = [optim["optimizer_state_dict"]["state"][group][kind] for optim in optims]
        for name, shape in shapes.items():
            share = -(-shape.numel() // len(ranks))
            whole = torch.cat([flat[:share] for flat in flats])
            expected[name] = whole[: shape.numel()].reshape(shape)
            flats = [flat[share:] for flat in flats]
    assert any(tensor.any() for tensor in expected.values())
    assert_same({name: tensor.torch() for name, tensor in sm.open_checkpoint(ckpt, view=kind).items()}, expected)


def converted(loader: Path, folder: Path, into: Path) -> None:
    """DeepSpeed's own conversion."""
    (tag,) = (inside for inside in folder.iterdir() if inside.is_dir())
    options = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    command = ["--input_folder", tag, "--output_folder", into, *options]
    done = subprocess.run(
        [loader, "-m", "deepspeed.checkpoint.ds_to_universal", *command],
        capture_output=True, text=True, check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.load
@pytest.mark.parametrize("case", ["bag_z1_w3_bf16", "subgroups_bag_z3_w3_bf16", "alignment_z2_w3_bf16"])
def test_every_file_is_that_of_deepspeeds_own_conversion(case: str, loader: Path, tmp_path: Path) -> None:
    ckpt = GOLDEN / "zero" / case / "ckpt"
    converted(loader, ckpt, tmp_path / "theirs")
    sm.convert(ckpt, tmp_path / "out", options=replace(OPTIONS, optimizer=True))
    files = sorted((tmp_path / "theirs" / "zero").glob("*/*.pt"))
    assert len(files) > 20
    for file in files:
        ours = tmp_path / "out" / "universal" / "zero" / file.parent.name / file.name
        theirs, found = (torch.load(path, weights_only=True) for path in (file, ours))
        theirs, found = (one["param"] if isinstance(one, dict) else one for one in (theirs, found))
        assert torch.equal(theirs.flatten().float(), found.flatten().float()), file


@pytest.mark.load
@pytest.mark.parametrize(("before", "after"), [((3, 2), (2, 3))])
def test_a_run_goes_on_at_another_stage_and_number_of_ranks(
    before: tuple[int, int], after: tuple[int, int], loader: Path, tmp_path: Path
) -> None:
    """The next step is that of the unbroken run, as far as a mean over two ranks and one over three agree in 16 bits.

    Where stage 3 goes on, that is so of the first sub-group: see ``stepped``.
    """
    expected = run_deepspeed(loader, "train", tmp_path / "ckpt", *before)
    sm.convert(tmp_path / "ckpt", tmp_path / "out", options=replace(OPTIONS, optimizer=True))
    found = run_deepspeed(loader, "load", tmp_path / "out", *after)
    assert_same(found["loaded"], expected["loaded"])
    for name, tensor in expected["stepped"].items():
        if after[0] < 3 or tensor.dim() > 1:
            assert torch.allclose(found["stepped"][name], tensor, rtol=0, atol=1e-4), name
            assert (tensor - expected["loaded"][name]).abs().max() > 1e-3, name


# Whose weights are read, and whose optimizer lies otherwise than that of plain ZeRO.
NO_MOMENTS = {
    "parallel/moe_z1_ep2_w4_bf16": "a mixture of experts",
    "parallel/autotp_z2_tp2_w4_bf16": "tensor parallel ranks",
    "pipeline/pp2_z1_w2_bf16": "a pipeline",
}


def test_what_has_no_moments_is_refused(source: Path, tmp_path: Path) -> None:
    command = ["convert", source, tmp_path / "out", "--with-optimizer"]
    assert "add --format dcp or --format zero-universal" in shardmerge(*command, code=2).stderr
    assert "[no-moments]" in shardmerge(*command, "--format", "zero-universal", code=2).stderr
    for case in ("elastic_z2_w2_bf16", "llama_z0_w2_bf16"):
        command[1] = GOLDEN / "zero" / case / "ckpt"
        done = shardmerge(*command, "--format", "zero-universal", code=1)
        assert "[no-moments]" in done.stderr
        assert "leave --with-optimizer out" in done.stderr
    for case, kind in NO_MOMENTS.items():
        command[1] = GOLDEN / case / "ckpt"
        done = shardmerge(*command, "--format", "zero-universal", code=1)
        assert "[no-moments]" in done.stderr
        assert f"those of {kind} are not read" in done.stderr
    command[1] = GOLDEN / "zero" / "llama_z2_w2_bf16" / "ckpt"
    done = shardmerge(*command, "--format", "zero-universal", "--use", "llama/hf-to-hf", code=2)
    assert "[no-effect]" in done.stderr


def test_an_optimizer_that_keeps_more_is_no_adam(tmp_path: Path) -> None:
    """AMSGrad has a third moment: the others without it are another optimizer."""
    kept = {kind: torch.zeros(4) for kind in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    masters, longer = [torch.zeros(3)], [torch.zeros(5)]
    torch.save({"masters": masters, "longer": longer, "state": {0: kept}}, tmp_path / "optim.pt")
    file = read_torch_file(tmp_path / "optim.pt")
    with pytest.raises(sm.CheckpointError) as caught:
        moment_flats(file, file.root, file.root["masters"], "exp_avg")
    assert caught.value.code == "no-moments"
    assert "max_exp_avg_sq" in caught.value.what
    del file.root["state"][0]["max_exp_avg_sq"]
    (flat,) = moment_flats(file, file.root, file.root["masters"], "exp_avg")
    assert flat.shape == (3,)
    with pytest.raises(sm.CheckpointError, match="group 0"):
        moment_flats(file, file.root, file.root["longer"], "exp_avg")
    with pytest.raises(sm.CheckpointError, match="group 1"):
        moment_flats(file, file.root, file.root["masters"] * 2, "exp_avg")


# ---- the files


def test_the_weights_are_float32(tmp_path: Path) -> None:
    """Frozen ones are kept in 16 bits by the run, codes and flags are as they are."""
    sm.convert(CASE, tmp_path / "hf", options=sm.Options(dtype="float32", sync=False))
    sm.convert(CASE, tmp_path / "out", options=OPTIONS)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    folder = tmp_path / "out" / "universal" / "zero"
    found = {path.parent.name: torch.load(path, weights_only=True)["param"] for path in folder.glob("*/fp32.pt")}
    assert_same(found, expected)
    sm.verify(tmp_path / "out")


def test_every_small_file_is_inert_and_torch_reads_it(tmp_path: Path) -> None:
    for number, (path, data) in enumerate(universal_files({"a.weight": (3, 5), "scale": (), "none": (0, 4)})):
        if not path.endswith(".pt"):
            assert (path, data) == ("latest_universal", b"universal")
            continue
        file = tmp_path / f"{number}.pt"
        file.write_bytes(data)
        found = torch.load(file, weights_only=True)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            interpret(archive.read(name), where=path)
        if path.endswith("model_states.pt"):
            assert found["param_shapes"] == [{"a.weight": (3, 5), "scale": (), "none": (0, 4)}]
        if path.endswith("exp_avg_sq.pt"):
            shape = {"a.weight": (3, 5), "scale": (), "none": (0, 4)}[path.split("/")[2]]
            assert found["param"].shape == shape
            assert not found["param"].any()
            assert len(data) < 2000


def test_moments_take_no_space(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000, 1000)}, tmp_path / "m.safetensors")
    sm.convert(tmp_path / "m.safetensors", tmp_path / "out", options=OPTIONS)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) < 4_030_000


@pytest.mark.parametrize("form", ["dcp", "zero-universal"])
def test_a_model_that_is_not_whole_is_refused(form: str, tmp_path: Path) -> None:
    """As for every format: what config.json describes is there."""
    shutil.copytree(GOLDEN / "xtuner" / "base_llm", tmp_path / "whole")
    sm.convert(tmp_path / "whole", tmp_path / "fine", options=sm.Options(format=form, sync=False))
    (file,) = (tmp_path / "whole").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(sm.TargetError) as caught:
        sm.convert(tmp_path / "whole", tmp_path / "out", options=sm.Options(format=form, sync=False))
    assert caught.value.code == "incomplete-model"


def test_names_that_are_no_folders(tmp_path: Path) -> None:
    names = ["a/b", "..", "x" * 256, "optimizer_state.pt", "fine"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "m.safetensors")
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(tmp_path / "m.safetensors", tmp_path / "out", options=OPTIONS)
    assert [error.code for error in caught.value.each()] == ["unusable-name"] * 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["option", "mapping"])
def test_sixteen_bits_are_refused(way: str, source: Path, tmp_path: Path) -> None:
    if way == "option":
        done = shardmerge("convert", source, tmp_path / "out", "--format", "zero-universal", "--dtype", "bf16", code=2)
    else:
        text = f"shardmerge: 1\nsources: {{a: {source}}}\noutput: {{path: out, format: zero-universal, dtype: bf16}}\n"
        (tmp_path / "mapping.yaml").write_text(text + 'tensors: {"{rest...}": "a:{rest...}"}\n')
        done = shardmerge("run", tmp_path / "mapping.yaml", code=2)
        assert "mapping.yaml:3" in done.stderr
    assert "[unfit-dtype]" in done.stderr
    assert "leave the dtype out" in done.stderr


# ---- the laws that hold for every format


def test_the_same_bytes_for_any_workers_and_from_a_plan_that_was_read(source: Path, tmp_path: Path) -> None:
    found = []
    for number, way in enumerate([{}, {"workers": 1}, {"workers": 4}, {"io": "mmap"}]):
        sm.convert(source, tmp_path / str(number), options=sm.Options(format="zero-universal", sync=False, **way))
        found.append(tree(tmp_path / str(number)))
    prepared = api.prepare_conversion(source, options=OPTIONS)
    api.write_plan(prepared, tmp_path / "plan.json", tmp_path / "read")
    read = api.prepare(tmp_path / "plan.json", OPTIONS)
    assert (read.plan, read.plan.id) == (prepared.plan, prepared.plan.id)
    api.carry_out(read, tmp_path / "read", OPTIONS)
    assert all(one == found[0] for one in [*found, tree(tmp_path / "read")])


def test_a_run_that_is_stopped_is_gone_on_with(runs: Machine, source: Path, tmp_path: Path) -> None:
    command = ["convert", source, tmp_path / "out", "--format", "zero-universal", "--workers", "1", "--json"]
    assert runs.run(*command).code == 0
    undisturbed = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert runs.run(*command, trap=Trap(KILL, at=claim(runs.calls))).code == -9
    (root,) = tmp_path.glob("out.partial-*")
    (root / "parts" / "00002.json").unlink()
    assert runs.run(*command).json()["parts_made"] == 1
    assert tree(tmp_path / "out") == undisturbed


def test_what_is_damaged_is_found(source: Path, tmp_path: Path) -> None:
    sm.convert(source, tmp_path / "out", options=OPTIONS)
    for name in ("0.weight/fp32.pt", "0.weight/exp_avg.pt", "optimizer_state.pt"):
        path = tmp_path / "out" / "universal" / "zero" / name
        sound = path.read_bytes()
        for at in range(0, len(sound), 211):
            damaged = bytearray(sound)
            damaged[at] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(sm.VerificationError):
                sm.verify(tmp_path / "out")
        path.write_bytes(sound)
    sm.verify(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "shardmerge.json").read_text())["tensors"]["0.weight"]["stored"] == "param"
