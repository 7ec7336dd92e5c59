"""Our safetensors reader against the reference: equal on what real writers write, never more lenient on anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shardmerge.dtypes import DTYPES
from shardmerge.errors import CheckpointError
from shardmerge.sources.safetensors_file import is_safetensors, read_header, read_safetensors
from tests.conftest import read_all

_TORCH_TYPES = [
    getattr(torch, row.torch)
    for row in DTYPES.values()
    if row.name not in ("F8_E8M0", "C64") and hasattr(torch, row.torch)
]


def raw_file(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("dtype", _TORCH_TYPES, ids=str)
def test_every_type_reads_as_the_reference_wrote_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 24, np.uint8)).to(torch.float32).to(dtype)
    tensors = {"scalar": values[0].clone(), "empty": values[:0].reshape(0, 3).clone(), "m": values.reshape(2, 3, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    catalog = read_safetensors(tmp_path / "x.safetensors")
    found = read_all(catalog)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert catalog[name].shape == tuple(tensor.shape)
        assert found[name].tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


GOOD = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
HOSTILE = {
    "not json": ("{nonsense}", b""),
    "leading blank": (" " + GOOD, bytes(8)),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), bytes(8)),
    "duplicate tensor": (GOOD[:-1] + "," + GOOD[1:], bytes(8)),
    "duplicate field": ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "unknown field": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}', bytes(8)),
    "float shape": ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', bytes(8)),
    "boolean shape": ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)),
    "negative shape": ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', bytes(8)),
    "huge shape": ('{"a":{"dtype":"U8","shape":[9223372036854775807,2],"data_offsets":[0,1]}}', bytes(1)),
    "nan": ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "three offsets": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', bytes(8)),
    "wrong size": ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', bytes(8)),
    "hole": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
    "overlap": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
        bytes(6),
    ),
    "overlap as large as the hole behind it": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        bytes(6),
    ),
    "hole as large as the overlap behind it": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[2,6]},"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}',
        bytes(6),
    ),
    "two negative sizes": ('{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}', bytes(8)),
    "none of a huge size": ('{"a":{"dtype":"U8","shape":[0,4611686018427387904],"data_offsets":[0,0]}}', b""),
    "more axes than torch has": (f'{{"a":{{"dtype":"U8","shape":{[1] * 65},"data_offsets":[0,1]}}}}', bytes(1)),
    "name of 5,000 letters": (f'{{"{"a" * 5000}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}', bytes(1)),
    "metadata that is a list": ('{"__metadata__":["x"]}', b""),
    "tensor that is a list": ('{"a":["dtype","shape","data_offsets"]}', b""),
    "shape that is a number": ('{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', bytes(1)),
    "shape that is a text": ('{"a":{"dtype":"U8","shape":"1","data_offsets":[0,1]}}', bytes(1)),
    "shape of texts": ('{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}', bytes(1)),
    "trailing bytes": (GOOD, bytes(9)),
    "missing bytes": (GOOD, bytes(7)),
    "unknown dtype": ('{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "lower case dtype": ('{"a":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "metadata with a number": ('{"__metadata__":{"x":1}}', b""),
    "list": ("[]", b""),
    "control character in a name": ('{"a\\u0000":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "empty name": ('{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "deep nesting": ("{" + '"a":{' * 100_000, b""),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_with_the_file_named(case: str, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", *HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.code in ("damaged-header", "truncated-file")
    assert str(path) in caught.value.where


@given(data=st.data())
def test_what_we_accept_the_reference_accepts(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One byte of a good header changed: whenever we take it, the reference takes it and sees the same shapes."""
    header = bytearray(GOOD.encode())
    at = data.draw(st.integers(0, len(header) - 1))
    header[at] = data.draw(st.integers(32, 126))
    path = raw_file(tmp_path_factory.mktemp("m") / "x.safetensors", bytes(header), bytes(8))
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(str(path), framework="numpy") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"accepted what the reference refuses: {bytes(header)!r}") from error
    assert theirs == {entry.name: entry.shape for entry in ours.entries.values()}


def test_recognition_is_by_content(tmp_path: Path) -> None:
    assert is_safetensors(raw_file(tmp_path / "weights.odd", GOOD, bytes(8)))
    (tmp_path / "x.safetensors").write_bytes(json.dumps({"a": 1}).encode())
    assert not is_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert not is_safetensors(tmp_path / "empty.safetensors")
