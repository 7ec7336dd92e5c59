"""The text of a mapping for a merge: names of sources, and terms as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shardmerge.mergekit.config import ModelName
from shardmerge.mergekit.terms import Written


@dataclass(slots=True)
class MergeSources:
    """Names of sources for models as they are written, in the order they are met."""

    paths: Callable[[str], str]
    names: dict[str, str] = field(default_factory=dict)
    loras: dict[str, str] = field(default_factory=dict)

    def name(self, model: str) -> str:
        """Returns the source of a model, its adapter merged."""
        if model not in self.names:
            parts = ModelName.of(model)
            self.names[model] = self._free(parts.path)
            if parts.lora:
                self.loras[self.names[model]] = self._free(parts.lora)
        return self.names[model]

    def _free(self, path: str) -> str:
        word = re.sub(r"[^a-z0-9_-]+", "-", path.partition("@")[0].rstrip("/").rpartition("/")[2].lower()).strip("-")
        word = word if re.match("[a-z]", word) else f"m-{word}"
        taken = {*self.names.values(), *self.loras.values()}
        return next(
            one for number in range(1, 1000) if (one := word if number == 1 else f"{word}-{number}") not in taken
        )

    def lines(self) -> Iterator[str]:
        """Yields the sections `sources:` and `adapters:`."""
        yield "sources:"
        for model, name in self.names.items():
            parts = ModelName.of(model)
            yield f"  {name}: {json.dumps(self.paths(parts.path), ensure_ascii=False)}"
            if parts.lora:
                yield f"  {self.loras[name]}: {json.dumps(self.paths(parts.lora), ensure_ascii=False)}"
        if self.loras:
            yield "adapters:"
            yield from (f"  - {{from: {lora}, onto: {name}}}" for name, lora in self.loras.items())


def written(key: str, value: Written, depth: int) -> Iterator[str]:
    """Yields the lines of a key and its value; ops and lists of tensors have a line each."""
    indent = "  " * depth
    if isinstance(value, dict) and "op" in value:
        yield f"{indent}{key}:"
        for name, one in value.items():
            yield from written(name, one, depth + 1)
    elif isinstance(value, list) and key == "of":
        yield f"{indent}{key}:"
        for one in value:
            yield from _item(one, depth + 1)
    else:
        yield f"{indent}{key}: {_flow(value, tensor=key in ('of', 'base') or depth == 1)}"


def _item(value: Written, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, dict) and isinstance(value.get("of", ""), str):
        yield f"{indent}- {_flow(value)}"
    elif isinstance(value, dict):
        lines = [line for name, one in value.items() for line in written(name, one, depth + 1)]
        yield f"{indent}- {lines[0].strip()}"
        yield from lines[1:]
    else:
        yield f"{indent}- {_flow(value, tensor=True)}"


def _flow(value: Written, *, tensor: bool = False) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_flow(one) for one in value)}]"
    if isinstance(value, dict):
        inner = (f"{key}: {_flow(one, tensor=key in ('of', 'filter'))}" for key, one in value.items())
        return f"{{{', '.join(inner)}}}"
    return json.dumps(value, ensure_ascii=False) if tensor else value
