"""The mapping that keeps every name: one rule, ``{rest...}`` from ``source:{rest...}``, which needs no search."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shardmerge.mapping.pattern import Template
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import COMMAND_LINE, Reference, Rule, Spec
from shardmerge.tensors import Catalog, of_source

_EVERY = "{rest...}"


def same_name(source: str) -> Rule:
    """Returns the rule that takes every tensor of a source under its own name."""
    everything = Template.parse(_EVERY)
    return Rule(everything, (Reference(source, everything, COMMAND_LINE),), COMMAND_LINE)


def keeps_names(spec: Spec) -> str:
    """Returns the one source whose tensors all rules take under their own names; ``""`` where there is another rule."""
    sources = {
        one.source if isinstance(one, Reference) and one.template.text == rule.target.text else ""
        for rule in spec.rules
        for one in rule.candidates
    }
    return sources.pop() if len(sources) == 1 and not spec.adapters and spec.vocabulary is None else ""


def only_keeps_names(spec: Spec, catalogs: Mapping[str, Catalog]) -> str:
    """Returns the source of a mapping that is that one rule, and leaves nothing to be searched; ``""`` for others."""
    source = keeps_names(spec)
    found = catalogs.get(source)
    simple = len(spec.rules) == 1 and spec.rules[0].target.text == _EVERY and not spec.drops
    if not simple or found is None or found.aliases or not found.entries:
        return ""
    others = (one for name, one in catalogs.items() if name != source)
    return "" if found.absent or any(one.entries or one.absent for one in others) else source


def keep_names(rule: Rule, source: str, catalog: Catalog, dropped: Collection[tuple[str, str]]) -> Resolution:
    """Returns that every tensor of a source is taken under its own name.

    ``dropped`` are the (source, name) of tensors that are not in the catalog any more.
    """
    made = {
        name: Assignment(name, source, name, rule, of_source(catalog[name], source), term=rule.candidates[0])
        for name in catalog.names()
    }
    return Resolution(made, (), tuple(sorted(dropped)))
