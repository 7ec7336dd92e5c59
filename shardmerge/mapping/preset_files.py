"""Presets: mappings that come with the package, as YAML files. A recipe is data and no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardmerge.errors import MappingError, ShardmergeError, UsageError, raise_all
from shardmerge.mapping.input_reader import read_adapters, read_variables
from shardmerge.mapping.narrower import alike
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.output_reader import read_target
from shardmerge.mapping.rule_reader import read_drops, read_rest, read_rules
from shardmerge.mapping.spec import (
    AdapterSpec,
    Drop,
    Reference,
    Rule,
    Spec,
    TargetSpec,
    Term,
    Variable,
    references,
)
from shardmerge.mapping.yaml_nodes import Node
from shardmerge.mapping.yaml_text import read_yaml
from shardmerge.shown import Displayed

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11; the annotations are never evaluated

_SUFFIX = ".yaml"

# What a preset may say.
KEYS = ("preset", "title", "description", "sources", "target", "let", "adapters", "tensors", "rest", "drop")

ROLE_KEYS = ("about", "required", "strip", "model_types")


@dataclass(frozen=True, slots=True)
class PresetRole:
    """A source that a preset works with.

    Attributes
    ----------
    about
        What it is, for people.
    required
        Whether there is no conversion without it.
    strip
        As ``SourceSpec.usual``; in the file a text, with ``|`` between several.
    model_types
        What its config.json may say as ``model_type``; empty where the target checks it, or where any will do.
    """

    about: str
    required: bool
    strip: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Preset(Displayed):
    """A preset as its file says it."""

    name: str
    title: str
    description: str
    roles: Mapping[str, PresetRole]
    target: TargetSpec | None
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    variables: Mapping[str, Variable]
    adapters: tuple[AdapterSpec, ...]


# Names that presets had before; mappings that say them go on.
_FORMER = {"llava/hf-to-legacy": "hf/to-4.51", "llava/hf-to-4.52": "hf/to-4.52", "llava/hf-to-5.6": "hf/to-5.6"}


def list_presets() -> tuple[str, ...]:
    """Returns the names of all presets."""
    return tuple(sorted(_walk(_folder(), "")))


def read_preset(name: str) -> str:
    """Returns a preset's YAML text, by its name or one that it had before.

    Raises
    ------
    UsageError
        ``unknown-preset``.
    """
    name = _FORMER.get(name, name)
    known = list_presets()
    if name not in known:
        hint = did_you_mean(name, known)
        raise UsageError("unknown-preset", f"there is no preset {name!r}", hint=hint)
    return _folder().joinpath(name + _SUFFIX).read_text("utf-8")


def load_preset(name: str) -> Preset:
    """Returns a preset, by its name or one that it had before.

    Raises
    ------
    UsageError
        ``unknown-preset``.
    """
    name = _FORMER.get(name, name)
    text = read_preset(name)
    reader = NodeReader(f"{name}{_SUFFIX}")
    root = reader.table(read_yaml(text, reader.file), "a preset")
    fields = reader.fields(root, KEYS)
    reader.version(fields.get("preset"), "preset", root.mark)
    roles = dict(_roles(reader, fields["sources"]))
    preset = Preset(
        name,
        reader.text(fields["title"], "title"),
        reader.text(fields["description"], "description"),
        roles,
        read_target(reader, fields["target"]) if "target" in fields else None,
        tuple(replace(rule, optional=True) for rule in _rules(reader, fields, frozenset(roles))),
        read_drops(reader, fields["drop"], frozenset(roles), optional=True) if "drop" in fields else (),
        read_variables(reader, fields["let"]) if "let" in fields else {},
        read_adapters(reader, fields["adapters"], frozenset(roles), optional=True) if "adapters" in fields else (),
    )
    raise_all(reader.problems)
    return preset


def _rules(reader: NodeReader, fields: Mapping[str, Node], roles: frozenset[str]) -> tuple[Rule, ...]:
    return (*read_rules(reader, fields.get("tensors"), roles), *read_rest(reader, fields.get("rest"), roles))


def with_preset(spec: Spec, preset: Preset) -> Spec:
    """Returns the spec with the preset's rules, drops, adapters and target; a user's own replaces the preset's.

    A rule replaces the one whose target is the same names, an adapter the one that is taken from the same place.

    Raises
    ------
    MappingError
        ``missing-source``: a source the preset cannot do without. ``unknown-source``: one nobody has a use for.
    """
    raise_all(_source_problems(spec, preset))
    replaced = {rule.target.text for rule in preset.rules if any(alike(rule.target, one.target) for one in spec.rules)}
    inherited = (_without_absent(rule, spec) for rule in preset.rules if rule.target.text not in replaced)
    said = {(one.source.source, one.source.template.text) for one in spec.adapters}
    adapters = (
        one
        for one in preset.adapters
        if {one.source.source, one.onto.source} <= set(spec.sources)
        and (one.source.source, one.source.template.text) not in said
    )
    return replace(
        spec,
        target=spec.target or _with_present(preset.target, spec),
        rules=(*(rule for rule in inherited if rule is not None), *spec.rules),
        drops=(*(drop for drop in preset.drops if drop.source in spec.sources), *spec.drops),
        variables={**preset.variables, **spec.variables},
        adapters=(*adapters, *spec.adapters),
        notes=(*spec.notes, *(f"replaces the rule `{text}` of {preset.name}" for text in sorted(replaced))),
    )


def _with_present(target: TargetSpec | None, spec: Spec) -> TargetSpec | None:
    """A preset's role may name several sources, ``config|clip``: the first that is there plays it."""
    if target is None:
        return None
    roles = {}
    for role, text in target.roles.items():
        names = text.split("|")
        roles[role] = next((name for name in names if name in spec.sources), names[-1])
    return replace(target, roles=roles)


