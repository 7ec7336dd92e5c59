"""The moments of Adam in a distributed checkpoint, under the names of the weights, with steps and settings.

::

    <optimizer>.state.<weight>.exp_avg, .exp_avg_sq, .step
    <optimizer>.param_groups.0.lr, ..., .params       objects; or
    <optimizer>.param_groups.<weight>.lr, ...         with flatten_optimizer_state_dict

``<optimizer>`` is what the trainer calls it: ``optim``, ``optimizer``, ``optimizer_0``. Accelerate and the Trainer keep
it in ``optimizer_0/`` beside the model's directory (torch 2.1 to 2.13, Accelerate 1.15, Lightning 2.6, OLMo-core).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

from shardmerge.shown import shown
from shardmerge.sources.dcp import chunked_entry, metadata_files, read_dcp, same_tensors
from shardmerge.sources.dcp_items import ItemFiles
from shardmerge.sources.dcp_metadata import DcpMetadata, read_metadata
from shardmerge.sources.dcp_table import StoredChunk
from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.sources.optimizer_settings import PARAMS, plain_setting
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.pickle_vm import interpret
from shardmerge.sources.torch_zip import read_torch_zip
from shardmerge.tensors import Catalog, Extent, TensorEntry
from shardmerge.tensors.optimizer import OptimizerState, ParameterGroup, Setting

# What the optimizer's directory is called where it is not the model's.
_BESIDE = "optimizer_0"
_STATE, _GROUPS = re.compile(r"(?:(.+?)\.)?state\.(.+)\.(exp_avg|exp_avg_sq|step)"), "param_groups"
# The names of a model's weights are the longest object.
_MOST_BYTES = 64 << 20


def read_dcp_moments(folder: Path, root: str, kind: str) -> Catalog:
    """Returns the catalog of one moment of every weight that was trained; ``optimizer`` has the rest.

    Parameters
    ----------
    folder, root
        As ``read_dcp``.
    kind
        ``exp_avg`` or ``exp_avg_sq``.

    Raises
    ------
    CheckpointError
        ``no-moments``: there are none, or none that can be told for a weight. And as ``read_dcp``.
    """
    model = read_dcp(folder, root)
    found = _Optimizer(folder, set(model.names()), kind)
    with closing(found.items):
        entries = {weight: found.entry(weight) for weight in found.weights}
        optimizer = OptimizerState(found.steps(), tuple(found.groups()))
        stamps = tuple(chain((one.stamp for one in found.read), found.items.stamps()))
    return Catalog(str(folder), model.kind, entries, files=stamps, optimizer=optimizer)


class _Optimizer:
    """The optimizer of a checkpoint: which names are its own."""

    def __init__(self, model: Path, weights: set[str], kind: str) -> None:
        self.read = _metadata(model)
        folder = model
        if not _names(self.read) and (model.parent / _BESIDE).is_dir():
            folder = model.parent / _BESIDE
            self.read = _metadata(folder)
        self.where, self.kind = str(folder), kind
        self.items = ItemFiles(folder)
        self._tensors = same_tensors(folder, self.read)
        self._objects = {name: place for one in self.read for name, place in one.table.objects.items()}
        self._by_start: dict[str, list[str]] = {}  # settings, by all of their names up to the last dot
        for name in self._objects:
            self._by_start.setdefault(name[: name.rfind(".") + 1], []).append(name)
        self._values: dict[tuple[str, int, int, str], PickleValue] = {}
        self._start = self._prefix(weights)
        start, end = f"{self._start}state.", f".{kind}"
        self._check_kind(start)
        self.weights = [
            name[len(start) : -len(end)] for name in self._tensors if name.startswith(start) and name.endswith(end)
        ]

    def _prefix(self, weights: set[str]) -> str:
        """Returns what its names begin with: the only optimizer whose weights are those of the model."""
        found: dict[str, set[str]] = {}
        for name in self._tensors:
            if (match := _STATE.fullmatch(name)) and match[3] == self.kind:
                found.setdefault(f"{match[1]}." if match[1] else "", set()).add(match[2])
        mine = [start for start, names in found.items() if names <= weights]
        if len(mine) == 1:
            return mine[0]
        if not found:
            raise no_moments(self.where, f"no tensors called {self.kind}")
        if mine:
            raise no_moments(self.where, f"several optimizers have weights of the model: {shown(mine)}")
        strange = sorted(next(iter(found.values())) - weights)
        raise no_moments(self.where, f"its weights are not called as those of the model: {shown(strange)}")

    def _check_kind(self, start: str) -> None:
        """AMSGrad has a third moment: the others without it are another optimizer."""
        more = [name for one in self.read for name in one.table.dropped if name.startswith(start)]
        if more:
            raise no_moments(self.where, f"it keeps {shown(sorted(more))} besides", "exp_avg, exp_avg_sq and step")

    def _state(self, weight: str, kind: str) -> str:
        return f"{self._start}state.{weight}.{kind}"

    def entry(self, weight: str) -> TensorEntry:
        """Returns the moment of a weight."""
        name = self._state(weight, self.kind)
        return chunked_entry(weight, name, self._tensors[name], self.read, self.items, f"{self.kind} of {self.where}")

    def steps(self) -> dict[str, float]:
        """Returns how often each weight was stepped: tensors of one float32, or numbers."""
        return {weight: self._step(self._state(weight, "step")) for weight in self.weights}

    def _step(self, name: str) -> float:
        if name in self._tensors:
            entry = chunked_entry(name, name, self._tensors[name], self.read, self.items, "")
            held = entry.pieces[0].held if entry.numel == 1 and entry.dtype.name == "F32" else None
            if isinstance(held, Extent):
                chunk = next(one for part in self.read if name in part.table.tensors for one in part.table.chunks(name))
                number: float = struct.unpack("<f", self.items.read(name, chunk, held))[0]
                return number
        value = self._value(name) if name in self._objects else None
        if isinstance(value, (int, float)):
            return float(value)
        raise no_moments(self.where, f"no step of {name[:200]}", "a number, or one float32")

    def groups(self) -> Iterator[ParameterGroup]:
        """Yields the groups of parameters, numbered ones or those of weights with the same settings.

        Raises
        ------
        CheckpointError
            ``no-moments``: they are not those of the weights that have moments.
        """
        found = [*self._numbered()] or [*self._by_weight()]
        named = [name for group in found for name in group.names]
        lacking = set(self.weights) - set(named)
        if lacking or len(named) != len(set(named)):
            raise no_moments(
                self.where,
                f"its groups hold {len(named)} weights, and {len(lacking)} of those with moments are not among them",
                "each weight in one group",
            )
        return iter(found)

    def _numbered(self) -> Iterator[ParameterGroup]:
        number = 0
        while names := self._settings(f"{self._start}{_GROUPS}.{number}."):
            params = names.pop(PARAMS, None)
            if not isinstance(params, list):
                return  # a weight that is called by a number
            yield ParameterGroup(tuple(str(name) for name in params), names)
            number += 1

    def _by_weight(self) -> Iterator[ParameterGroup]:
        """Weights with equal settings make a group, in the order of their first ones."""
        alike: dict[str, list[str]] = {}
        settings: dict[str, dict[str, Setting]] = {}
        for weight in self.weights:
            mine = self._settings(f"{self._start}{_GROUPS}.{weight}.")
            key = repr(sorted(mine.items()))
            alike.setdefault(key, []).append(weight)
            settings[key] = mine
        yield from (ParameterGroup(tuple(names), settings[key]) for key, names in alike.items() if settings[key])

    def _settings(self, start: str) -> dict[str, Setting]:
        names = self._by_start.get(start, ())
        return {name[len(start) :]: plain_setting(self.where, name[:200], self._value(name)) for name in names}

    def _value(self, name: str) -> PickleValue:
        """Returns an object as the inert values of its pickle."""
        place = self._objects[name]
        if place not in self._values:
            item = self.items.object(name, StoredChunk((), (), *place), _MOST_BYTES)
            if item.size > _MOST_BYTES:
                raise no_moments(
                    self.where, f"{name[:200]} is an object of {item.size:,} bytes", f"at most {_MOST_BYTES:,}"
                )
            self._values[place] = interpret(read_torch_zip(item).pickle, where=f"{item.path}, {name[:200]}")
        return self._values[place]


def _metadata(folder: Path) -> list[DcpMetadata]:
    """Reads moments and settings, and nothing of the model."""
    return [read_metadata(path, _is_moment, _is_setting) for path in metadata_files(folder)]


def _is_moment(name: str) -> bool:
    return _STATE.fullmatch(name) is not None


def _is_setting(name: str) -> bool:
    return _is_moment(name) or f".{_GROUPS}." in f".{name}"


def _names(read: Sequence[DcpMetadata]) -> list[str]:
    return [name for one in read for name in one.table.tensors]
