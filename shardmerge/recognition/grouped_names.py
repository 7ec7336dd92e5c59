"""Rules that keep every name, one for each group of names, ready to be edited; with comments on what is in a group."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from shardmerge.mapping.near import count
from shardmerge.mapping.pattern import Template, escape
from shardmerge.tensors import TensorEntry

# More rules than anyone reads: then groups are larger.
_MOST_RULES = 60
# Last words of names that a rule counts up.
_MOST_WORDS = 6
_MOST_SHAPES = 3
_PLAIN = re.compile(r"[\w.{}:| -]+")


@dataclass(frozen=True, slots=True)
class NameGroup:
    """Names that one rule takes, and what they hold."""

    template: str
    names: tuple[str, ...]

    def lines(self, source: str, tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
        """Yields the rule, that of a source, and what is in the group."""
        yield f"# {count(len(self.names), 'tensor')}{_numbers(self)}: {_kinds([tensors[one] for one in self.names])}"
        yield f"{_quoted(self.template)}: {_quoted(f'{source}:{self.template}')}"


def group(tensors: Mapping[str, TensorEntry]) -> tuple[NameGroup, ...]:
    """Returns groups of names such that each name is of exactly one; the smallest that are not too many."""
    for template in (partial(_by_number, words=1), partial(_by_number, words=0), by_part):
        found: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            found[template(name)].append(name)
        groups = tuple(_with_words([NameGroup(one, tuple(names)) for one, names in found.items()]))
        if len(groups) <= _MOST_RULES and _apart(groups):
            return groups
    return (NameGroup("{rest...}", tuple(tensors)),)


def _by_number(name: str, words: int) -> str:
    """``model.layers.0.mlp.up.weight`` is of ``model.layers.{i:int}.mlp.{rest...}``; without a number, it is itself."""
    parts = name.split(".")
    at = next((at for at, one in enumerate(parts) if re.fullmatch(r"[0-9]{1,9}", one)), None)
    if at is None:
        return escape(name)
    front, behind = parts[:at], parts[at + 1 :]
    rest = ["{rest...}"] if behind[words:] else []
    return ".".join([*map(escape, front), "{i:int}", *map(escape, behind[:words]), *rest])


def by_part(name: str) -> str:
    """Returns the template of all names that begin with the same word."""
    first, dot, _ = name.partition(".")
    return f"{escape(first)}.{{rest...}}" if dot else escape(name)


def _with_words(groups: list[NameGroup]) -> Iterator[NameGroup]:
    """Puts names that differ in their last word only into one group: ``model.norm.{p:weight|bias}``."""
    single: dict[str, list[str]] = defaultdict(list)
    for one in groups:
        if "{" not in one.template:
            single[one.template.rpartition(".")[0]].append(one.template.rpartition(".")[2])
    done = set()
    for one in groups:
        front, _, word = one.template.rpartition(".")
        words = single[front] if "{" not in one.template else []
        if front and word in words and 1 < len(words) <= _MOST_WORDS and all(re.fullmatch(r"\w+", w) for w in words):
            if front not in done:
                names = tuple(f"{front}.{last}" for last in words)
                yield NameGroup(f"{front}.{{p:{'|'.join(words)}}}", names)
            done.add(front)
        else:
            yield one


def _apart(groups: tuple[NameGroup, ...]) -> bool:
    """Tells whether each rule takes the names of its group, and none of another one."""
    templates = [Template.parse(one.template) for one in groups]
    kinds = {re.sub(r"[0-9]+", "0", name): (name, index) for index, one in enumerate(groups) for name in one.names}
    return all(
        [at for at, one in enumerate(templates) if one.match(name) is not None] == [index]
        for name, index in kinds.values()
    )


def _numbers(one: NameGroup) -> str:
    if "{i:int}" not in one.template:
        return ""
    at = one.template.split(".").index("{i:int}")
    found = {int(name.split(".")[at]) for name in one.names}
    return f", i is {min(found)}" + (f" to {max(found)}" if len(found) > 1 else "")


def _kinds(entries: list[TensorEntry]) -> str:
    found = list(dict.fromkeys(f"{one.dtype.name} {list(one.shape)}" for one in entries))
    return ", ".join(found[:_MOST_SHAPES]) + (", ..." if len(found) > _MOST_SHAPES else "")


def _quoted(text: str) -> str:
    """Returns text for YAML; a brace in front begins no plain text there, and a colon behind a space ends one."""
    return (
        text
        if _PLAIN.fullmatch(text) and text[0].isalpha() and ": " not in text
        else json.dumps(text, ensure_ascii=False)
    )
