"""A tensor that is not in memory where numpy and torch want an array: every type, every call, against torch itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.lazy import LazyTensor
from shardmerge.ops.arrays import numpy_dtype

SHAPE = (4, 6)


def expected(name: str) -> torch.Tensor:
    row = DTYPES[name]
    numbers = torch.arange(24, dtype=torch.uint8).reshape(SHAPE)
    wide = numbers.float() if row.kind in ("float", "complex") else numbers
    return wide.to(getattr(torch, row.torch))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> shardmerge.LazyCheckpoint:
    path = tmp_path_factory.mktemp("lazy") / "all.safetensors"
    save_file(
        {**{name: expected(name) for name in DTYPES}, "scalar": torch.tensor(3.5), "none": torch.empty(0, 3)}, path
    )
    return shardmerge.open_checkpoint(path)


def same(found: torch.Tensor, name: str) -> bool:
    want = expected(name)
    return found.dtype == want.dtype and torch.equal(found.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("name", DTYPES)
def test_torch_takes_it(checkpoint: shardmerge.LazyCheckpoint, name: str) -> None:
    tensor = checkpoint[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for take in (torch.as_tensor, torch.tensor, torch.asarray, torch.from_dlpack, LazyTensor.torch):
            assert same(take(tensor), name), take
    if DTYPES[name].kind != "complex":
        assert torch.equal(torch.as_tensor(tensor, dtype=torch.float32), expected(name).float())


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_takes_it(checkpoint: shardmerge.LazyCheckpoint, name: str) -> None:
    tensor = checkpoint[name]
    whole, dtype = tensor.numpy(), numpy_dtype(DTYPES[name])
    assert np.asarray(tensor).dtype == np.array(tensor).dtype == dtype
    assert whole.tobytes() == bytes(expected(name).view(torch.uint8).flatten().tolist())
    for array in (np.asarray(tensor), np.array(tensor), np.stack(list(tensor)), tensor[...], tensor[:]):
        assert array.tobytes() == whole.tobytes()
    if DTYPES[name].kind != "complex":
        assert np.array_equal(np.array(tensor, dtype=np.float32), expected(name).float().numpy())
        assert np.asarray(tensor, dtype="float64").dtype == np.float64
    assert np.array(tensor).flags.writeable
    assert not np.asarray(tensor).flags.writeable
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(tensor, dtype=np.float64 if name != "F64" else np.float32, copy=False)


def test_sizes_are_those_of_the_array(checkpoint: shardmerge.LazyCheckpoint) -> None:
    for tensor in checkpoint.values():
        array = tensor.numpy()
        assert (tensor.shape, tensor.ndim, tensor.nbytes) == (array.shape, array.ndim, array.nbytes)
    assert len(checkpoint["F32"]) == 4
    for empty in (len, list):
        with pytest.raises(TypeError, match="no dimensions"):
            empty(checkpoint["scalar"])  # type: ignore[operator]
    assert checkpoint["scalar"]
    assert float(checkpoint["scalar"][()]) == 3.5
    with pytest.raises(ValueError, match="ambiguous"):
        bool(checkpoint["F32"])


INDICES = [
    (0,), (-1,), (3, 5), slice(None), slice(0, 4), slice(None, None, -1), slice(1, None, 2), ..., (..., 0), (0, ...),
    (slice(None), 2), (slice(4, 1), 0), (np.int64(2), slice(1, 3)), (..., slice(0, 3)), (),
]  # fmt: skip
WRONG = [(9,), (-5,), (0, 0, 0), "a", 0.5, (0, "a"), (..., ...), slice(None, None, 0), slice("a", None)]
OURS = [None, [0, 1], np.array([1]), np.array([True, False, True, True]), True, np.True_, (0, None)]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_an_index_takes_what_numpy_takes(checkpoint: shardmerge.LazyCheckpoint, index: object) -> None:
    found = checkpoint["F32"][index]  # type: ignore[index]
    want = expected("F32").numpy()[index]  # type: ignore[index]
    assert found.shape == want.shape
    assert np.array_equal(found, want)


@pytest.mark.parametrize("index", WRONG, ids=repr)
def test_a_wrong_index_is_the_error_of_numpy(checkpoint: shardmerge.LazyCheckpoint, index: object) -> None:
    with pytest.raises(Exception) as numpy_says:  # noqa: PT011  # numpy says which
        expected("F32").numpy()[index]  # type: ignore[index]
    kinds = (TypeError, IndexError) if isinstance(numpy_says.value, IndexError) else type(numpy_says.value)
    with pytest.raises(kinds, match=r"\w+ \w+"):
        checkpoint["F32"][index]  # type: ignore[index]


@pytest.mark.parametrize("index", OURS, ids=repr)
def test_an_index_of_numpy_alone_says_what_to_do(checkpoint: shardmerge.LazyCheckpoint, index: object) -> None:
    with pytest.raises(TypeError, match=r"integers, slices and an ellipsis .* tensor\.numpy\(\)"):
        checkpoint["F32"][index]  # type: ignore[index]


def test_a_name_that_is_not_there(checkpoint: shardmerge.LazyCheckpoint) -> None:
    with pytest.raises(KeyError, match="there is no tensor 'BF61'; did you mean `BF16`"):
        checkpoint["BF61"]
    assert "BF61" not in checkpoint
    assert checkpoint.get("BF61") is None
