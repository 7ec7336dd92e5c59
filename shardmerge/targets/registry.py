"""The targets. One is a module that makes a ``Target``, and one line here."""

from __future__ import annotations

from shardmerge.targets.any_model import TARGET as HF_MODEL
from shardmerge.targets.clip_model import TARGET as HF_CLIP
from shardmerge.targets.clip_model import VISION_TARGET as HF_CLIP_VISION
from shardmerge.targets.expectation import Target
from shardmerge.targets.internvl import TARGET as HF_INTERNVL
from shardmerge.targets.language_model import TARGET as HF_LLAMA
from shardmerge.targets.llava import TARGET as HF_LLAVA
from shardmerge.targets.llava_next import TARGET as HF_LLAVA_NEXT
from shardmerge.targets.llava_official import TARGET as OFFICIAL_LLAVA
from shardmerge.targets.llava_xtuner import TARGET as XTUNER_LLAVA
from shardmerge.targets.meta_llama import TARGET as META_LLAMA
from shardmerge.targets.peft_adapter import TARGET as PEFT_ADAPTER

_ALL = (
    HF_LLAVA,
    HF_LLAVA_NEXT,
    OFFICIAL_LLAVA,
    XTUNER_LLAVA,
    HF_LLAMA,
    HF_MODEL,
    HF_CLIP,
    HF_CLIP_VISION,
    HF_INTERNVL,
    META_LLAMA,
    PEFT_ADAPTER,
)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
