"""The resolution of a conversion that keeps every name: one rule, ``{rest...}`` from ``source:{rest...}``."""

from __future__ import annotations

from collections.abc import Collection

from shardmerge.mapping.pattern import Template
from shardmerge.mapping.resolution import Assignment, Resolution
from shardmerge.mapping.spec import COMMAND_LINE, Reference, Rule
from shardmerge.tensors import Catalog, of_source


def keep_names(source: str, catalog: Catalog, dropped: Collection[tuple[str, str]]) -> Resolution:
    """Returns that every tensor of a source is taken under its own name.

    ``dropped`` are the (source, name) of tensors that are not in the catalog any more.
    """
    everything = Template.parse("{rest...}")
    rule = Rule(everything, (Reference(source, everything, COMMAND_LINE),), COMMAND_LINE)
    made = {name: Assignment(name, source, name, rule, of_source(catalog[name], source)) for name in catalog.names()}
    return Resolution(made, (), tuple(sorted(dropped)))
