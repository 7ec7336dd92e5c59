"""Views of mapped files hold what safetensors, torch and DeepSpeed read of the same files, and read no byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import shardmerge
from shardmerge.dtypes import BY_STORAGE_CLASS, DTYPES
from shardmerge.lazy import LazyTensor
from shardmerge.ops.arrays import numpy_dtype


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself there, and -0 is not 0."""
    return values.contiguous().reshape(-1).view(torch.uint8)


def bytes_read(tensor: LazyTensor) -> int:
    return tensor._reader._pool.bytes_read


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random bits of every element type, a scalar, and tensors without elements."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for row in DTYPES.values():
        raw = torch.randint(0, 256, (6 * 5 * row.itemsize,), dtype=torch.uint8, generator=random)
        raw = raw % 2 if row.kind == "bool" else raw
        found[row.name] = raw.view(getattr(torch, row.torch)).reshape(6, 5)
    return found | {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.zeros(3, 0, 2)}


def _safetensors(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    save_file(state, path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping


def _torch(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    torch.save(state, path)
    return torch.load(path, mmap=True, weights_only=True)


def _legacy(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Of the types that had a class of storages of their own; torch reads no others from such a file."""
    state = {name: tensor for name, tensor in state.items() if DTYPES.get(name) in {None, *BY_STORAGE_CLASS.values()}}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return torch.load(path, weights_only=True)


Writer = Callable[[dict[str, torch.Tensor], Path], dict[str, torch.Tensor]]
WRITERS = {"x.safetensors": _safetensors, "x.pt": _torch, "legacy.pt": _legacy}


# ---- what a view holds


@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_views_hold_what_the_reference_reads_and_read_no_byte(
    state: dict[str, torch.Tensor], name: str, write: Writer, tmp_path: Path
) -> None:
    expected = write(state, tmp_path / name)
    checkpoint = shardmerge.open_checkpoint(tmp_path / name)
    assert set(checkpoint) == set(expected)
    read = bytes_read(checkpoint["F32"])
    for key, tensor in checkpoint.items():
        array = tensor.numpy()
        assert bytes_read(tensor) == read
        assert (array.dtype, array.shape) == (numpy_dtype(tensor.dtype), tuple(expected[key].shape))
        assert array.tobytes() == bits(expected[key]).numpy().tobytes()
        assert tensor.mapped == (key != "empty")
        assert array.flags.writeable == (key == "empty")
        value = tensor.torch()
        assert (value.dtype, value.shape) == (expected[key].dtype, expected[key].shape)
        assert torch.equal(bits(value), bits(expected[key]))
        # torch before 1.6 wrote storages at any byte; torch cannot have those as they are.
        aligned = name != "legacy.pt" or not array.size or array.ctypes.data % array.itemsize == 0
        read += 0 if aligned else tensor.nbytes
        assert bytes_read(tensor) == read


def test_a_copy_is_read_and_may_be_written(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    expected = _safetensors(state, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    for key, tensor in shardmerge.open_checkpoint(tmp_path / "x.safetensors").items():
        read = bytes_read(tensor)
        array, value = tensor.numpy(copy=True), tensor.torch(copy=True)
        assert bytes_read(tensor) == read + 2 * tensor.nbytes
        assert torch.equal(bits(value), bits(expected[key]))
        array[...] = 0
        value.zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


def _shifted(path: Path, by: int) -> None:
    """Lengthens the header by spaces, as the format allows: the data begin at any byte."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + by).to_bytes(8, "little") + data[8 : 8 + length] + b" " * by + data[8 + length :])


@pytest.mark.parametrize("by", range(1, 8))
def test_elements_that_are_not_aligned_are_viewed_by_numpy_and_read_for_torch(
    state: dict[str, torch.Tensor], by: int, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "x.safetensors")
    _shifted(tmp_path / "x.safetensors", by)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("I32"), state["I32"].numpy())  # the reference takes such files
    for key, tensor in shardmerge.open_checkpoint(tmp_path / "x.safetensors").items():
        array, read = tensor.numpy(), bytes_read(tensor)
        assert array.tobytes() == bits(state[key]).numpy().tobytes()
        # The header ended at a multiple of 8, and the widest elements come first.
        assert array.flags.aligned == (array.size == 0 or by % array.dtype.alignment == 0)
        value = tensor.torch()
        assert torch.equal(bits(value), bits(state[key]))
        assert value.data_ptr() % value.element_size() == 0
        assert bytes_read(tensor) - read == (tensor.nbytes if by % value.element_size() else 0)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F16", "F64", "C64"])
def test_numpy_computes_with_elements_that_are_not_aligned(dtype: str, tmp_path: Path) -> None:
    row = DTYPES[dtype]
    values = torch.arange(1, 9).to(getattr(torch, row.torch)).reshape(2, 4)
    save_file({"w": values}, tmp_path / "x.safetensors")
    _shifted(tmp_path / "x.safetensors", 1)
    array = shardmerge.open_checkpoint(tmp_path / "x.safetensors")["w"].numpy()
    kind = np.complex64 if row.kind == "complex" else np.float32
    assert np.array_equal(array.T.astype(kind) * 2, np.arange(2, 17, 2).reshape(2, 4).T)
    assert np.array_equal((array[:, ::2] + array[:, 1::2]).astype(kind), [[3, 7], [11, 15]])


# ---- where a tensor does not lie in one piece


@pytest.mark.parametrize("case", ["llama_z2_w1_bf16", "llama_z2_w2_bf16", "llama_z3_w2_bf16"])
def test_partitions_are_views_where_one_rank_holds_all_of_a_tensor(golden: Path, case: str) -> None:
    """Against what DeepSpeed itself made of them. ZeRO-3 cuts every tensor, ZeRO-2 the one at the seam of two ranks."""
    checkpoint = shardmerge.open_checkpoint(golden / "zero" / case / "ckpt")
    with safe_open(golden / "zero" / case / "truth.safetensors", "pt") as file:
        for name, tensor in checkpoint.items():
            before = bytes_read(tensor)
            assert torch.equal(tensor.torch(), file.get_tensor(name))
            assert np.array_equal(tensor.numpy(), file.get_tensor(name).numpy())
            assert bytes_read(tensor) == before + (0 if tensor.mapped else 2 * tensor.nbytes)
            assert tensor.numpy().flags.writeable != tensor.mapped
    pieces = sum(not tensor.mapped for tensor in checkpoint.values())
    assert pieces == {"llama_z2_w1_bf16": 0, "llama_z2_w2_bf16": 1, "llama_z3_w2_bf16": len(checkpoint)}[case]


def test_views_of_a_merge(tmp_path: Path) -> None:
    """A name, a slice of rows and a reshape are views; a transposed tensor and a sum are made."""
    weight = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    save_file({"w": weight}, tmp_path / "x.safetensors")
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {x: x.safetensors}\ntensors:\n"
        "  name: x:w\n"
        '  rows: {op: slice, of: "x:w", dim: 0, start: 2, stop: 5}\n'
        '  flat: {op: reshape, of: "x:w", shape: [24]}\n'
        '  turned: {op: transpose, of: "x:w"}\n'
        '  twice: {op: add, of: ["x:w", "x:w"]}\n'
    )
    merge = shardmerge.open_checkpoint(tmp_path / "mapping.yaml")
    assert {name for name, tensor in merge.items() if tensor.mapped} == {"name", "rows", "flat"}
    expected = {
        "name": weight,
        "rows": weight[2:5],
        "flat": weight.reshape(24),
        "turned": weight.T,
        "twice": 2 * weight,
    }
    for name, tensor in merge.items():
        before = bytes_read(tensor)
        assert np.array_equal(tensor.numpy(), expected[name].numpy())
        assert torch.equal(tensor.torch(), expected[name])
        assert (bytes_read(tensor) == before) == tensor.mapped


# ---- numpy's protocol of copies


@pytest.fixture
def three(tmp_path: Path) -> dict[str, LazyTensor]:
    """A tensor that is mapped, one that is made, and one without elements."""
    save_file({"w": torch.arange(12.0).reshape(3, 4), "none": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {x: x.safetensors}\n"
        'tensors: {w: "x:w", none: "x:none", t: {op: transpose, of: "x:w"}}\n'
    )
    return dict(shardmerge.open_checkpoint(tmp_path / "mapping.yaml"))


def test_asarray_is_the_view(three: dict[str, LazyTensor]) -> None:
    mapped, made = np.asarray(three["w"]), np.asarray(three["t"])
    assert (mapped.flags.writeable, made.flags.writeable) == (False, True)
    assert np.shares_memory(mapped, three["w"].numpy())
    assert np.array_equal(mapped.T, made)


def test_array_is_a_copy_of_ones_own(three: dict[str, LazyTensor]) -> None:
    for tensor in three.values():
        for own in (np.array(tensor), np.array(tensor, copy=True), np.asarray(tensor, copy=True)):
            assert own.flags.writeable
            own[...] = 7
    assert np.array_equal(three["w"].numpy(), np.arange(12).reshape(3, 4))


def test_no_copy_is_a_view_or_refused(three: dict[str, LazyTensor]) -> None:
    assert np.shares_memory(np.asarray(three["w"], copy=False), three["w"].numpy())
    assert np.asarray(three["w"], np.float32, copy=False).dtype == np.float32
    assert np.asarray(three["none"], copy=False).shape == (0, 4)
    for tensor, dtype in ((three["t"], None), (three["w"], np.float64), (three["none"], np.float64)):
        before = bytes_read(tensor)
        with pytest.raises(ValueError, match="without a copy"):
            np.asarray(tensor, dtype, copy=False)
        assert bytes_read(tensor) == before  # a terabyte is not read to be refused


def test_another_type_is_converted(three: dict[str, LazyTensor]) -> None:
    for copy in (None, True):
        found = np.asarray(three["w"], np.float64, copy=copy)
        assert (found.dtype, found.flags.writeable) == (np.float64, True)
        assert np.array_equal(found, np.arange(12).reshape(3, 4))
