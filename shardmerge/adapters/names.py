"""Where an adapter's modules stand in their base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from shardmerge.adapters.fit import wanted
from shardmerge.adapters.generations import known_renamings
from shardmerge.adapters.parts import AdapterTensors
from shardmerge.adapters.search import head_of, renamings
from shardmerge.mapping.renaming import Renamings, line, original, renamed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Catalog, Shape

# Tied to the embedding, or of a model whose base was saved alone: it may be missing on disk.
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Places:
    """The names of a base by those of an adapter.

    Attributes
    ----------
    rules
        How the adapter's names are called in the base: the mapping's ``rename:``, or found by names and shapes.
    ways
        All that were found, where it is open which one is meant; ``rules`` is empty then.
    """

    spec: AdapterSpec
    base: Catalog
    rules: Renamings = ()
    ways: tuple[Renamings, ...] = ()

    @classmethod
    def of(cls, spec: AdapterSpec, base: Catalog, parts: AdapterTensors, config: JsonObject) -> Places:
        """Returns the places of an adapter's weights, by the one renaming that makes every one of them fit.

        What transformers itself renamed goes before what names and shapes alone would allow.
        """
        if spec.renames:
            return cls(spec, base, spec.renames)
        plain, needed = cls(spec, base), wanted(parts)
        settled = {name for name in needed if plain.find(name) is not None}
        if len(settled) == len(needed):
            return plain
        free, inside = {*parts.trained, _HEAD}, plain.inside()
        if ways := known_renamings(needed, free, inside, config):
            return plain._by(ways, {*needed, *parts.whole})
        heads = {head_of(name) for name in settled}
        lost = {name: fit for name, fit in needed.items() if name not in settled and head_of(name) not in heads}
        if not lost:
            return plain
        return plain._by(renamings(lost, free, inside, settled), {*needed, *parts.whole})

    def _by(self, ways: Sequence[Renamings], names: Collection[str]) -> Places:
        """Returns the places by the one way, or with all of them; without the rules that no name obeys."""
        ways = [tuple(rule for rule in one if any(rule.old.match(name) for name in names)) for one in ways]
        return replace(self, rules=ways[0]) if len(ways) == 1 else replace(self, ways=tuple(ways))

    def inside(self) -> dict[str, Shape]:
        """Returns the base's names below ``onto``, and their shapes."""
        found = ((self.spec.onto.template.match(name), name) for name in self.base.names())
        return {one["rest"]: self.base[name].shape for one, name in found if one is not None}

    def notes(self) -> Iterator[str]:
        """Yields what was found, as the line of a mapping that says it."""
        if self.rules and not self.spec.renames:
            yield f"the modules of {self.spec.source.source} are those of {self.spec.onto.source} by {line(self.rules)}"

    def name(self, name: str) -> str:
        """Returns what a tensor would be called in the base."""
        return self.spec.onto.template.format({"rest": renamed(name, self.rules)})

    def own(self, name: str) -> str | None:
        """Returns the adapter's name of a tensor of the base; None for what is not below ``onto``."""
        bindings = self.spec.onto.template.match(name)
        return None if bindings is None else original(bindings["rest"], self.rules)

    def find(self, name: str) -> str | None:
        """Returns the base's name of a tensor. transformers 5.6 dropped the level ``vision_model`` of a lone CLIP."""
        plain = renamed(name, self.rules)
        for text in (plain, f"vision_model.{plain}", plain.removeprefix("vision_model.")):
            place = self.spec.onto.template.format({"rest": text})
            if place in self.base:
                return self.base.aliases.get(place, place)
        return None
