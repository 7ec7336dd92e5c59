"""The card of a merge, README.md: what was merged from what and how, with the metadata that the hub reads.

Keys of the metadata are those of the hub's model cards (``base_model``, ``base_model_relation``, ``license``,
``tags``); ``tags: [merge]`` and ``base_model`` are what mergekit 0.1.5 writes (``mergekit/card.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CARD = "README.md"

# A line of a card's metadata that says its license. Only plain words are passed on.
_SAID = re.compile(r"^(license|license_name|license_link):[ \t]*[\"']?([\w.+:/-]{1,200})[\"']?[ \t]*$", re.MULTILINE)
# Metadata lies between two lines of dashes at the top, and is small.
_METADATA = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LARGEST_METADATA = 64 << 10


@dataclass(frozen=True, slots=True)
class CardModel:
    """A model that went into a merge.

    Attributes
    ----------
    path
        As the mapping says it.
    hub_id
        ``org/name`` where it is one of the hub, else ``""``.
    license
        What its own card says under ``license``, ``license_name``, ``license_link``.
    """

    name: str
    path: str
    hub_id: str
    license: dict[str, str]


def license_of(readme: bytes) -> dict[str, str]:
    """Returns what the metadata of a card says of the license; nothing where it says nothing plain."""
    text = readme[:_LARGEST_METADATA].decode("utf-8", "replace")
    metadata = _METADATA.match(text)
    return {} if metadata is None else dict(_SAID.findall(metadata[1].replace("\r", "")))


def model_card(models: Sequence[CardModel], ops: Sequence[str], mapping: str) -> bytes:
    """Returns the card of a merge.

    Parameters
    ----------
    models
        What was merged, in the order of the mapping.
    ops
        By which ops; none where layers were put together.
    mapping
        The mapping's text, or ``""``.
    """
    lines = [*_metadata(models), *_text(models, ops)]
    if mapping:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", mapping)), default=0))
        lines += ["", "## Mapping", "", f"{fence}yaml", *mapping.rstrip("\n").split("\n"), fence]
    return ("\n".join(lines) + "\n").encode("utf-8")


def _metadata(models: Sequence[CardModel]) -> Iterator[str]:
    yield "---"
    ids = sorted({one.hub_id for one in models if one.hub_id})
    if ids:
        yield "base_model:"
        yield from (f"- {one}" for one in ids)
        yield "base_model_relation: merge"
    yield "library_name: transformers"
    agreed = models[0].license if models and all(one.license == models[0].license for one in models) else {}
    yield from (f"{key}: {value}" for key, value in sorted(agreed.items()))
    yield "tags:"
    yield "- merge"
    yield "- shardmerge"
    yield "---"


def _text(models: Sequence[CardModel], ops: Sequence[str]) -> Iterator[str]:
    how = f"with {', '.join(f'`{op}`' for op in ops)}" if ops else "from layers of several models"
    yield f"# Merge of {', '.join(one.name for one in models)}"
    yield ""
    yield f"Made {how} by shardmerge."
    yield ""
    yield "| name | model | license as its card says |"
    yield "|---|---|---|"
    for one in models:
        place = f"[{one.hub_id}](https://huggingface.co/{one.hub_id})" if one.hub_id else f"`{_cell(one.path)}`"
        said = ", ".join(value for _, value in sorted(one.license.items())) or "not stated"
        yield f"| {one.name} | {place} | {_cell(said)} |"
    if len({tuple(sorted(one.license.items())) for one in models}) > 1:
        yield ""
        yield "The licenses differ: a merge is bound by all of them."


def _cell(text: str) -> str:
    return re.sub(r"[\r\n`]", " ", text).replace("|", "\\|")
