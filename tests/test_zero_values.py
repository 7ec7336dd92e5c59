"""Masters without names are known by their values: ZeRO stage 0, as DeepSpeed saved it and in any other order."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.sources.deepspeed_values import number_of, place, rounded_bytes, spread_places
from shardmerge.sources.pickle_values import Global, Opaque, StorageRef, TensorRef
from shardmerge.sources.value_digest import value_digest
from tests.conftest import GOLDEN, read_all, same_values

ORDERED = ("order_z0_w2_bf16", "fused_z0_w2_fp16", "fused_order_z0_w2_fp16", "llama_z0_w2_bf16", "llama_z0_w2_fp16")
MODEL = "mp_rank_00_model_states.pt"


def tag_of(case: str) -> Path:
    folder = GOLDEN / "zero" / case / "ckpt"
    return folder / (folder / "latest").read_text()


def edited(case: str, folder: Path, edit: Callable[[dict], None]) -> sm.Catalog:
    root = torch.load(tag_of(case) / MODEL, weights_only=False)
    edit(root)
    folder.mkdir()
    torch.save(root, folder / MODEL)
    return sm.inspect(folder)


def is_fp32_truth(catalog: sm.Catalog, case: str) -> bool:
    found = read_all(catalog)
    truth = load_file(GOLDEN / "zero" / case / "truth.safetensors")
    return found.keys() == truth.keys() and all(same_values(found[k], v.double().numpy()) for k, v in truth.items())


def is_module(catalog: sm.Catalog, root: dict) -> bool:
    found = read_all(catalog)
    return all(same_values(found[name], t.double().numpy()) for name, t in root["module"].items())


@pytest.mark.parametrize("case", ORDERED)
def test_the_order_of_the_optimizer_does_not_matter(case: str) -> None:
    """DeepSpeed's own files: one group or two, in the model's order or reversed, tensors or flat."""
    catalog = sm.inspect(tag_of(case))
    assert is_fp32_truth(catalog, case)
    assert {entry.origin for entry in catalog.entries.values()} == {"fp32 masters"}
    assert not catalog.warnings


@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_any_groups(seed: int, tmp_path: Path) -> None:
    def shuffle(root: dict) -> None:
        masters = [tensor for group in root["optimizer"]["fp32_groups"] for tensor in group]
        random.Random(seed).shuffle(masters)
        cut = seed * 3
        root["optimizer"]["fp32_groups"] = [masters[:cut], masters[cut:]]

    catalog = edited("llama_z0_w2_bf16", tmp_path / "tag", shuffle)
    assert is_fp32_truth(catalog, "llama_z0_w2_bf16")
    assert not catalog.warnings


@pytest.mark.parametrize("case", ["llama_z0_w2_bf16", "fused_z0_w2_fp16"])
@pytest.mark.parametrize("change", ["one weight", "one tensor less", "another tensor"])
def test_masters_that_are_not_the_modules_are_not_used(case: str, change: str, tmp_path: Path) -> None:
    kept = {}

    def edit(root: dict) -> None:
        optimizer = root["optimizer"]
        flat = "fp32_groups_flat" in optimizer
        group = optimizer["fp32_groups_flat"] if flat else optimizer["fp32_groups"][0]
        if change == "one weight":
            group[0].data.view(-1)[5] += 1
        elif change == "one tensor less":
            group[-1:] = [group[-1][:-1]] if flat else []
        else:
            group[-1] = torch.randn_like(group[-1])
        kept.update(root)

    catalog = edited(case, tmp_path / "tag", edit)
    if change == "one tensor less" and case.startswith("llama"):
        assert sum(entry.origin == "fp32 masters" for entry in catalog.entries.values()) == 20  # a frozen parameter
        return
    assert is_module(catalog, kept)
    assert any("16-bit module" in warning for warning in catalog.warnings)


def _alike(root: dict, *, reverse: bool) -> None:
    """Norms trained so little that all of them are still ones in bf16, though not in fp32."""
    group = root["optimizer"]["fp32_groups"][0]
    for index, name in enumerate(root["module"]):
        if "norm" in name:
            root["module"][name] = torch.ones_like(root["module"][name])
            group[index] = 1 + torch.arange(8) * 1e-6 * (1 + index)
    if reverse:
        group.reverse()


def test_tensors_alike_in_16_bits_are_told_by_their_neighbours(tmp_path: Path) -> None:
    wanted = {}

    def edit(root: dict) -> None:
        _alike(root, reverse=False)
        wanted.update(zip(root["module"], root["optimizer"]["fp32_groups"][0], strict=True))

    found = read_all(edited("llama_z0_w2_bf16", tmp_path / "tag", edit))
    assert all(same_values(found[name], tensor.detach().double().numpy()) for name, tensor in wanted.items())


def test_tensors_alike_in_16_bits_in_another_order_are_not_guessed(tmp_path: Path) -> None:
    kept = {}

    def edit(root: dict) -> None:
        _alike(root, reverse=True)
        kept.update(root)

    catalog = edited("llama_z0_w2_bf16", tmp_path / "tag", edit)
    assert is_module(catalog, kept)
    assert catalog.warnings


def test_a_checkpoint_that_lost_its_masters_says_so(tmp_path: Path) -> None:
    """DeepSpeed 0.17.6 saves none for bf16 at stage 0 (deepspeedai/DeepSpeed#7786)."""
    catalog = edited("llama_z0_w2_bf16", tmp_path / "tag", lambda root: root.update(optimizer=None))
    assert catalog.warnings == ("the checkpoint has no fp32 masters: the 16-bit module is taken",)
    assert not sm.inspect(tag_of("llama_z0_w2_fp32")).warnings


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_rounding_has_the_bits_of_torch(name: str) -> None:
    dtype = getattr(torch, DTYPES[name].torch)
    patterns = torch.cat([
        torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0)).int(),
        torch.arange(0x47800000 - 3000, 0x47800000 + 3000).int(),  # about the largest fp16
        torch.arange(0x33000000 - 50, 0x33000000 + 50).int(),  # about half the smallest
        torch.tensor([0, -(2**31), 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 0x3F808000, 0x3F818000]).int(),
    ])  # fmt: skip
    values = patterns.view(torch.float32)
    want = values.to(dtype)
    for value, pattern, other in zip(values, patterns, want, strict=True):
        mine = rounded_bytes(number_of(struct.pack("<i", pattern.item()), DTYPES["F32"]), DTYPES[name])
        raw = bytes(other.reshape(1).view(torch.uint8).tolist())
        assert mine == (b"NaN" if value.isnan() else raw), hex(pattern.item() & 0xFFFFFFFF)
        assert (
            rounded_bytes(number_of(raw, DTYPES[name]), DTYPES[name]) == mine
        )  # and what was read is what was written


