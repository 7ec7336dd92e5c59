"""Numbers out of a config.json, with the defaults that transformers fills in, and a clear refusal of anything
odd.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeAlias, TypeGuard

from shardmerge.errors import TargetError
from shardmerge.json_limits import shallow, weighed
from shardmerge.shown import shown
from shardmerge.tensors import Extent, ReadSideFile, SideFile

JsonObject: TypeAlias = dict[str, object]

# A config of a few kilobytes is normal, a tokenizer_config of many thousand added tokens has 2 MB. Parsing
# costs about ten times the text, and planning has a memory promise to keep.
MAX_JSON_BYTES = 4 << 20

# Far above any model, far below what would let a hostile config ask for a billion names.
MAX_LAYERS = 4096
MAX_DIMENSION = 1 << 31

# What widths of layers are multiplied with; usual ones are below 10.
MAX_RATIO = 1024.0

# The largest number of float32.
MOST = 3.4028234663852886e38

# Describes the run that wrote the config, or promises code and weights that are not in the output directory.
_NOT_CARRIED = (
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "attn_implementation",
    "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version",
)  # fmt: skip


def load_object(extent: Extent, read: ReadSideFile) -> JsonObject:
    """Returns the JSON object that a small side file holds.

    Raises
    ------
    TargetError
        ``side-file-too-large`` or ``bad-json``.
    """
    if extent.nbytes > MAX_JSON_BYTES:
        raise TargetError(
            "side-file-too-large",
            "a JSON file beside the weights is too large",
            where=extent.file,
            found=f"{extent.nbytes} bytes",
            expected=f"at most {MAX_JSON_BYTES} bytes",
        )
    return parsed_object(read(extent), extent.file)


def parsed_object(raw: bytes, where: str) -> JsonObject:
    """Returns the JSON object that some bytes are; raises TargetError ``bad-json``."""
    try:
        value = shallow(json.loads(weighed(raw).decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise TargetError(
            "bad-json", "a file beside the weights is not valid JSON", where=where, found=str(error)[:200]
        ) from error
    if not isinstance(value, dict):
        raise TargetError("bad-json", "a JSON object was expected", where=where, found=type(value).__name__)
    return value


def readable_object(side: SideFile, read: ReadSideFile) -> JsonObject | None:
    """Returns the JSON object that a small side file holds, None for a file that says nothing that could be used."""
    if side.nbytes > MAX_JSON_BYTES:
        return None
    try:
        value = shallow(json.loads(weighed(side.content(read))))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def dump(value: JsonObject, *, sort: bool = True) -> bytes:
    """Returns JSON as it is written beside the weights: indented, in one fixed order, with a newline at the
    end.
    """
    return (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def dimension(config: Mapping[str, object], key: str, default: int, where: str, limit: int = MAX_DIMENSION) -> int:
    """Returns a size from a config: a positive integer, ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if not is_size(value) or value > limit:
        raise odd_config(key, value, f"an integer from 1 to {limit}", where)
    return value


def odd_config(key: str, value: object, expected: str, where: str) -> TargetError:
    """Returns the error about a value of a config."""
    what = f"`{key}` in the config cannot be used"
    return TargetError("odd-config", what, where=where, found=shown(value), expected=expected)


def is_whole(value: object) -> TypeGuard[int]:
    """Tells whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: object) -> TypeGuard[int]:
    """Tells whether a value is a whole number above 0."""
    return is_whole(value) and value > 0


def layers(config: Mapping[str, object], default: int, where: str) -> int:
    """Returns ``num_hidden_layers``."""
    return dimension(config, "num_hidden_layers", default, where, limit=MAX_LAYERS)


def flag(config: Mapping[str, object], key: str, where: str) -> bool:
    """Returns a switch from a config, false where it is absent or null.

    Python takes 1 for true, and so does everything that reads these configs with it: ``use_rslora: 1`` is true.
    """
    value = config.get(key)
    if value is None or (isinstance(value, int) and value in (0, 1)):  # a bool is an int
        return bool(value)
    raise odd_config(key, value, "true or false", where)


def finite(
    config: Mapping[str, object], key: str, default: float, where: str, *, above: float = -MOST, most: float = MOST
) -> float:
    """Returns a real number from a config, above a bound and at most another; ``default`` where it is absent or null.

    JSON as Python and JavaScript write it has NaN and Infinity. Some configs mean them (``time_step_limit`` of Mamba 2
    is ``[0.0, Infinity]``), so they are refused where a number is used, and not where the file is read.

    Raises
    ------
    TargetError
        ``odd-config``: NaN, infinite, out of bounds, or no number.
    """
    value = config.get(key)
    if value is None:
        return default
    if is_real(value) and above < value <= most:
        return float(value)
    bounds = (f" above {above:g}" if above > -MOST else "") + (f", at most {most:g}" if most < MOST else "")
    raise odd_config(key, value, f"a finite number{bounds}", where)


def is_real(value: object) -> TypeGuard[int | float]:
    """Tells whether a value is a number, and finite; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def is_finite(value: float) -> bool:
    """Tells whether a number can be computed with in float32, as models do."""
    return abs(value) <= MOST  # false for NaN


def portable(config: Mapping[str, object], dtype: str) -> JsonObject:
    """Returns a nested config without what only describes the directory it came from, and with its dtype.

    Transformers 4.56 and later write ``dtype``, earlier ones know only ``torch_dtype``, and all read the
    latter.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_CARRIED}
    return kept | ({"torch_dtype": dtype} if dtype else {})


def stored_dtype(config: Mapping[str, object]) -> str:
    """Returns the dtype that a config names, without torch's prefix, or ``""``."""
    value = config.get("torch_dtype") or config.get("dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else ""
