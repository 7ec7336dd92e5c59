"""Presets: mappings for a kind of checkpoint, kept as YAML beside this module.

A preset is a mapping without paths: its sources are roles, which the user's mapping fills with sources of the
same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable

from shardmerge.errors import MappingError, UsageError
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.rules import (
    Drop,
    Findings,
    Rule,
    TargetSpec,
    as_flag,
    as_table,
    as_text,
    fields,
    parse_drops,
    parse_rules,
    parse_target,
    required_field,
)
from shardmerge.mapping.spec import Spec, unused_sources
from shardmerge.mapping.yaml_nodes import Node, read_yaml

_KEYS = ("preset", "title", "description", "sources", "target", "tensors", "drop")
_SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class PresetRole:
    """A source that a preset asks for.

    Attributes
    ----------
    about
        What it is, for people.
    required
        Whether the preset can do without it.
    """

    about: str
    required: bool


@dataclass(frozen=True, slots=True)
class Preset:
    """A preset: ``roles`` are the sources it knows, by the name that a mapping must give them."""

    name: str
    title: str
    description: str
    roles: Mapping[str, PresetRole]
    target: TargetSpec
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]


def list_presets() -> tuple[str, ...]:
    """Returns the names of all presets, sorted."""
    return tuple(sorted(_walk(_folder(), "")))


def load_preset(name: str) -> Preset:
    """Returns a preset.

    Raises
    ------
    UsageError
        ``unknown-preset``.
    """
    known = list_presets()
    if name not in known:
        what = f"there is no preset {name[:80]!r}"
        raise UsageError("unknown-preset", what, hint=did_you_mean(name, known))
    text = _folder().joinpath(*f"{name}{_SUFFIX}".split("/")).read_text(encoding="utf-8")
    return parse_preset(text, name)


def _folder() -> Traversable:
    return resources.files("shardmerge.mapping").joinpath("presets")


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _walk(item, f"{prefix}{item.name}/")
        elif item.name.endswith(_SUFFIX):
            yield prefix + item.name.removesuffix(_SUFFIX)


def parse_preset(text: str, name: str) -> Preset:
    """Returns the preset that a YAML text says; its marks say ``presets/<name>.yaml``.

    Raises
    ------
    MappingError, Problems
        All that is wrong with it.
    """
    root = as_table(read_yaml(text, f"presets/{name}{_SUFFIX}"), "a preset")
    findings = Findings()
    found = fields(root, _KEYS, "a preset", findings)
    findings.raise_all()
    for key in _KEYS[:-1]:
        required_field(found, key, "a preset", root)
    version = as_text(found["preset"], "`preset`")
    if version.text != "1":
        raise MappingError("unknown-version", "presets are of version 1", where=str(version.mark))
    roles = {key.text: _role(value) for key, value in as_table(found["sources"], "`sources`").entries}
    preset = Preset(
        name,
        as_text(found["title"], "`title`").text,
        as_text(found["description"], "`description`").text.strip(),
        roles,
        parse_target(found["target"], roles, findings),
        parse_rules(found["tensors"], roles, findings),
        parse_drops(found["drop"], roles, findings) if "drop" in found else (),
    )
    findings.raise_all()
    return preset


def _role(node: Node) -> PresetRole:
    findings = Findings()
    found = fields(node, ("about", "required"), "a role", findings)
    findings.raise_all()
    about = as_text(required_field(found, "about", "a role", node), "`about`").text.strip()
    return PresetRole(about, as_flag(found["required"], "`required`") if "required" in found else True)


def combine(spec: Spec, preset: Preset) -> Spec:
    """Returns the mapping with the preset's rules in front of its own.

    A rule of the mapping takes the place of the preset's rule with the same target template. References of the
    preset to optional sources that the mapping does not declare fall away. The preset's target stands unless the
    mapping has one; its roles keep all their source names, so that a missing one can be named.

    Raises
    ------
    MappingError, Problems
        ``missing-source``: a source that the preset cannot do without. ``unused-source``: nothing is taken from
        a source.
    """
    findings = Findings()
    findings.errors.extend(_missing(spec, preset))
    own = {rule.target.text for rule in spec.rules}
    kept = [rule for rule in preset.rules if rule.target.text not in own]
    pruned = (_with_candidates_of(rule, spec) for rule in kept)
    combined = replace(
        spec,
        target=spec.target or preset.target,
        rules=(*(rule for rule in pruned if rule.candidates), *spec.rules),
        drops=(*(drop for drop in preset.drops if drop.source in spec.sources), *spec.drops),
    )
    findings.errors.extend(unused_sources(combined, preset.roles))
    findings.raise_all()
    return combined


def _with_candidates_of(rule: Rule, spec: Spec) -> Rule:
    return replace(rule, candidates=tuple(one for one in rule.candidates if one.source in spec.sources))


def _missing(spec: Spec, preset: Preset) -> Iterator[MappingError]:
    for name, role in preset.roles.items():
        if role.required and name not in spec.sources:
            yield MappingError(
                "missing-source",
                f"the preset {preset.name} needs a source `{name}`: {role.about}",
                where=spec.file,
                hint=f"add under `sources:` the line `{name}: <path>`",
            )
