"""Names that are called otherwise elsewhere: pairs of templates, and which of them a name obeys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from shardmerge.mapping.captures import Capture
from shardmerge.mapping.pattern import Template


class Renaming(NamedTuple):
    """What matches ``old`` is called ``new``; both bind the same captures."""

    old: Template
    new: Template

    @classmethod
    def of(cls, old: str, new: str) -> Renaming:
        """Returns the pair of two texts."""
        return cls(Template.parse(old), Template.parse(new))

    def __str__(self) -> str:
        return f'"{self.old}": "{self.new}"'


Renamings = tuple[Renaming, ...]


def specific(template: Template) -> int:
    """Returns how many characters of a template are no captures: of two that match, the longer one is meant."""
    return sum(len(part) for part in template.parts if isinstance(part, str))


def renamed(name: str, rules: Iterable[Renaming]) -> str:
    """Returns what a name is called; the most specific of the rules that match it counts, and none leaves it."""
    for rule in sorted(rules, key=lambda one: -specific(one.old)):
        bindings = rule.old.match(name)
        if bindings is not None:
            return rule.new.format(bindings)
    return name


def original(name: str, rules: Renamings) -> str:
    """Returns the name that is called ``name`` by the rules: itself where none of them makes it."""
    for rule in sorted(rules, key=lambda one: -specific(one.new)):
        bindings = rule.new.match(name)
        if bindings is not None and renamed(found := rule.old.format(bindings), rules) == name:
            return found
    return name


def line(rules: Renamings) -> str:
    """Returns the ``rename:`` of a mapping that says the rules, to paste."""
    return f"rename: {{{', '.join(map(str, rules))}}}"


def reversible(rule: Renaming) -> bool:
    """Tells whether both sides bind the same captures of the same kinds."""
    return _kinds(rule.old) == _kinds(rule.new)


def _kinds(template: Template) -> set[tuple[str, str]]:
    return {(part.name, part.kind) for part in template.parts if isinstance(part, Capture)}
