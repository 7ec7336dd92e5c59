"""What a checkpoint is, by its names and shapes and the config.json beside it. Pure; the table is ``layouts.json``.

The one place that recognises: `init` writes a mapping by it, `convert`, `run` and `inspect` take their hints from it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.mapping.layout_table import Layout, layouts, titles, trainers
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.tensors.wrapped_names import unwrapped_names

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
# Of all names, those that must stand behind a prefix for it to be one: a value head, a loss may stand beside the model.
_NEARLY_ALL = 0.8
# A strategy's, a compiler's, a LightningModule's attribute and what that wraps; more is somebody's joke.
_MOST_WRAPPERS = 5


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a checkpoint is.

    Attributes
    ----------
    layouts
        All that it fits; of those that config.json does not speak against.
    title
        What it is called for people; empty where nothing is known.
    wrappers
        What stands before the names of the layout, or in them, and is no part of it.
    outside
        Names that stand beside the wrapped model.
    remarks
        Where config.json and the names say two things.
    tensors
        One for each name, with a 0 for every number, without wrappers.
    """

    layouts: tuple[Layout, ...]
    title: str
    wrappers: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _View:
    """Names, with a 0 for every number, without what stands before them."""

    tensors: Mapping[str, TensorEntry]
    wrappers: tuple[str, ...]
    outside: frozenset[str] = frozenset()


def recognise(catalog: Catalog, config: Mapping[str, object] | None = None) -> Recognised:
    """Returns every layout that a checkpoint fits, wrappers seen through.

    Parameters
    ----------
    catalog
        The checkpoint.
    config
        The config.json beside it; its ``model_type`` goes before the names.
    """
    whole = {plain(name): catalog[name] for name in catalog.names()}
    views = list(_views(whole))
    found = next(((view, fits) for view in views if (fits := _fitting(view.tensors))), (views[0], ()))
    view, fits = found
    kept, remarks = _as_configured(fits, config or {})
    outside = tuple(name for name in catalog.names() if plain(name) in view.outside)
    title = "; ".join(one.name for one in kept) or _title(config or {})
    return Recognised(kept, title, view.wrappers, outside, remarks, view.tensors)


def plain(name: str) -> str:
    """Returns a name with a 0 for every number."""
    return _NUMBER.sub("0", name)


def _fitting(tensors: Mapping[str, TensorEntry]) -> tuple[Layout, ...]:
    return tuple(one for one in layouts() if one.fits(tensors))


def _views(whole: Mapping[str, TensorEntry]) -> Iterator[_View]:
    """Yields the names as they are without wrappers' words, and with ever more taken off that nearly all begin with."""
    clean, words = unwrapped_names(whole)
    inside, outside = clean, frozenset[str]()
    yield _View({short: whole[name] for name, short in inside.items()}, words)
    while len(words) < _MOST_WRAPPERS and (front := _front(inside.values())):
        outside |= {name for name, short in inside.items() if not short.startswith(front)}
        inside = {name: short.removeprefix(front) for name, short in inside.items() if name not in outside}
        words = (*words, front)
        yield _View({short: whole[name] for name, short in inside.items()}, words, outside)


def _front(names: Collection[str]) -> str:
    """Returns the attribute of a trainer that nearly all names begin with, or ``""``."""
    found = (one for one in trainers() if sum(name.startswith(one) for name in names) >= _NEARLY_ALL * len(names))
    return next(found, "") if names else ""


def _as_configured(
    fits: tuple[Layout, ...], config: Mapping[str, object]
) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
    """Returns the layouts that config.json does not speak against, and what is odd about it."""
    stated = config.get("model_type")
    if not isinstance(stated, str) or not stated:
        return tuple(one for one in fits if not one.by_config), ()
    kept = tuple(one for one in fits if not one.model_types or stated in one.model_types)
    own = [one.name for one in layouts() if stated in one.model_types]
    if kept or not (fits or own):
        return kept, ()
    names = "; ".join(one.name for one in fits)
    if not own:
        return (), () if stated in titles() else (f"config.json says `{stated}`; the names are those of {names}",)
    said = f"config.json says `{stated}`, {' or '.join(own)}"
    return (), (f"{said}, and the names are {'those of ' + names if names else 'not as they are known here'}",)


def _title(config: Mapping[str, object]) -> str:
    stated = config.get("model_type")
    if not isinstance(stated, str):
        return ""
    own = [one.name for one in layouts() if stated in one.model_types]
    return titles().get(stated) or " or ".join(own) or f"a model of the type {stated!r}"
