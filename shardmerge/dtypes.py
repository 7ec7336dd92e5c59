"""The one table of element types.

Names are those of safetensors (``safetensors/src/tensor.rs``, 0.8), since that is what shardmerge writes. The
torch and user spellings map onto them. Nothing here needs numpy: arrays belong to ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shardmerge.errors import UsageError

DTypeKind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes
    ----------
    name
        As in a safetensors header, e.g. ``"BF16"``.
    itemsize
        Bytes per element. Types smaller than a byte (F4, F6) are not in the table: no source here produces them.
    kind
        ``float``, ``int``, ``bool`` or ``complex``; only floats are ever cast.
    numpy
        The numpy (or ml_dtypes) name.
    torch
        The name in ``torch``, without the prefix.
    """

    name: str
    itemsize: int
    kind: DTypeKind
    numpy: str
    torch: str

    def __str__(self) -> str:
        return self.name


_ROWS = (
    DType("F64", 8, "float", "float64", "float64"),
    DType("F32", 4, "float", "float32", "float32"),
    DType("F16", 2, "float", "float16", "float16"),
    DType("BF16", 2, "float", "bfloat16", "bfloat16"),
    DType("F8_E4M3", 1, "float", "float8_e4m3fn", "float8_e4m3fn"),
    DType("F8_E5M2", 1, "float", "float8_e5m2", "float8_e5m2"),
    DType("F8_E4M3FNUZ", 1, "float", "float8_e4m3fnuz", "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 1, "float", "float8_e5m2fnuz", "float8_e5m2fnuz"),
    DType("F8_E8M0", 1, "float", "float8_e8m0fnu", "float8_e8m0fnu"),
    DType("C64", 8, "complex", "complex64", "complex64"),
    DType("I64", 8, "int", "int64", "int64"),
    DType("I32", 4, "int", "int32", "int32"),
    DType("I16", 2, "int", "int16", "int16"),
    DType("I8", 1, "int", "int8", "int8"),
    DType("U64", 8, "int", "uint64", "uint64"),
    DType("U32", 4, "int", "uint32", "uint32"),
    DType("U16", 2, "int", "uint16", "uint16"),
    DType("U8", 1, "int", "uint8", "uint8"),
    DType("BOOL", 1, "bool", "bool", "bool"),
)

DTYPES: dict[str, DType] = {row.name: row for row in _ROWS}

BY_TORCH_NAME: dict[str, DType] = {row.torch: row for row in _ROWS}

# torch.<X>Storage, the class named in the persistent id of a saved storage (torch/storage.py).
BY_STORAGE_CLASS: dict[str, DType] = {
    "DoubleStorage": DTYPES["F64"],
    "FloatStorage": DTYPES["F32"],
    "HalfStorage": DTYPES["F16"],
    "BFloat16Storage": DTYPES["BF16"],
    "ComplexFloatStorage": DTYPES["C64"],
    "LongStorage": DTYPES["I64"],
    "IntStorage": DTYPES["I32"],
    "ShortStorage": DTYPES["I16"],
    "CharStorage": DTYPES["I8"],
    "ByteStorage": DTYPES["U8"],
    "UntypedStorage": DTYPES["U8"],  # bytes; the element type then stands in _rebuild_tensor_v3
    "BoolStorage": DTYPES["BOOL"],
}

_SHORT = {
    "fp64": "F64", "double": "F64", "fp32": "F32", "float": "F32", "fp16": "F16", "half": "F16", "bf16": "BF16",
    "fp8": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip

FLOAT_SPELLINGS = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")


def float_dtype(text: str) -> DType:
    """Returns the float type that a user means by ``bfloat16``, ``bf16``, ``torch.bfloat16`` or ``BF16``.

    Raises
    ------
    UsageError
        ``unknown-dtype``: not a float type of the table.
    """
    word = text.removeprefix("torch.")
    row = DTYPES.get(word.upper()) or BY_TORCH_NAME.get(word.lower()) or DTYPES.get(_SHORT.get(word.lower(), ""))
    if row is None or row.kind != "float" or row.name == "F8_E8M0":
        raise UsageError(
            "unknown-dtype",
            f"{text!r} is not a float type that tensors can be cast to",
            expected=", ".join(FLOAT_SPELLINGS),
            hint=_near_dtype(word.lower())
            or "name a type of floats, such as `bfloat16`: integers, booleans and complex numbers are never cast",
        )
    return row


def _near_dtype(word: str) -> str:
    floats = [name for name, row in BY_TORCH_NAME.items() if row.kind == "float"]
    from difflib import get_close_matches  # only an error needs it

    near = get_close_matches(word, [*_SHORT, *floats], 2)
    return f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
