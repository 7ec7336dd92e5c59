"""Element types as numpy knows them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from shardmerge.dtypes import DType

# The element type is a value at run time (one of DTYPES), so it is not part of the static type.
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@lru_cache(maxsize=32)
def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """Returns the numpy (or ml_dtypes) type of the table's row."""
    return np.dtype(getattr(ml_dtypes, dtype.numpy, None) or dtype.numpy)


def as_array(data: memoryview, dtype: DType) -> Array:
    """Returns the bytes as a 1-D array of ``dtype``, without a copy."""
    return np.frombuffer(data, dtype=numpy_dtype(dtype))
