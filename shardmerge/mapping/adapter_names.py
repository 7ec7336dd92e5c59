"""Where an adapter's modules stand in their base, and what to say where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.mapping.adapter_parts import PREFIX
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.tensors import Catalog


@dataclass(frozen=True, slots=True)
class Places:
    """The names of a base by those of an adapter.

    Attributes
    ----------
    renamed
        What is taken off the front of the adapter's names: the base was saved without the model's head, so without its
        prefix (``transformer.`` of GPT-2, ``model.`` of LLaMA).
    """

    spec: AdapterSpec
    base: Catalog
    renamed: str = ""

    @classmethod
    def of(cls, spec: AdapterSpec, base: Catalog, names: Sequence[str]) -> Places:
        """Returns the places of an adapter's weights; a prefix is taken off where that alone makes every one fit."""
        plain = cls(spec, base)
        lost = [name for name in names if plain.find(name) is None]
        if not lost or any(plain.find(name) is not None for name in names):
            return plain
        cuts = (lost[0][: place + 1] for place, char in enumerate(lost[0]) if char == ".")
        found = [one for cut in cuts if all((one := cls(spec, base, cut)).find(name) is not None for name in lost)]
        return found[0] if len(found) == 1 else plain

    def name(self, name: str) -> str:
        """Returns what a tensor would be called in the base."""
        plain = name.removeprefix(self.renamed) if self.renamed else name
        return self.spec.onto.template.format({"rest": plain})

    def find(self, name: str) -> str | None:
        """Returns the base's name of a tensor. transformers 5.6 dropped the level ``vision_model`` of a lone CLIP."""
        if self.renamed and not name.startswith(self.renamed):
            return None
        plain = name.removeprefix(self.renamed)
        for text in (plain, f"vision_model.{plain}", plain.removeprefix("vision_model.")):
            place = self.spec.onto.template.format({"rest": text})
            if place in self.base:
                return self.base.aliases.get(place, place)
        return None


def without_base(
    spec: AdapterSpec, names: Sequence[str], base: Catalog, saved: Sequence[str]
) -> Iterator[MappingError]:
    """Yields the errors for weights of an adapter that its base does not have."""
    new = [name for name in names if any(f".{one}." in f".{name}" for one in saved)]
    if new:
        yield _new_module(spec, new)
    names = [name for name in names if name not in new]
    if not names:
        return
    source, onto, template = spec.source.source, spec.onto.source, spec.onto.template
    near = NameIndex(base.names()).near(template.format({"rest": names[0]}))
    yield MappingError(
        "adapter-without-base",
        f"{count(len(names), 'adapter module')} of {source} without a tensor in {onto}: {listed(names, 3)}",
        where=str(spec.mark),
        expected=f"{onto}:{template.format({'rest': names[0]})}",
        found=f"names such as {', '.join(near)}" if near else "no such names",
        hint=_way(spec, names, base),
    )


def _new_module(spec: AdapterSpec, names: Sequence[str]) -> MappingError:
    return MappingError(
        "adapter-new-module",
        f"{spec.source.source} trained a module that {spec.onto.source} does not have: {listed(names, 3)}",
        where=str(spec.mark),
        expected="modules_to_save that are in the base",
        hint="name as the base a model with that module, as transformers makes it: "
        "AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=N).save_pretrained(NEW_BASE)",
    )


def _way(spec: AdapterSpec, names: Sequence[str], base: Catalog) -> str:
    """Returns what leads on: the prefix that the base has in front, the preset that renames it, or the question."""
    onto = spec.onto.source
    endings = [name[: -len(names[0])] for name in base.names() if name.endswith(f".{names[0]}")]
    prefixes = [p for p in dict.fromkeys(endings) if all(f"{p}{name}" in base for name in names)]
    if prefixes:
        lines = " or ".join(f'`onto: "{onto}:{prefix}{{rest...}}"`' for prefix in prefixes[:3])
        return f"the names of {onto} have a prefix: say under `adapters:` {lines}"
    if all(name.startswith(PREFIX) for name in base.names()):
        return f"{onto} is a training checkpoint itself: name the model that the run began with as the base"
    if any(name.startswith("model.language_model.") for name in names) and any(
        name.startswith("language_model.model.") for name in base.names()
    ):
        return (
            f"the adapter has the names of a newer transformers: convert {onto} first, with `--use llava/hf-to-5.6` "
            "(adapters of transformers 5.6 and later) or `--use llava/hf-to-4.52` (4.52 to 5.5), and name that one"
        )
    return f"name as `{onto}` the model that the adapter was trained on"
