"""What a checkpoint is, by its names and shapes and the config.json beside it. Pure; the table is ``layouts.json``.

The one place that recognises: `init` writes a mapping by it, `convert`, `run` and `inspect` take their hints from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from shardmerge.recognition.table import Layout, layout_table
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.tensors.wrapped_names import ANYWHERE, IN_FRONT, unwrapped_names

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
# Of all names, those that must stand behind a prefix for it to be one: a value head, a loss may stand beside the model.
_NEARLY_ALL = 0.8
# A strategy's, a compiler's, a LightningModule's attribute and what that wraps; more is somebody's joke.
_MOST_WRAPPERS = 5
# What a wrapped causal model begins with where it has no head of its own: no class of transformers names its parts so.
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_BODIES = ("model.", "transformer.", "gpt_neox.")


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
    files
        Names of the files beside it.
    """

    layouts: tuple[Layout, ...]
    title: str
    wrappers: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    files: frozenset[str] = frozenset()


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
    config = config or {}
    kinds = {name: plain(name) for name in catalog.names()}
    whole = {kind: catalog[name] for kind, name in {kind: name for name, kind in kinds.items()}.items()}
    views = list(_views(whole, config))
    view = next((one for one in views if _is_known(one, config)), None)
    view = view or next((one for one in reversed(views[1:]) if _is_causal(one, config)), views[0])
    kept, remarks = _as_configured(_fitting(view), config)
    outside = tuple(name for name, kind in kinds.items() if kind in view.outside)
    title = "; ".join(one.name for one in kept) or _title(config)
    return Recognised(kept, title, view.wrappers, outside, remarks, frozenset(catalog.side_files))


def plain(name: str) -> str:
    """Returns a name with a 0 for every number."""
    return _NUMBER.sub("0", name)


def _fitting(view: _View) -> tuple[Layout, ...]:
    return tuple(one for one in layout_table().layouts if one.fits(view.tensors))


def _is_known(view: _View, config: Mapping[str, object]) -> bool:
    """Tells whether a layout is left; behind what no trainer is known for, the one that config.json states."""
    fits = _fitting(view)
    if set(view.wrappers) <= {*ANYWHERE, *IN_FRONT, *layout_table().trainers}:
        return bool(fits)
    return any(config.get("model_type") in one.model_types for one in fits)


def _is_causal(view: _View, config: Mapping[str, object]) -> bool:
    """Tells whether what is left can only be the inside of a wrapped causal model, of whatever family."""
    if not set(view.wrappers) <= {*ANYWHERE, *IN_FRONT, *layout_table().trainers}:
        return False
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(first, str) or not first.endswith(_CAUSAL):
        return False
    return "lm_head.weight" in view.tensors or all(name.startswith(_BODIES) for name in view.tensors)


def _views(whole: Mapping[str, TensorEntry], config: Mapping[str, object]) -> Iterator[_View]:
    """Yields the names without wrappers' words, and then with ever more taken off that nearly all begin with."""
    inside, words = unwrapped_names(whole)
    outside = frozenset[str]()
    if len(set(inside.values())) < len(inside):  # two copies of a model are no wrapper's doing
        inside, words = {name: name for name in whole}, ()
    yield _View({short: whole[name] for name, short in inside.items()}, words)
    while len(words) < _MOST_WRAPPERS and (front := _front(inside.values(), any_front="model_type" in config)):
        outside |= {name for name, short in inside.items() if not short.startswith(front)}
        inside = {name: short.removeprefix(front) for name, short in inside.items() if name not in outside}
        words = (*words, front)
        yield _View({short: whole[name] for name, short in inside.items()}, words, outside)


def _front(names: Collection[str], *, any_front: bool) -> str:
    """Returns what nearly all names begin with: a trainer's attribute, or any where config.json tells the rest."""
    firsts = Counter(name.partition(".")[0] for name in names if "." in name)
    first, count = max(firsts.items(), key=lambda one: one[1], default=("", 0))
    known = any_front or f"{first}." in layout_table().trainers
    return f"{first}." if known and first and count >= _NEARLY_ALL * len(names) else ""


def _as_configured(
    fits: tuple[Layout, ...], config: Mapping[str, object]
) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
    """Returns the layouts that config.json does not speak against, and what is odd about it."""
    stated = config.get("model_type")
    if not isinstance(stated, str) or not stated:
        return tuple(one for one in fits if not one.by_config), ()
    kept = tuple(one for one in fits if not one.model_types or stated in one.model_types)
    own = [one.name for one in layout_table().layouts if stated in one.model_types]
    if kept or not (fits or own):
        return kept, ()
    names = "; ".join(one.name for one in fits)
    if not own:
        return (), () if stated in layout_table().titles else (
            f"config.json says `{stated}`; the names are those of {names}",
        )
    said = f"config.json says `{stated}`, {' or '.join(own)}"
    return (), (f"{said}, and the names are {'those of ' + names if names else 'not as they are known here'}",)


def _title(config: Mapping[str, object]) -> str:
    stated = config.get("model_type")
    if not isinstance(stated, str):
        return ""
    own = [one.name for one in layout_table().layouts if stated in one.model_types]
    return layout_table().titles.get(stated) or " or ".join(own) or f"a model of the type {stated!r}"
