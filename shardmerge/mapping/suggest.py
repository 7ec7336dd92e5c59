"""Lines to paste under `drop:`: templates that cover the names left over, and none that is used."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import islice, takewhile

from shardmerge.mapping.pattern import Template, escape


def drop_lines(source: str, names: Collection[str], kept: Collection[str], most: int = 3) -> list[str]:
    """Returns up to ``most`` lines, one for each first segment where a template can be found.

    Parameters
    ----------
    source
        Whose tensors they are.
    names
        What the lines shall cover.
    kept
        Names of the same source that no line may touch: a drop goes before every rule.
    most
        More lines than this help nobody.
    """
    return [f"- {_yaml_text(f'{source}:{template}')}" for template in islice(drop_templates(names, kept), most)]


def drop_templates(names: Collection[str], kept: Collection[str]) -> Iterator[str]:
    """Yields templates that cover some names and none of those that are kept: one for each first segment, if it can."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.partition(".")[0]].append(name)
    for group in groups.values():
        yield from _covering(group, kept)


def ticked(lines: Sequence[str]) -> str:
    """Returns lines for a hint, each in backticks."""
    return " and ".join(f"`{line}`" for line in lines)


def _covering(names: Sequence[str], kept: Collection[str]) -> list[str]:
    if len(names) > 1:
        for text in (_under_common_start(names), _of_one_form(names), _with_common_end(names)):
            if text and _separates(Template.parse(text), names, kept):
                return [text]
    return [escape(name) for name in names]


def _separates(template: Template, names: Collection[str], kept: Collection[str]) -> bool:
    return all(template.match(name) is not None for name in names) and not any(template.match(name) for name in kept)


def _under_common_start(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [column[0] for column in takewhile(_agrees, columns)]
    return ".".join([*map(escape, shared), "{rest...}"]) if shared else ""


def _with_common_end(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".")[:0:-1] for name in names), strict=False)
    shared = [column[0] for column in takewhile(_agrees, columns)]
    return ".".join(["{rest...}", *map(escape, reversed(shared))]) if shared else ""


def _of_one_form(names: Sequence[str]) -> str:
    """``h.{a}.attn.bias`` for names of the same length that differ in a few segments."""
    split = [name.split(".") for name in names]
    if len({len(segments) for segments in split}) > 1:
        return ""
    captures = iter("abc")
    columns = list(zip(*split, strict=True))
    if sum(not _agrees(column) for column in columns) > 3:
        return ""
    return ".".join(escape(column[0]) if _agrees(column) else f"{{{next(captures)}}}" for column in columns)


def _agrees(column: Sequence[str]) -> bool:
    return len(set(column)) == 1


def _yaml_text(text: str) -> str:
    """Quotes what YAML would not take for plain text; the source's name makes the beginning harmless."""
    plain = text.isprintable() and ": " not in text and " #" not in text and text[-1] not in ": "
    return text if plain else json.dumps(text)
