"""Which float type holds every value of another: a cast to it loses nothing. Read without numpy."""

from __future__ import annotations

from shardmerge.dtypes import DType

# Types whose every value float32 holds exactly: a cast from them may pass through float32 and still rounds once.
EXACT_IN_F32 = frozenset({"F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

# Whose every value the other holds exactly: sign, exponent range (subnormals included) and mantissa.
_EXACT_IN = {
    "F64": frozenset({"F32", *EXACT_IN_F32}),
    "F32": EXACT_IN_F32,
    "F16": frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}),
    "BF16": frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}),
}


def holds(wide: DType, narrow: DType) -> bool:
    """Tells whether one type holds every value of the other."""
    return narrow.name in _EXACT_IN.get(wide.name, ())
