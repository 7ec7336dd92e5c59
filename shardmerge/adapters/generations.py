"""Which generation of transformers an adapter's names are of, where the architecture of its base is known. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from shardmerge.adapters.fit import Fit
from shardmerge.errors import MappingError
from shardmerge.mapping.generations import ModelNames, generations, names_of
from shardmerge.mapping.renaming import Renaming, Renamings, renamed
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Shape


def known_renamings(
    wanted: Mapping[str, Fit], optional: Collection[str], base: Mapping[str, Shape], config: JsonObject
) -> list[Renamings]:
    """Returns the renamings of transformers by which all names of an adapter are tensors of its base.

    Parameters
    ----------
    wanted
        The adapter's names, and what fits them.
    optional
        Those of them that may be missing.
    base, config
        Names and shapes of the base, and its config.json. None of an architecture whose renames are not known.

    Notes
    -----
    Two renamings that call every name alike are one.
    """
    try:
        names = names_of(config)
    except MappingError:
        return []
    found: dict[tuple[str, ...], Renamings] = {}
    for rules in _renamings(names):
        placed = _placed(wanted, optional, base, rules)
        if placed is not None:
            found.setdefault(placed, rules)
    return list(found.values())


def _renamings(names: ModelNames) -> Iterator[Renamings]:
    """Yields what leads from the names that each generation has in memory to each spelling of a file."""
    spellings = [names.every(one) for one in names.spellings()]
    for label in generations():
        memory = names.every(names.generation(label))
        for disk in spellings:
            rules = [Renaming.of(old, disk[key]) for key, old in memory.items() if disk.get(key, old) != old]
            if rules:
                yield tuple(rules)


def _placed(
    wanted: Mapping[str, Fit], optional: Collection[str], base: Mapping[str, Shape], rules: Renamings
) -> tuple[str, ...] | None:
    """Returns what all names are called, None where one is not in the base or has another shape there."""
    places = []
    for name, fit in wanted.items():
        place = renamed(name, rules)
        if place in base and fit(place, base[place]):
            places.append(place)
        elif place in base or name not in optional:
            return None
    return tuple(places) if len(places) == len(set(places)) else None
