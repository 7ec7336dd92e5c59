"""The names of a Hugging Face LLaVA: as every version of transformers loads them, or as a newer one has them."""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.targets.tables import ArchitectureTable

GENERATIONS = ("legacy", "4.52", "5.6")
# What 5.6 took out of CLIPVisionModel and SiglipVisionModel, besides what 4.52 moved.
_FROM_5_6 = ("vision_tower.vision_model.", "model.vision_tower.")


@dataclass(frozen=True, slots=True)
class LlavaNames:
    """Prefixes that are another in memory, with what they are there; the first that fits counts."""

    renames: tuple[tuple[str, str], ...] = ()

    def name(self, stored: str) -> str:
        """Returns what a name, or the beginning of one, of the table is called."""
        old, new = next((pair for pair in self.renames if stored.startswith(pair[0])), ("", ""))
        return new + stored.removeprefix(old)

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return self.name("language_model.model.embed_tokens.weight")

    @property
    def head(self) -> str:
        """The head's name."""
        return self.name("language_model.lm_head.weight")


def names_of(generation: str, table: ArchitectureTable) -> LlavaNames:
    """Returns the names of a generation, the table's own for ``legacy``."""
    if generation == "legacy":
        return LlavaNames()
    moved = tuple((stored, newer) for newer, stored in table.renames)
    return LlavaNames((_FROM_5_6, *moved) if generation == "5.6" else moved)
