"""A number that differs from tensor to tensor: filters on the name, and points between which layers lie.

As mergekit writes them: ``t: [0, 0.5, 1]`` is 0 in the first layer, 1 in the last, and on straight lines between in the
others; ``t: [{filter: mlp, value: 0.2}, {value: [0, 1]}]`` has another value where the name holds ``mlp``. The first
case whose filter is in the name decides. A tensor of no layer has the first point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.formulas import Formula
from shardmerge.mapping.yaml_nodes import Mark

_LAYER = re.compile(r"\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class VaryingCase:
    """A value for tensors with ``filter`` in their names, all where it is empty; points of a gradient, or one."""

    filter: str
    points: tuple[Formula, ...]
    mark: Mark


@dataclass(frozen=True, slots=True)
class Varying:
    """The first case that fits a name decides."""

    cases: tuple[VaryingCase, ...]

    @property
    def formulas(self) -> tuple[Formula, ...]:
        """All formulas of all cases."""
        return tuple(point for case in self.cases for point in case.points)

    def case(self, name: str) -> VaryingCase | None:
        """Returns the case of a tensor."""
        return next((case for case in self.cases if case.filter in name), None)


@dataclass(slots=True)
class LayerPlaces:
    """Where a tensor lies among the layers of its source, from 0 to 1."""

    names: Mapping[str, Iterable[str]]
    _counts: dict[str, dict[str, int]]

    def place(self, source: str, name: str) -> float:
        """Returns the place of the first number between dots of a name; 0 without one, 1 for the only layer."""
        match = _LAYER.search(name)
        if match is None:
            return 0.0
        if source not in self._counts:
            self._counts[source] = _counts(self.names[source])
        count = self._counts[source].get(name[: match.start()], 1)
        return int(match[1]) / (count - 1) if count > 1 else 1.0


def _counts(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        match = _LAYER.search(name)
        if match is not None:
            before = name[: match.start()]
            found[before] = max(found.get(before, 0), int(match[1]) + 1)
    return found


def interpolated(points: tuple[float, ...], place: float) -> float:
    """Returns the value at a place from 0 to 1 of lines through points at equal distances."""
    scaled = place * (len(points) - 1)
    low = int(scaled)
    share = scaled - low
    return (1 - share) * points[low] + share * points[min(low + 1, len(points) - 1)]


def value_of(
    setting: Varying, name: str, place: float, number: Callable[[Formula], float], what: str
) -> tuple[float, VaryingCase]:
    """Returns the value of a tensor, and the case that decided; raises ``op-value`` where none does."""
    case = setting.case(name)
    if case is None:
        raise MappingError(
            "op-value",
            f"no filter of `{what}` fits {name}",
            where=str(setting.cases[0].mark),
            found=", ".join(case.filter for case in setting.cases),
            hint="add a last line without a filter: `- value: NUMBER`",
        )
    return interpolated(tuple(number(point) for point in case.points), place), case
