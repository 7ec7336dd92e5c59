"""The targets. One is a module that makes a ``Target``, and one line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from shardmerge.targets.expectation import Target

# Name, module, and what the module calls it. A module is imported when its target is asked for: a mapping has one.
_PLACES = {
    "hf/llava": ("llava.hf", "TARGET"),
    "hf/llava-next": ("llava.hf", "NEXT_TARGET"),
    "hf/llava-onevision": ("llava.hf", "ONEVISION_TARGET"),
    "official/llava": ("llava.official", "TARGET"),
    "xtuner/llava": ("llava.xtuner", "TARGET"),
    "hf/text": ("language_model", "TEXT_TARGET"),
    "hf/llama": ("language_model", "TARGET"),
    "hf/model": ("any_model", "TARGET"),
    "state-dict": ("plain", "TARGET"),
    "hf/names": ("named_model", "TARGET"),
    "hf/clip": ("clip_model", "TARGET"),
    "hf/clip-vision": ("clip_model", "VISION_TARGET"),
    "hf/internvl": ("internvl", "TARGET"),
    "original/internvl": ("internvl_original", "TARGET"),
    "meta/llama": ("meta_llama", "TARGET"),
    "peft/adapter": ("peft_export", "TARGET"),
    "peft/extracted": ("peft_extraction", "TARGET"),
}


class _Targets(Mapping[str, Target]):
    """The targets by name."""

    def __getitem__(self, name: str) -> Target:
        module, attribute = _PLACES[name]
        found = getattr(import_module(f"shardmerge.targets.{module}"), attribute)
        assert isinstance(found, Target)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)

    def __contains__(self, name: object) -> bool:
        return name in _PLACES


TARGETS: Mapping[str, Target] = _Targets()
