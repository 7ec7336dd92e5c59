"""The plan: the value, how it is made, what it costs, and how it is shown. Opens nothing.

``shardmerge.plan`` names this package and a function of the public door, so the package can be called:
``shardmerge.plan("mapping.yaml")`` is ``shardmerge.api.plan("mapping.yaml")``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType


class _Callable(ModuleType):
    """A package that is a function as well."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., object]:  # what ``inspect.signature`` follows
        function: Callable[..., object] = import_module("shardmerge.api").plan
        return function


sys.modules[__name__].__class__ = _Callable
