"""The targets. One is a module that makes a ``Target``, and one line here."""

from __future__ import annotations

from shardmerge.targets.expectation import Target
from shardmerge.targets.llava import TARGET as HF_LLAVA

TARGETS: dict[str, Target] = {target.name: target for target in (HF_LLAVA,)}
