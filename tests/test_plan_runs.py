"""A plan that was written down and read gives the bytes of the mapping: here, at another path, and nowhere else."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import shardmerge as sm
from shardmerge import api
from shardmerge.prepare.options import Prepared
from tests.plans_in_use import PLANS
from tests.random_mappings import draw, write_mapping, write_sources

OPTIONS = sm.Options(sync=False)


def bytes_of(folder: Path) -> Mapping[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def both_ways(prepared: Prepared, folder: Path) -> Path:
    """Carries out a plan, and what is read of its text; returns the one result once both are equal."""
    api.write_plan(prepared, folder / "plan.json", folder / "read")
    read = api.prepare(folder / "plan.json", OPTIONS)
    assert read.plan == prepared.plan
    assert read.plan.id == prepared.plan.id
    api.carry_out(prepared, folder / "planned", OPTIONS)
    api.carry_out(read, folder / "read", OPTIONS)
    assert bytes_of(folder / "planned") == bytes_of(folder / "read")
    return folder / "planned"


@pytest.mark.parametrize("name", PLANS)
def test_what_is_read_is_carried_out_alike(name: str, tmp_path: Path) -> None:
    """Every preset, and every kind of checkpoint; the receipt included."""
    both_ways(PLANS[name](tmp_path), tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_two_hundred_mappings(seed: int, tmp_path: Path) -> None:
    """Drawn at random, ten tensors each; the values are those that torch makes."""
    source = random.Random(seed)
    tensors = write_sources(tmp_path)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        drawn = {f"t{i}": draw(source, tensors) for i in range(10)}
        mapping = write_mapping(tmp_path, drawn, tensors, source.choice(["", ", format: bin"]))
        found = sm.open_checkpoint(both_ways(api.prepare_mapping(mapping, OPTIONS), folder))
        for name, one in drawn.items():
            assert tuple(found[name].shape) == tuple(one.value.shape), one.text
            made = found[name].torch(copy=True)
            assert torch.allclose(made.double(), one.value.double(), rtol=2e-2, atol=1e-3), one.text


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    tensors = write_sources(tmp_path / "here")
    return write_mapping(tmp_path / "here", {f"t{i}": draw(random.Random(i), tensors) for i in range(6)}, tensors)


def _planned(mapping: Path) -> Prepared:
    prepared = api.prepare_mapping(mapping, OPTIONS)
    api.write_plan(prepared, mapping.parent.parent / "plan.json")
    return prepared


def _at(mapping: Path, place: Path) -> Prepared:
    plan = mapping.parent.parent / "plan.json"
    return api.prepare(plan, OPTIONS, [(str(mapping.parent), str(place))])


@pytest.mark.parametrize("way", ["moved", "copied with its times"])
def test_files_that_are_elsewhere_now(way: str, mapping: Path, tmp_path: Path) -> None:
    prepared, there = _planned(mapping), tmp_path / "there"
    api.carry_out(prepared, tmp_path / "planned", OPTIONS)
    if way == "moved":
        mapping.parent.rename(there)
    else:
        shutil.copytree(mapping.parent, there)
        shutil.rmtree(mapping.parent)
    read = _at(mapping, there)
    assert read.plan.id == prepared.plan.id
    assert all(stamp.path.startswith(str(there)) for stamp in read.plan.files())
    api.carry_out(read, tmp_path / "read", OPTIONS)
    planned, found = bytes_of(tmp_path / "planned"), bytes_of(tmp_path / "read")
    assert planned == found


@pytest.mark.parametrize("name", ["a.safetensors", "b.pth"])
@pytest.mark.parametrize("change", ["time", "size"])
def test_files_that_are_others_there_are_refused(name: str, change: str, mapping: Path, tmp_path: Path) -> None:
    _planned(mapping)
    there = tmp_path / "there"
    shutil.copytree(mapping.parent, there)
    before = (there / name).stat()
    if change == "size":
        with (there / name).open("ab") as file:
            file.write(b"\0")
    times = (before.st_atime_ns, before.st_mtime_ns + (1 if change == "time" else 0))
    os.utime(there / name, ns=times)
    with pytest.raises(sm.CheckpointError) as caught:
        api.carry_out(_at(mapping, there), tmp_path / "out", OPTIONS)
    assert caught.value.code == "source-changed"
    assert caught.value.where == str(there / name)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial-*"))
