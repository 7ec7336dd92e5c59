"""Classes that pickles of DeepSpeed's optimizer files name, so that torch can read and write them without DeepSpeed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


class _Stage(int):
    """An enum's member, as DeepSpeed pickles it: a call with a number."""

    def __reduce__(self) -> tuple[type[_Stage], tuple[int]]:
        return type(self), (int(self),)


@contextmanager
def deepspeed_classes() -> Iterator[None]:
    """Stands in for DeepSpeed, as far as its pickles go."""
    with pytest.MonkeyPatch.context() as patch:
        for path, names in _CLASSES.items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name not in sys.modules:
                    patch.setitem(sys.modules, name, ModuleType(name))
            for name in names:
                bases = (_Stage,) if name == "ZeroStageEnum" else (object,)
                patch.setattr(sys.modules[path], name, type(name, bases, {"__module__": path}), raising=False)
        yield
