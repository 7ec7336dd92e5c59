"""One pickle a rank: DTensors and ShardedTensors of torch's FSDP, against the models before they were sharded."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError, ShardmergeError
from shardmerge.sources.device_mesh import Meshes
from shardmerge.sources.local_tensor import LocalTensor
from shardmerge.sources.pickle_values import Global, Opaque, PickleValue, TensorRef, attributes
from shardmerge.sources.sharded import local_tensor
from shardmerge.sources.torch_file import read_torch_file
from tests.conftest import GOLDEN, read_entry

RANKS = sorted(path.parent for path in GOLDEN.glob("ranks/*/case.json"))
READ = [case for case in RANKS if (case / "truth.safetensors").is_file()]
FSDP2, HSDP, TP = (GOLDEN / "ranks" / name for name in ("fsdp2_w2_bf16", "hsdp_2x2_bf16", "fsdp2_tp_2x2_bf16"))
BAG = GOLDEN / "ranks/fsdp2_bag_w3_fp32"


def assert_is_truth(catalog: sm.Catalog, case: Path) -> None:
    """Every bit, under every name."""
    truth = load_file(case / "truth.safetensors")
    assert set(catalog.names()) == set(truth)
    for name, tensor in truth.items():
        entry = catalog[name]
        assert (entry.dtype.torch, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        assert read_entry(entry).tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


def refusal(path: Path) -> ShardmergeError:
    with pytest.raises(ShardmergeError) as caught:
        sm.inspect(path)
    return caught.value


def copied(case: Path, folder: Path, *without: int) -> Path:
    """A copy of the ranks of a case, without some."""
    here = shutil.copytree(case / "actor", folder / "actor")
    for rank in without:
        next(here.glob(f"model_world_size_*_rank_{rank}.pt")).unlink()
    return here


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what torch reads of a file, in place."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


# --- what real writers wrote ---


def test_the_golden_ranks_are_whole() -> None:
    assert len(READ) >= 12


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_of_the_model(case: Path) -> None:
    assert_is_truth(sm.inspect(case / "actor"), case)


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_one_ranks_file_stands_for_all(case: Path) -> None:
    whole = sm.inspect(case / "actor")
    for path in (*case.glob("actor/*.pt"), *case.glob("actor/*.bin")):
        catalog = sm.inspect(path)
        assert dict(catalog.entries) == dict(whole.entries)
        assert path.name in catalog.notes[0]


def test_a_conversion_has_the_bits_and_the_config(tmp_path: Path) -> None:
    sm.convert(FSDP2 / "actor", tmp_path / "out", options=sm.Options(sync=False))
    truth, found = load_file(FSDP2 / "truth.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(truth)
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())
    assert (tmp_path / "out/config.json").is_file()


def test_tied_weights_are_one() -> None:
    catalog = sm.inspect(GOLDEN / "ranks/fsdp2_tied_w2_bf16/actor")
    assert dict(catalog.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_lora_among_the_ranks_is_told() -> None:
    catalog = sm.inspect(GOLDEN / "ranks/fsdp2_lora_w2_fp32/actor")
    assert dict(catalog.facts) == {"lora_r": 2, "lora_alpha": 4, "lora_task_type": "CAUSAL_LM"}
    assert any("lora_train_meta.json" in note for note in catalog.notes)


def test_flat_parameters_are_refused_by_name(tmp_path: Path) -> None:
    here = GOLDEN / "ranks/local_w2_fp32/actor"
    assert refusal(here).code == refusal(here / "pytorch_model_fsdp_rank1.bin").code == "flat-parameters"
    torch.save({"model": {"layers.0.flat_param_0": torch.ones(4)}}, tmp_path / "model.pt")  # fairscale's
    assert refusal(tmp_path / "model.pt").code == "flat-parameters"
    torch.save({"flat_params.weight": torch.ones(4)}, tmp_path / "other.pt")  # a module of that name is none
    assert len(sm.inspect(tmp_path / "other.pt").entries) == 1


# --- the directories around them ---


def test_a_run_of_verl_is_entered_anywhere(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    for step in (5, 10):
        shutil.copytree(FSDP2 / "actor", run / f"global_step_{step}" / "actor")
    (run / "latest_checkpointed_iteration.txt").write_text("10")
    catalog = sm.inspect(run)
    assert_is_truth(catalog, FSDP2)
    assert {Path(stamp.path).parent.parent.name for stamp in catalog.files} == {"global_step_10"}
    assert "config.json" in catalog.side_files
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    assert any("global_step_10 is newer" in warning for warning in sm.inspect(run).warnings)
    assert_is_truth(sm.inspect(run / "global_step_5"), FSDP2)
    shutil.copytree(HSDP / "actor", run / "global_step_5" / "critic")
    assert any("critic" in warning for warning in sm.inspect(run / "global_step_5").warnings)
    (run / "latest_checkpointed_iteration.txt").unlink()
    error = refusal(run)
    assert (error.code, error.hint.endswith("global_step_10")) == ("several-checkpoints", True)
    shutil.copytree(FSDP2 / "actor", tmp_path / "sft/global_step_7")  # fine-tuning has no actor/
    (tmp_path / "sft/latest_checkpointed_iteration.txt").write_text("7\n")
    assert_is_truth(sm.inspect(tmp_path / "sft"), FSDP2)


def torch_checkpointing(folder: Path, items: Mapping[str, Path], world: int = 2) -> Path:
    """The files of torch_checkpointing 0.1: ``<item>_R.pt``, here ranks that torch wrote, and ``metadata.pkl``."""
    folder.mkdir()
    for item, case in items.items():
        for rank in range(world):
            shutil.copy(case / f"actor/model_world_size_{world}_rank_{rank}.pt", folder / f"{item}_{rank}.pt")
    for rank in range(world):
        torch.save(2, folder / f"step_{rank}.pt")
    stated = {"metadata": {item: {"nested_path_to_metadata": {}} for item in (*items, "step")}, "world_size": world}
    (folder / "metadata.pkl").write_bytes(pickle.dumps({**stated, "version": "2.0"}))
    return folder


def test_items_of_torch_checkpointing(tmp_path: Path) -> None:
    folder = torch_checkpointing(tmp_path / "step-2", {"model": FSDP2})
    assert_is_truth(sm.inspect(folder), FSDP2)
    assert_is_truth(sm.inspect(folder / "model_1.pt"), FSDP2)
    assert refusal(folder / "step_0.pt").code == "no-tensors"
    (folder / "model_1.pt").unlink()
    error = refusal(folder)
    assert error.code == "missing-rank"
    assert "model_1.pt" in error.what
    two = torch_checkpointing(tmp_path / "two", {"policy": FSDP2, "value": FSDP2})
    error = refusal(two)
    assert (error.code, "policy_0.pt" in error.hint) == ("several-files", True)
    assert_is_truth(sm.inspect(two / "policy_0.pt"), FSDP2)
    (two / "metadata.pkl").write_bytes((two / "metadata.pkl").read_bytes()[:40])
    assert refusal(two).code == "damaged-pickle"


def test_a_set_of_another_world_is_left_where_the_config_says_which(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    shutil.copy(HSDP / "actor/model_world_size_4_rank_0.pt", here)
    assert_is_truth(sm.inspect(here), FSDP2)
    (here / "fsdp_config.json").unlink()
    assert refusal(here).code == "several-files"


def test_a_file_of_a_run_of_one_rank_is_a_model_under_any_name(tmp_path: Path) -> None:
    one = GOLDEN / "ranks/fsdp2_w1_bf16"
    shutil.copy(one / "actor/model_world_size_1_rank_0.pt", tmp_path / "model.pt")
    assert_is_truth(sm.inspect(tmp_path / "model.pt"), one)
    shutil.copy(FSDP2 / "actor/model_world_size_2_rank_0.pt", tmp_path / "part.pt")
    error = refusal(tmp_path / "part.pt")
    assert error.code == "one-rank"


def test_ranks_inside_of_a_root(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    for path in here.glob("*.pt"):
        torch.save({"state": {"net": torch.load(path, weights_only=False)}, "step": 3}, path)
    assert refusal(here).code == "no-tensors"
    catalog = sm.inspect(here, root="state.net")
    assert_is_truth(catalog, FSDP2)


# --- ranks that are missing, and those that are not needed ---


@pytest.mark.parametrize("case", [FSDP2, TP, BAG], ids=lambda case: case.name)
def test_a_missing_rank_is_named(case: Path, tmp_path: Path) -> None:
    world = json.loads((case / "case.json").read_text())["world"]
    for rank in range(world):
        here = copied(case, tmp_path / str(rank), rank)
        error = refusal(here)
        assert error.code == "missing-rank"
        assert f"model_world_size_{world}_rank_{rank}.pt" in error.what


def test_where_no_name_says_how_many_ranks_there_are_the_tensors_do(tmp_path: Path) -> None:
    here = copied(GOLDEN / "ranks/fsdp1_bag_w3_fp32", tmp_path)
    (here / "pytorch_model_fsdp_0_rank2.bin").unlink()
    error = refusal(here)
    assert error.code == "missing-rank"
    assert "pytorch_model_fsdp_0_rank2.bin" in error.what


@pytest.mark.parametrize(("gone", "whole"), [((2, 3), True), ((0, 3), True), ((1, 3), False), ((0, 1, 2), False)])
def test_replicas_are_not_needed(gone: tuple[int, ...], *, whole: bool, tmp_path: Path) -> None:
    here = copied(HSDP, tmp_path, *gone)
    if whole:
        catalog = sm.inspect(here)
        assert_is_truth(catalog, HSDP)
        assert any("2 of 4 rank files" in note for note in catalog.notes)
    else:
        assert refusal(here).code == "missing-rank"


def test_a_world_of_millions_is_refused_at_once(tmp_path: Path) -> None:
    shutil.copy(FSDP2 / "actor/model_world_size_2_rank_0.pt", tmp_path / "model_world_size_9999999_rank_0.pt")
    error = refusal(tmp_path)
    assert error.code == "missing-rank"
    assert len(error.what) < 500


# --- files that do not belong together ---


def test_files_that_disagree_on_the_world(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    (here / "fsdp_config.json").write_text('{"world_size": 4}')
    assert "fsdp_config.json says 4" in refusal(here).found
    (here / "fsdp_config.json").unlink()
    shutil.copy(here / "model_world_size_2_rank_0.pt", here / "model_world_size_2_rank_2.pt")
    assert refusal(here).code == "mixed-ranks"
    (here / "model_world_size_2_rank_2.pt").unlink()
    for rank in range(2):
        shutil.copy(HSDP / f"actor/model_world_size_4_rank_{rank}.pt", here / f"model_world_size_2_rank_{rank}.pt")
    error = refusal(here)
    assert (error.code, "has 4 ranks" in error.found) == ("mixed-ranks", True)


def test_one_rank_twice_leaves_a_hole(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    shutil.copy(here / "model_world_size_2_rank_0.pt", here / "model_world_size_2_rank_1.pt")
    assert {error.code for error in refusal(here).each()} == {"box-hole"}


def test_ranks_of_two_models(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    last = here / "model_world_size_2_rank_1.pt"
    rewritten(last, lambda state: state.pop("model.norm.weight"))
    assert refusal(here).code == "mixed-ranks"
    shutil.copy(FSDP2 / "actor" / last.name, last)
    rewritten(last, lambda state: state.update({"model.norm.weight": torch.ones(8)}))
    error = refusal(here)
    assert (error.code, "not sharded" in error.found) == ("mixed-ranks", True)


def test_tensors_that_are_no_copies_are_no_model(tmp_path: Path) -> None:
    """Experts that each rank has of its own, under one name: taking one for all would be a wrong model."""
    here = copied(BAG, tmp_path)
    files = sorted(here.glob("*.pt"))
    for rank, path in enumerate(files):
        rewritten(path, lambda state, rank=rank: state.update({"experts.weight": torch.full((4, 3), float(rank))}))
    error = refusal(here)
    assert error.code == "ranks-differ"
    assert "experts.weight" in error.what
    for rank, path in enumerate(files):
        rewritten(path, lambda state, rank=rank: (state.pop("experts.weight"), state.update(own(rank))))
    catalog = sm.inspect(here)
    assert any("bn.running_mean" in warning for warning in catalog.warnings)
    assert read_entry(catalog["bn.running_mean"]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("crc", [True, False])
def test_without_checksums_the_bytes_are_compared(*, crc: bool, tmp_path: Path) -> None:
    here = copied(BAG, tmp_path)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=crc)
    try:
        for rank, path in enumerate(sorted(here.glob("*.pt"))):
            # one storage in all ranks and another part of it in each, or other values at one place
            scale = torch.arange(6.0)[rank : rank + 3] if crc else torch.full((3,), float(rank))
            rewritten(path, lambda state, scale=scale: state.update(scale=scale))
    finally:
        torch.serialization.set_crc32_options(compute_crc32=before)
    assert refusal(here).code == "ranks-differ"


def test_whole_tensors_alone_do_not_say_that_a_rank_is_not_needed(tmp_path: Path) -> None:
    torch.save({"experts.weight": torch.ones(2)}, tmp_path / "model_world_size_2_rank_0.pt")
    assert refusal(tmp_path).code == "missing-rank"
    torch.save({"experts.weight": torch.ones(2)}, tmp_path / "model_world_size_2_rank_1.pt")
    assert len(sm.inspect(tmp_path).entries) == 1


def test_weights_that_are_tied_in_one_rank_alone_are_two(tmp_path: Path) -> None:
    here = copied(GOLDEN / "ranks/fsdp2_tied_w2_bf16", tmp_path)
    last = here / "model_world_size_2_rank_1.pt"
    rewritten(last, lambda state: state.update({"lm_head.weight": pickle.loads(pickle.dumps(state["lm_head.weight"]))}))
    catalog = sm.inspect(here)
    assert not catalog.aliases
    assert_is_truth(catalog, GOLDEN / "ranks/fsdp2_tied_w2_bf16")


def own(rank: int) -> dict[str, torch.Tensor]:
    """What BatchNorm counts in each rank."""
    return {"bn.running_mean": torch.full((2,), float(rank)), "bn.num_batches_tracked": torch.tensor(7)}


def test_equal_values_in_other_storages_are_copies(tmp_path: Path) -> None:
    """A checksum that differs says nothing yet: a view lies in a storage with other numbers beside."""
    here = copied(BAG, tmp_path)
    for rank, path in enumerate(sorted(here.glob("*.pt"))):
        wide = torch.cat([torch.arange(3.0), torch.full((5,), float(rank))])
        rewritten(path, lambda state, wide=wide: state.update(scale=wide[:3]))
    assert read_entry(sm.inspect(here)["scale"]).tolist() == [0.0, 1.0, 2.0]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_tensor_is_left_out_and_never_run(tmp_path: Path) -> None:
    here = copied(FSDP2, tmp_path)
    touched = tmp_path / "touched"
    for path in here.glob("*.pt"):
        state = torch.load(path, weights_only=False)
        torch.save({**state, "step": 3, "note": Evil(touched)}, path)
    catalog = sm.inspect(here)
    assert_is_truth(catalog, FSDP2)
    assert any("2 entries are no tensors" in note for note in catalog.notes)
    assert not touched.exists()


# --- what a tensor says of itself ---


def one_of(case: Path, name: str, rank: int = 1) -> Opaque:
    """A tensor in a rank's file, read anew: it may be changed."""
    world = json.loads((case / "case.json").read_text())["world"]
    root = read_torch_file(case / f"actor/model_world_size_{world}_rank_{rank}.pt").root
    assert isinstance(root, dict)
    value = root[name]
    assert isinstance(value, Opaque)
    return value


