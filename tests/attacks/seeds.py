"""Small sound files of each kind, byte by byte and without torch, for the corpus to break."""

from __future__ import annotations

import io
import json
import pickle
import struct

from tests.attacks.hostile_zips import PICKLE, STORAGE, build, sound

ZIP = build(sound(), wide=True)
_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_MACHINE = b"\x80\x02}(X\x10\0\0\0protocol_versionM\xe9\x03X\r\0\0\0little_endian\x88u."
_KEYS = b"\x80\x02]X\x01\0\0\x000a."
LEGACY = (
    _MAGIC + b"\x80\x02M\xe9\x03." + _MACHINE + PICKLE.replace(b"K\x04tQ", b"K\x04NtQ") + _KEYS
    + struct.pack("<q", 4) + STORAGE
)  # fmt: skip
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 1}
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
MAPPING = """shardmerge: 1
sources: {s: m.safetensors}
output: {path: out}
tensors:
  "layer.{i}.weight": {op: slice, of: "s:w", for: {i: 2}}
  b: s:w
"""


def safetensors(header: object, data: bytes = b"\0\0\0\0") -> bytes:
    """Returns a file with a header, which may be bytes that are no JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WEIGHTS = safetensors({"w": ENTRY})


class _Named:
    """An object of a class that is written by its name alone."""

    def __init__(self, **state: object) -> None:
        self.__dict__.update(state)

    def __reduce__(self) -> tuple[object, ...]:
        return _new, (type(self),), self.__dict__


def _new() -> None:
    """Stands for ``copyreg._reconstructor``; never called."""


class _Pickler(pickle._Pickler):  # the C one cannot be told how to write a name
    def save_global(self, obj: object, name: str | None = None) -> None:
        called = f"torch.distributed.checkpoint.metadata\n{obj.__name__}\n"  # type: ignore[attr-defined]
        self.write(b"c" + called.encode())
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, type: save_global, type(_new): save_global}  # noqa: RUF012


def _object(name: str, **state: object) -> object:
    return type(name, (_Named,), {})(**state)


def metadata() -> bytes:
    """Returns the ``.metadata`` of a distributed checkpoint of one tensor of 4 floats, as torch writes it."""
    chunk = _object("ChunkStorageMetadata", offsets=(0,), sizes=(4,))
    tensor = _object("TensorStorageMetadata", properties=None, size=(4,), chunks=[chunk])
    key = _object("MetadataIndex", fqn="model.w", offset=(0,), index=0)
    info = _object("_StorageInfo", relative_path="__0_0.distcp", offset=0, length=1200, transform_descriptors=None)
    whole = _object(
        "Metadata", state_dict_metadata={"model.w": tensor}, planner_data={"model.w": ("model", "w")},
        storage_data={}, storage_meta=None,
    )  # fmt: skip
    whole.__dict__["storage_data"] = {key: info}
    out = io.BytesIO()
    _Pickler(out, 2).dump(whole)
    return out.getvalue()
