"""What the files beside the weights say of quantization: read, and taken out once it no longer holds. Pure.

* ``quantization_config`` in config.json, of the model or of a part (``text_config``): ``quant_method``,
  ``weight_block_size`` (``transformers/utils/quantization_config.py``, 5.24). bitsandbytes before 4.31 wrote no method,
  ModelOpt writes ``quant_algo``; compressed-tensors before 0.5 called the key ``compression_config``; MLX writes
  ``quantization``.
* ``hf_quant_config.json`` (ModelOpt), ``quantize_config.json`` (AutoGPTQ), ``quant_config.json`` (AutoAWQ).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.dtypes import BY_TORCH_NAME, DTYPES, DType
from shardmerge.targets.config_numbers import JsonObject, is_size, readable_object
from shardmerge.tensors import Catalog, ReadSideFile, SideFile

# Files of their own, and what a file without a word about its method is.
QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_KEYS = ("quantization_config", "compression_config", "quantization")
# transformers; compressed-tensors; bitsandbytes; Quark; ModelOpt.
_SKIPPED = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules", "exclude", "exclude_modules")


@dataclass(frozen=True, slots=True)
class Stated:
    """What is said.

    Attributes
    ----------
    method
        ``fp8``, ``gptq``, ...; ``""`` where nothing is said.
    block
        Rows and columns of the blocks that share a scale, empty where none are said.
    dtype
        The float type that the model computes in, BF16 where none is said.
    whole
        Whether the weights are stored quantized; false where they are on loading only.
    skipped
        Names, or parts of names, of the modules that are not quantized; patterns of compressed-tensors (``re:``) not.
    """

    method: str = ""
    block: tuple[int, ...] = ()
    dtype: DType = DTYPES["BF16"]
    whole: bool = True
    skipped: tuple[str, ...] = ()


def read_stated(catalog: Catalog, read: ReadSideFile) -> Stated:
    """Returns what the files beside the weights say. A file that is no JSON says nothing here."""
    config = _object(catalog, "config.json", read)
    found = next(_quantizations(config), None)
    method = _method(found) or _mlx(found) if found is not None else ""
    if not method:
        for name, usual in QUANTIZATION_FILES.items():
            if name in catalog.side_files and (other := _object(catalog, name, read)):
                inner = other.get("quantization")
                found = inner if isinstance(inner, dict) else other
                method = _method(found) or usual
                break
    return Stated(method, _block(found or {}), _dtype(config), _is_stored(found or {}), _skipped(found or {}))


def without_quantization(config: JsonObject) -> JsonObject:
    """Returns a config.json, its parts included, without a word about quantization, a float8 type among them."""
    found = {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }
    narrow = [key for key in ("torch_dtype", "dtype") if _is_narrow(found.get(key))]
    return found | dict.fromkeys(narrow, DTYPES["BF16"].torch)


def _is_narrow(value: object) -> bool:
    row = BY_TORCH_NAME.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    return row is not None and row.kind == "float" and row.itemsize == 1


def _object(catalog: Catalog, name: str, read: ReadSideFile) -> JsonObject:
    extent = catalog.side_files.get(name)
    return (readable_object(SideFile(name, (extent,)), read) or {}) if extent is not None else {}


def _quantizations(config: JsonObject) -> Iterator[JsonObject]:
    """Yields what is said of the whole model, then of its parts."""
    for key in _KEYS:
        value = config.get(key)
        if isinstance(value, dict) and value:
            yield value
    for key, value in config.items():
        if key.endswith("_config") and key not in _KEYS and isinstance(value, dict):
            yield from _quantizations(value)


def _method(found: JsonObject) -> str:
    method = found.get("quant_method")
    if isinstance(method, str) and method:
        return method[:40]
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    if found.get("quant_algo"):
        return "modelopt"
    return "compressed-tensors" if "config_groups" in found else ""


def _mlx(found: JsonObject) -> str:
    return "mlx" if {"bits", "group_size"} <= set(found) else ""


def _block(found: JsonObject) -> tuple[int, ...]:
    said = [found.get("weight_block_size")]
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        said.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    blocks = {block for one in said if (block := _sizes(one))}
    return blocks.pop() if len(blocks) == 1 else ()


def _sizes(value: object) -> tuple[int, ...]:
    """Returns two positive whole numbers, or nothing."""
    sizes = value if isinstance(value, list) and len(value) == 2 else []
    return tuple(sizes) if all(map(is_size, sizes)) else ()


def _dtype(config: JsonObject) -> DType:
    places = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for place in places:
        value = place.get("torch_dtype") or place.get("dtype")
        row = BY_TORCH_NAME.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if row is not None and row.kind == "float" and row.itemsize > 1:
            return row
    return DTYPES["BF16"]


def _skipped(found: JsonObject) -> tuple[str, ...]:
    lists = (found.get(key) for key in _SKIPPED)
    names = (name for value in lists if isinstance(value, list) for name in value)
    return tuple(name for name in names if isinstance(name, str) and not name.startswith("re:"))


def _is_stored(found: JsonObject) -> bool:
    """BitNet's ``online`` mode quantizes 16-bit weights in the forward pass, and needs its config to do so."""
    return found.get("quantization_mode") != "online"