def test_places_of_sampled_elements() -> None:
    base = torch.arange(120).reshape(6, 20)
    for view in (base, base.t(), base[1:, ::3], base[2], base[:, 4:5]):
        ref = TensorRef(StorageRef("0", DTYPES["F32"], 120), DTYPES["F32"], view.storage_offset(), *_geometry(view))
        assert [place(ref, i) for i in range(view.numel())] == view.flatten().tolist()
    assert spread_places(3, 8) == [0, 1, 2]
    assert spread_places(100, 4) == [0, 33, 66, 99]
    assert spread_places(10**12, 1) == [0]


def _geometry(view: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(view.shape), view.stride()


# --- digests of what files state ---


def _doubled(depth: int) -> dict[object, object]:
    value: dict[object, object] = {"x": 1}
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


def test_a_digest_visits_an_object_once() -> None:
    """2 ** 300 leaves, and as a text more bytes than there are atoms."""
    assert value_digest(_doubled(300)) == value_digest(_doubled(300))
    assert value_digest(_doubled(300)) != value_digest(_doubled(299))


def _refs() -> list[StorageRef | TensorRef]:
    """A storage and a tensor, and others that differ in one field."""
    f32, bf16 = DTYPES["F32"], DTYPES["BF16"]
    storages = [StorageRef("0", f32, 6), StorageRef("1", f32, 6), StorageRef("0", bf16, 6), StorageRef("0", f32, 7)]
    one = TensorRef(storages[0], f32, 0, (2, 2), (2, 1))
    others: list[dict[str, Any]] = [{"storage": storage} for storage in storages[1:]]
    others += [{"dtype": bf16}, {"offset": 1}, {"shape": (2, 1)}, {"strides": (1, 2)}]
    return [*storages, one, *(replace(one, **other) for other in others)]


def test_a_digest_tells_values_apart_and_not_objects() -> None:
    shared = {"x": [1, 2]}
    assert value_digest([shared, shared]) == value_digest([{"x": [1, 2]}, {"x": [1, 2]}])
    different = [1, True, 1.0, "1", b"1", None, [1], (1,), {1}, {"1": 1}, {1: "1"}, [[1]], [], 10**5000, -0.0, 0.0]
    different += [{"a": 1, "b": 2}, {"b": 2, "a": 1}, Opaque(Global("a", "B"), ()), Opaque(Global("a", "C"), ())]
    different += _refs()
    assert len({value_digest(value) for value in different}) == len(different)
    assert list(map(value_digest, _refs())) == list(map(value_digest, _refs()))
    assert value_digest({"a", "b", "c"}) == value_digest({"c", "b", "a"})
    loop: list[object] = []
    loop.append(loop)
    assert value_digest(loop)
    deep: list[object] = []
    for _ in range(100_000):  # far beyond Python's recursion limit
        deep = [deep]
    assert value_digest(deep)


def test_a_config_that_doubles_itself_is_compared(tmp_path: Path) -> None:
    """Written out, such a ds_config took 9 s at depth 22; the files agree and are read."""
    tag = shutil.copytree(tag_of("llama_z2_w1_bf16"), tmp_path / "tag")
    for path in tag.glob("*_states.pt"):
        root = torch.load(path, weights_only=False) if "model" in path.name else None
        if root is not None:
            root["ds_config"]["zero_optimization"]["more"] = _doubled(40)
            torch.save(root, path)
    with pytest.raises(sm.CheckpointError) as caught:  # the optimizer file has the plain one
        sm.inspect(tag)
    assert caught.value.code == "mixed-runs"
    assert len(str(caught.value)) < 2000