def _source_problems(spec: Spec, preset: Preset) -> Iterator[ShardmergeError]:
    for name, role in preset.roles.items():
        if role.required and name not in spec.sources:
            yield MappingError(
                "missing-source",
                f"the preset {preset.name} needs the source `{name}`: {role.about}",
                where=spec.file,
                hint=f"add --base {name}=PATH" if spec.from_options else f"add under `sources:`: `{name}: PATH`",
            )
    named: list[Reference | Drop] = [r for rule in spec.rules for one in rule.candidates for r in references(one)]
    named += [*spec.drops, *(one.source for one in spec.adapters), *(one.onto for one in spec.adapters)]
    referred = {one.source for one in named} | set(spec.target.roles.values() if spec.target else ())
    for name, source in spec.sources.items():
        if name not in preset.roles and name not in referred:
            hint = did_you_mean(name, preset.roles)
            yield MappingError("unknown-source", f"nothing uses the source `{name}`", where=str(source.mark), hint=hint)
    known = {*spec.sources, *preset.roles}
    for one in named:
        if one.source not in known:
            hint = did_you_mean(one.source, known)
            yield MappingError("unknown-source", f"there is no source `{one.source}`", where=str(one.mark), hint=hint)


def _without_absent(rule: Rule, spec: Spec) -> Rule | None:
    """Leaves out the candidates of optional sources that the user does not have."""
    candidates = tuple(one for one in rule.candidates if _present(one, spec))
    return replace(rule, candidates=candidates) if candidates else None


def _present(term: Term, spec: Spec) -> bool:
    return all(reference.source in spec.sources for reference in references(term))


def _roles(reader: NodeReader, node: Node) -> Iterator[tuple[str, PresetRole]]:
    for key, value in reader.table(node, "`sources`").entries:
        fields = reader.fields(reader.table(value, key.text), ROLE_KEYS)
        about = reader.text(fields["about"], "about")
        strip = reader.text(fields["strip"], "strip").split("|") if "strip" in fields else ()
        types = reader.text(fields["model_types"], "model_types").split("|") if "model_types" in fields else ()
        yield key.text, PresetRole(about, reader.flag(fields["required"], "required"), tuple(strip), tuple(types))


def _folder() -> Traversable:
    from importlib.resources import files  # brings zipfile and tempfile with it

    return files("shardmerge.mapping").joinpath("presets")


def _walk(folder: Traversable, prefix: str) -> Iterator[str]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _walk(item, f"{prefix}{item.name}/")
        elif item.name.endswith(_SUFFIX):
            yield prefix + item.name.removesuffix(_SUFFIX)
