"""The targets. One is a module that makes a ``Target``, and one line here."""

from __future__ import annotations

from shardmerge.targets.expectation import Target
from shardmerge.targets.llava import TARGET as HF_LLAVA
from shardmerge.targets.llava_official import TARGET as OFFICIAL_LLAVA
from shardmerge.targets.llava_xtuner import TARGET as XTUNER_LLAVA
from shardmerge.targets.peft_adapter import TARGET as PEFT_ADAPTER

_ALL = (HF_LLAVA, OFFICIAL_LLAVA, XTUNER_LLAVA, PEFT_ADAPTER)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
