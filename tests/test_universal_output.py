"""Results as universal checkpoints of DeepSpeed: it goes on from them at any stage and number of ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.plan.universal_layout import universal_files
from shardmerge.sources.pickle_vm import interpret
from tests import load_universal
from tests.conftest import GOLDEN, shardmerge
from tests.killing import KILL, Machine, Trap
from tests.load_environments import DEEPSPEED, interpreter, ready
from tests.scene import claim, tree
from tests.test_dcp_output import assert_same

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
    script = [loader, load_universal.__file__, tmp_path / "out", str(stage), str(world), tmp_path / "found.pt"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_same(found["loaded"], weights())
    expected, moments = stepped()
    for name in weights():
        assert torch.allclose(found["exp_avg"][name], moments[name], rtol=1e-2, atol=1e-5), name
        if stage < 3 or weights()[name].dim() > 1:
            assert torch.allclose(found["stepped"][name], expected[name], rtol=1e-3, atol=1e-4), name


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