def spec(value: Opaque) -> Any:
    return attributes(attributes(value.args[3])["_spec"])


def mesh(value: Opaque) -> Any:
    return attributes(spec(value)["mesh"])


def placement(value: Opaque, name: str, **state: PickleValue) -> None:
    spec(value)["placements"] = (Opaque(Global("torch", name), (), dict(state)),)


LIES: dict[str, tuple[Callable[[Opaque], object], str]] = {
    "no placements": (lambda value: spec(value).update(placements=None), "damaged-dtensor"),
    "a placement too many": (lambda value: spec(value).update(placements=(None, None)), "damaged-dtensor"),
    "an axis too many": (lambda value: placement(value, "Shard", dim=2), "damaged-dtensor"),
    "an axis below zero": (lambda value: placement(value, "Shard", dim=-1), "damaged-dtensor"),
    "an axis that is no number": (lambda value: placement(value, "Shard", dim="0"), "damaged-dtensor"),
    "partial sums": (lambda value: placement(value, "Partial", reduce_op="sum"), "unsupported-tensor"),
    "rows apart": (lambda value: placement(value, "_StridedShard", dim=0, split_factor=3), "unsupported-tensor"),
    "a placement of a later torch": (lambda value: placement(value, "RaggedShard", dim=0), "unsupported-tensor"),
    "a replica that is a part": (lambda value: placement(value, "Replicate"), "box-size"),
    "the other axis": (lambda value: placement(value, "Shard", dim=1), "box-size"),
    "no coordinate": (lambda value: mesh(value).pop("_coordinate_on_dim"), "damaged-dtensor"),
    "a coordinate outside": (lambda value: mesh(value).update(_coordinate_on_dim=(2,)), "damaged-dtensor"),
    "a coordinate that is none": (lambda value: mesh(value).update(_coordinate_on_dim=("1",)), "damaged-dtensor"),
    "a rank outside of the mesh with data": (lambda value: mesh(value).update(_coordinate_on_dim=None), "box-size"),
    "no mesh": (lambda value: spec(value).update(mesh=None), "damaged-dtensor"),
    "a mesh of no size": (lambda value: mesh(value).update(_layout=None), "damaged-dtensor"),
    "a mesh of zero ranks": (lambda value: mesh(value).update(_layout={"shape": (0,)}), "damaged-dtensor"),
    "a mesh of many ranks": (lambda value: mesh(value).update(_layout={"shape": (1 << 60,)}), "damaged-dtensor"),
    "a mesh of many axes": (lambda value: mesh(value).update(_layout={"shape": (2,) * 60}), "damaged-dtensor"),
    "another shape in the spec": (lambda value: spec(value).update(tensor_meta={"shape": (34, 8)}), "damaged-dtensor"),
    "a local part that is no tensor": (
        lambda value: dict.__setitem__(value.args[3][1], "_local_tensor", None),  # type: ignore[index, arg-type]
        "unsupported-tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_dtensor_that_lies_is_refused(lie: str) -> None:
    value = one_of(FSDP2, "model.embed_tokens.weight")
    assert local_tensor(value, Meshes(), "here") is not None
    change, code = LIES[lie]
    change(value)
    with pytest.raises(CheckpointError) as caught:
        local_tensor(value, Meshes(), "here")
    assert caught.value.code == code
    assert caught.value.where == "here"


def test_meshes_of_other_versions_say_the_same() -> None:
    """2.2 to 2.9 keep the ranks as a tensor, 2.10 to 2.12 a layout of one shape, 2.13 axes of a shape each."""
    name = "model.embed_tokens.weight"
    expected = local_tensor(one_of(TP, name), Meshes(), "")
    older, middle = one_of(TP, name), one_of(TP, name)
    ranks = mesh(older)["_rank_map"]
    table = TensorRef(ranks.storage, ranks.dtype, 0, (2, 2), (2, 1))
    spec(older)["mesh"] = Opaque(
        Global("torch.distributed.device_mesh", "DeviceMesh"),
        (),
        {"mesh": table, "mesh_dim_names": ("dp", "tp"), "_coordinate_on_dim": [0, 1]},
    )
    mesh(middle)["_layout"] = Opaque(Global("m", "_MeshLayout"), (), {"shape": (2, 2), "stride": (2, 1)})
    assert local_tensor(older, Meshes(), "") == local_tensor(middle, Meshes(), "") == expected
    flat, one = one_of(FSDP2, name), local_tensor(one_of(FSDP2, name), Meshes(), "")
    mesh(flat)["_layout"] = Opaque(Global("m", "_MeshLayout"), (), {"shape": 2, "stride": 1})
    assert local_tensor(flat, Meshes(), "") == one


SHARDED_LIES: dict[str, Callable[[Any, Any], object]] = {
    "another size": lambda shard, metadata: metadata.update(size=(1,)),
    "an offset too few": lambda shard, metadata: attributes(shard["metadata"]).update(shard_offsets=[0]),  # type: ignore[attr-defined]
    "no offsets": lambda shard, metadata: attributes(shard["metadata"]).pop("shard_offsets"),  # type: ignore[attr-defined]
    "other sizes": lambda shard, metadata: attributes(shard["metadata"]).update(shard_sizes=[9, 9]),  # type: ignore[attr-defined]
    "no tensor": lambda shard, metadata: shard.update(tensor=None),
    "another type": lambda shard, metadata: shard.update(tensor=replace(shard["tensor"], dtype=DTYPES["F64"])),  # type: ignore[type-var]
}


@pytest.mark.parametrize("lie", SHARDED_LIES)
def test_a_sharded_tensor_that_lies_is_refused(lie: str) -> None:
    root = read_torch_file(GOLDEN / "ranks/fsdp1_bag_w3_fp32/actor/pytorch_model_fsdp_0_rank0.bin").root
    assert isinstance(root, dict)
    value = root["matrix.weight"]
    assert isinstance(value, Opaque)
    assert isinstance(value.args[3], tuple)
    shards, metadata, *_ = value.args[3]
    assert isinstance(shards, list)
    assert local_tensor(value, Meshes(), "") is not None
    SHARDED_LIES[lie](attributes(shards[0]), attributes(metadata))
    with pytest.raises(CheckpointError) as caught:
        local_tensor(value, Meshes(), "here")
    assert caught.value.code in ("damaged-dtensor", "unsupported-tensor")


# --- torch's rules ---


def described(
    shape: tuple[int, ...],
    mesh_sizes: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[PickleValue, ...],
    held: tuple[int, ...],
) -> LocalTensor | None:
    """What we make of a DTensor that is described so."""
    value = one_of(FSDP2, "model.embed_tokens.weight")
    local = attributes(value.args[3])["_local_tensor"]
    assert isinstance(local, TensorRef)
    dtype = Global("torch", local.dtype.torch)
    state = {
        "_local_tensor": TensorRef(local.storage, local.dtype, 0, held, (1,) * len(held)),
        "_spec": {
            "mesh": {"_layout": {"shape": mesh_sizes}, "_coordinate_on_dim": coordinate},
            "placements": placements,
            "tensor_meta": {"shape": shape},
        },
    }
    args = (value.args[0], value.args[1], (value.args[1], dtype, shape, (1,) * len(shape)), (None, state))
    return local_tensor(Opaque(value.type, args), Meshes(), "")


def pickled(placement: Placement) -> PickleValue:
    names = ("dim", "split_factor")
    return Opaque(
        Global("", type(placement).__name__), (), {n: getattr(placement, n) for n in names if hasattr(placement, n)}
    )


@given(st.data())
def test_boxes_are_those_that_torch_computes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    kinds = st.one_of(st.builds(Shard, st.integers(0, len(shape) - 1)), st.just(Replicate()))
    placements = tuple(data.draw(kinds) for _ in sizes)
    held, offsets = _compute_local_shape_and_global_offset(shape, sizes, list(place), placements)
    found = described(shape, sizes, place, tuple(map(pickled, placements)), held)
    assert found is not None
    assert found.shape == shape
    assert [part[0] for part in found.parts] == ([offsets] if 0 not in held else [])


@settings(max_examples=20)  # of up to 75 ranks each
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_strided_shards_are_the_chunks_of_chunks(rows: int, outer: int, inner: int, third: int) -> None:
    """FSDP2 over tensor parallelism, over sequence parallelism: the last axis of the mesh cuts first."""
    strided = [("_StridedShard", inner * third), ("_StridedShard", third), ("Shard", 1)]
    placements = tuple(Opaque(Global("", name), (), {"dim": 0, "split_factor": factor}) for name, factor in strided)
    sizes = (outer, inner, third)
    numbers = torch.arange(rows)
    for last, part in enumerate(chunks(numbers, third)):
        for middle, smaller in enumerate(chunks(part, inner)):
            for first, smallest in enumerate(chunks(smaller, outer)):
                found = described((rows,), sizes, (first, middle, last), placements, tuple(smallest.shape))
                assert found is not None
                assert [part[0] for part in found.parts] == [(int(number),) for number in smallest[:1]]


def chunks(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """What torch.chunk gives, and the empty ones that it leaves out."""
    found = list(torch.chunk(tensor, count))
    return found + [tensor[:0]] * (count - len(found))


def test_a_stated_order_of_shards_is_followed() -> None:
    """``shard_order``: the second axis of the mesh cuts before the first."""
    value = one_of(GOLDEN / "ranks/placements_2x2_fp32", "model.embed_tokens.weight", rank=1)
    local = local_tensor(value, Meshes(), "")
    assert local is not None
    assert local.parts[0][0] == (9, 0)  # 33 rows: 17 and 16, then 9 and 8
    spec(value)["shard_order"] = (Opaque(Global("", "ShardOrderEntry"), (0, (1, 0))),)
    turned = local_tensor(value, Meshes(), "")
    assert turned is not None
    assert turned.parts[0][0] == (17, 0)  # its 16 rows, and of them the first 8
