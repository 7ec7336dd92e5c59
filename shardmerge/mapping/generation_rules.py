"""Rules that give a model the names of a generation of transformers: what the target ``hf/names`` brings.

The names that a source has are recognised: each has to be one of a known spelling. Then a rule a row leads from that
spelling to the generation, experts split or fused as it has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from shardmerge.errors import MappingError
from shardmerge.mapping.generations import FusedExperts, ModelNames, generations, names_of
from shardmerge.mapping.near import listed
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.renaming import specific
from shardmerge.mapping.rule_reader import read_rules
from shardmerge.mapping.spec import Rule, Spec, TargetSpec
from shardmerge.mapping.yaml_text import read_yaml
from shardmerge.targets.config_numbers import load_object
from shardmerge.tensors import Catalog, ReadSideFile

_TARGET = "hf/names"

# Target names, and what each is made of, as a mapping says it.
RuleTexts: TypeAlias = dict[str, object]


def with_generation(spec: Spec, target: TargetSpec, catalogs: Mapping[str, Catalog], read: ReadSideFile) -> Spec:
    """Returns the spec with the rules of the generation that its target ``hf/names`` asks for.

    Raises
    ------
    MappingError
        ``unknown-generation``, ``unknown-renames``, ``unknown-names``.
    """
    generation, source = wanted_generation(target), target.roles.get("model", "model")
    catalog = catalogs.get(source)
    if catalog is None or "config.json" not in catalog.side_files:
        return spec  # the target says so
    config = catalog.side_files["config.json"]
    names = names_of(load_object(config, read), config.file)
    dropped = [drop.template for drop in spec.drops if drop.source == source]
    told = [name for name in catalog.names() if all(template.match(name) is None for template in dropped)]
    return replace(spec, rules=(*generation_rules(names, catalog, told, source, generation), *spec.rules))


def wanted_generation(target: TargetSpec) -> str:
    """Returns the generation that a target asks for, or raises ``unknown-generation``."""
    said, known = target.roles.get("generation", ""), generations()
    if said in known:
        return said
    what = f"there is no generation {said!r}" if said else "`hf/names` needs a `generation`"
    raise MappingError(
        "unknown-generation",
        what,
        where=str(target.mark),
        expected=", ".join(known),
        hint=f'write `generation: "{_before(said, known)}"`, whose names that version has too'
        if _before(said, known)
        else f'write `generation: "{known[0]}"`, which every version loads',
    )


def generation_rules(
    names: ModelNames, catalog: Catalog, told: Iterable[str], source: str, generation: str
) -> tuple[Rule, ...]:
    """Returns the rules from the spelling that a source has to a generation.

    Parameters
    ----------
    names
        Of its model.
    catalog, told
        The source, and those of its names that are not dropped.
    source
        What it is called in the mapping.
    generation
        One of ``generations()``.

    Raises
    ------
    MappingError
        ``unknown-names``: names that no spelling has, or that are of several.
    """
    spelling = spelled(names, list(told), source, catalog.path)
    old, new = names.templates(spelling), names.templates(names.generation(generation))
    texts: RuleTexts = {new[key]: f"{source}:{old[key]}" for key in new}
    pairs = zip(names.experts(spelling), names.experts(names.generation(generation)), strict=True)
    for (there, _), (here, fused) in pairs:
        texts |= _fused(there, here, catalog, source) if fused else _split(there, here, catalog, source)
    file = f"{_TARGET} {generation} of a {names.model_type}"
    reader = NodeReader(file)
    root = read_yaml(json.dumps(texts), file)
    rules = read_rules(reader, root, frozenset({source}))
    assert not reader.problems, reader.problems
    return tuple(replace(rule, optional=True) for rule in rules)


# ---- which spelling


def spelled(names: ModelNames, told: list[str], source: str, path: str) -> Mapping[str, str]:
    """Returns the spelling that all names have; of several the one that says most of them.

    Raises
    ------
    MappingError
        ``unknown-names``.
    """
    best: tuple[int, Mapping[str, str], list[str]] | None = None
    for spelling in sorted(names.spellings(), key=lambda one: -sum(map(specific, _patterns(names, one)))):
        patterns = _patterns(names, spelling)
        strange = [name for name in told if not any(one.match(name) is not None for one in patterns)]
        if not strange:
            return spelling
        if best is None or len(strange) < best[0]:
            best = (len(strange), spelling, strange)
    assert best is not None  # there is one spelling at least
    _, nearest, strange = best
    whose = f"a {names.model_type}" if names.model_type else "this model"
    raise MappingError(
        "unknown-names",
        f"names that {whose} has in no version of transformers: {len(strange)} of {len(told)}",
        where=path,
        found=listed(strange),
        expected=listed(list(dict.fromkeys(names.templates(nearest).values())), 9),
        hint=f"if they are no part of the model, add under `drop:` `- {source}:{strange[0]}`",
    )


def _patterns(names: ModelNames, spelling: Mapping[str, str]) -> list[Template]:
    experts = (name for one, _ in names.experts(spelling) for name in (*one.split, one.fused))
    return [Template.parse(text) for text in (*names.templates(spelling).values(), *experts)]


# ---- experts


def _fused(there: FusedExperts, here: FusedExperts, catalog: Catalog, source: str) -> RuleTexts:
    """Returns the rule of a fused tensor: as it is, or one below the other, and these stacked."""
    if next(_matches(there.fused, catalog), None):
        return {here.fused: f"{source}:{there.fused}"}
    stacks = [{"op": "stack", "of": f"{source}:{name.replace('{e}', '{e*}')}"} for name in there.split]
    return {here.fused: stacks[0] if len(stacks) == 1 else {"op": "concat", "dim": 1, "of": stacks}}


def _split(there: FusedExperts, here: FusedExperts, catalog: Catalog, source: str) -> RuleTexts:
    """Returns the rules of the tensors of each expert: as they are, or parts of the fused one."""
    fused = next(_matches(there.fused, catalog), None)
    if fused is None:
        return {new: f"{source}:{old}" for new, old in zip(here.split, there.split, strict=True)}
    number = catalog[fused].shape[0]
    one = {"op": "unstack", "of": f"{source}:{there.fused}", "count": number, "take": "e"}
    chunks = len(here.split)
    if chunks == 1:
        return {here.split[0]: {**one, "for": {"e": number}}}
    return {
        name: {"op": "chunk", "of": one, "chunks": chunks, "take": take, "for": {"e": number}}
        for take, name in enumerate(here.split)
    }


def _matches(template: str, catalog: Catalog) -> Iterator[str]:
    pattern = Template.parse(template)
    return (name for name in catalog.names() if pattern.match(name) is not None)


def _before(said: str, known: tuple[str, ...]) -> str:
    """Returns the newest generation that is not newer than a version, or ``""``."""
    parts = said.split(".")
    if not all(part.isascii() and part.isdecimal() and len(part) < 9 for part in parts):
        return ""
    version = tuple(map(int, parts))
    return next((one for one in reversed(known) if tuple(map(int, one.split("."))) <= version), "")
