"""Whether a mapping merges models, and the card that says so in the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shardmerge.mapping.spec import OpTerm, Spec, Term, references
from shardmerge.prepare.ready import Ready
from shardmerge.sources.hub import is_hub_id
from shardmerge.targets.expectation import Expectation
from shardmerge.targets.model_card import CARD, CardModel, license_of, model_card
from shardmerge.tensors import SideFile

# The largest card whose metadata is looked at.
_LARGEST = 4 << 20


def with_card(expectation: Expectation, ready: Ready) -> Expectation:
    """Returns the expectation with a card where models are merged, unless the mapping says otherwise.

    ``card: true`` asks for one, ``card: false`` and ``files: none`` for none. The card of the base describes the base.
    """
    spec, files = ready.opened.spec, ready.opened.files
    said = spec.output.card if spec.output is not None else None
    wanted = bool(merge_ops(spec)) if said is None else said
    if not wanted or (files is not None and files.mode == "none" and not said):
        return expectation
    card = SideFile(CARD, (model_card(_models(ready), merge_ops(spec), _text(spec)),))
    others = tuple(one for one in expectation.side_files if one.name != CARD)
    return replace(expectation, side_files=(*others, card))


def merge_ops(spec: Spec) -> tuple[str, ...]:
    """Returns the ops by which tensors of several sources become one."""
    terms = [term for rule in spec.rules for term in rule.candidates]
    if not any(isinstance(term, OpTerm) for term in terms):
        return ()
    from shardmerge.ops.merges import KINDS  # only where an op is named

    known = {"linear", *(kind.name for kind in KINDS)}
    return tuple(dict.fromkeys(op for term in terms for op in _merging(term, known)))


def _merging(term: Term, known: set[str]) -> Iterator[str]:
    if not isinstance(term, OpTerm):
        return
    if term.kind.name in known and len({one.source for one in references(term)}) > 1:
        yield term.kind.name
    for one in term.inputs:
        yield from _merging(one, known)


def _models(ready: Ready) -> list[CardModel]:
    """Returns the sources that rules and adapters use, in the order of the mapping."""
    spec = ready.opened.spec
    used = {one.source for rule in spec.rules for term in rule.candidates for one in references(term)}
    used |= {one.source.source for one in spec.adapters}
    found = []
    for name in (name for name in spec.sources if name in used):
        path, catalog = spec.sources[name].path, ready.opened.catalogs.get(name)
        readme = catalog.side_files.get(CARD) if catalog is not None else None
        said = readme is not None and readme.nbytes <= _LARGEST
        text = ready.opened.sides.read(readme) if said and readme is not None else b""
        local = (Path(spec.file).parent / path).exists()
        found.append(
            CardModel(name, path, path.partition("@")[0] if is_hub_id(path) and not local else "", license_of(text))
        )
    return found


def _text(spec: Spec) -> str:
    """Returns the text of the mapping; nothing where it is no file."""
    try:
        return Path(spec.file).read_text("utf-8")
    except (OSError, ValueError):
        return ""
