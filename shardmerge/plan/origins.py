"""Where the tensors of a plan come from and what happens to them, as a table. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.plan.shard import PlannedTensor
from shardmerge.plan.tables import TextTable, human_bytes
from shardmerge.plan.value import Plan
from shardmerge.plan.ways import way_of
from shardmerge.tensors import leaves

# Modules that are named one by one; of more their component is named.
_NAMED = 3

# From where, and how.
_Road: TypeAlias = tuple[str, str]


@dataclass(slots=True)
class _Part:
    """Tensors of one component that take one road."""

    component: str
    modules: dict[str, None] = field(default_factory=dict)
    count: int = 0
    nbytes: int = 0

    def add(self, tensor: PlannedTensor) -> None:
        self.modules[_module(tensor.name)] = None
        self.count += 1
        self.nbytes += tensor.nbytes


def origins_table(plan: Plan) -> TextTable:
    """Returns a table with a row for all tensors of a component that come from one place in one way.

    A few of a component whose others take another road are named: ``embed_tokens, lm_head``.
    """
    roads = _roads(plan)
    names = _Names.of(roads)
    place = {source.name: number for number, source in enumerate(plan.sources)}
    rows = [(road, *row) for road, parts in roads.items() for row in _rows(list(parts.values()), names)]
    rows.sort(key=lambda row: (place.get(row[0][0].split(" ")[0], -1), -row[3], row[1]))
    cells = [(source or "-", name, f"{count:,}", human_bytes(size), how) for (source, how), name, count, size in rows]
    return TextTable(("from", "target", "tensors", "bytes", "how"), cells, frozenset({2, 3}))


def _roads(plan: Plan) -> dict[_Road, dict[str, _Part]]:
    roads: dict[_Road, dict[str, _Part]] = defaultdict(dict)
    for tensor in plan.tensors():
        head, dot, _ = tensor.name.partition(".")
        component = f"{head}.*" if dot else head
        parts = roads[_source(tensor), way_of(tensor.entry)]
        parts.setdefault(component, _Part(component)).add(tensor)
    return roads


def _source(tensor: PlannedTensor) -> str:
    return " + ".join(dict.fromkeys(f"{leaf.source} ({leaf.origin})" for leaf in leaves(tensor.entry)))


def _module(name: str) -> str:
    """Returns a tensor's name without what its module calls it: ``model.norm`` for ``model.norm.weight``."""
    return name.rpartition(".")[0] or name


def _short(module: str) -> str:
    return module.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Names:
    """What names alone say.

    Attributes
    ----------
    divided
        Components whose tensors take several roads.
    unique
        Last parts of modules' names that are those of one module alone.
    """

    divided: frozenset[str]
    unique: frozenset[str]

    @classmethod
    def of(cls, roads: dict[_Road, dict[str, _Part]]) -> _Names:
        parts = [part for found in roads.values() for part in found.values()]
        components = Counter(part.component for part in parts)
        shorts = Counter(map(_short, {module for part in parts for module in part.modules}))
        return cls(
            frozenset(name for name, count in components.items() if count > 1),
            frozenset(name for name, count in shorts.items() if count == 1),
        )

    def tell(self, parts: Sequence[_Part]) -> str:
        """Returns the names of all modules of some parts, where these are few and their components do not do."""
        modules = [module for part in parts for module in part.modules]
        shorts = sorted(map(_short, modules))
        few = len(modules) <= _NAMED and self.unique.issuperset(shorts)
        return ", ".join(shorts) if few and any(part.component in self.divided for part in parts) else ""


def _rows(parts: Sequence[_Part], names: _Names) -> Iterator[tuple[str, int, int]]:
    """Yields target, number of tensors and bytes: in one row what can be named, else a row a component."""
    told = names.tell(parts)
    if told:
        yield told, sum(part.count for part in parts), sum(part.nbytes for part in parts)
        return
    for part in parts:
        one = next(iter(part.modules)) if len(part.modules) == 1 else part.component
        yield names.tell([part]) or one, part.count, part.nbytes
