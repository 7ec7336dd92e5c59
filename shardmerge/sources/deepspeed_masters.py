"""Names for the nameless fp32 masters of ZeRO stage 0, found by their values.

Stage 0 keeps them in the model file under ``optimizer``: ``fp32_groups``, a list of tensors for each parameter group
(``runtime/fp16/unfused_optimizer.py``), or ``fp32_groups_flat``, one flat tensor for each (``fused_optimizer.py``).
Neither has names, and the order is that in which the optimizer was given the parameters, not the model's. A shape says
little: the layers of a model have the same ones. But each master rounds to the 16-bit weight that the model computed
with, which has its name in ``module``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

from shardmerge.dtypes import DType
from shardmerge.sources.deepspeed_ranks import tensors
from shardmerge.sources.deepspeed_values import Samples, is_dense, is_float, rounded_bytes, spread_places
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.torch_file import TorchFile
from shardmerge.tensors import Shape

# Elements of a tensor that are compared. Where several look the same, all of them are looked at again, closer.
_CLOSER = (64, 1024)
# A tensor of so many elements or fewer is compared whole.
_SMALL = 1024
# Looks for a parameter at a place of a flat group, most of them at two elements. n parameters in the model's order take
# n of them, in any other order n * n / 2.
_MOST_SEARCHED = 100_000


def has_masters(optimizer: Mapping[object, PickleValue]) -> bool:
    """Tells whether stage 0 saved fp32 masters."""
    return isinstance(optimizer.get("fp32_groups"), list) or isinstance(optimizer.get("fp32_groups_flat"), list)


def name_masters(
    file: TorchFile, optimizer: Mapping[object, PickleValue], module: Mapping[str, TensorRef]
) -> dict[str, TensorRef] | None:
    """Returns the masters by name, or ``None`` where values do not give every one of them exactly one name.

    Parameters
    ----------
    file
        The model file.
    optimizer
        What it holds under ``optimizer``.
    module
        Parameters by name, in the model's order, without buffers.
    """
    names = _without_aliases(file, module)
    if isinstance(optimizer.get("fp32_groups"), list):
        groups = _tensor_lists(optimizer["fp32_groups"])
        return _NameSearch(file, names).of_groups(groups) if groups else None
    flats = _tensor_lists([optimizer.get("fp32_groups_flat")])
    return _NameSearch(file, names).of_flats(flats[0]) if flats else None


def _tensor_lists(groups: PickleValue) -> list[tuple[TensorRef, ...]]:
    """Returns the groups, or nothing if one of them holds anything but fp32 tensors."""
    found = [tensors(group) for group in groups] if isinstance(groups, list) else []
    whole = [group for group in found if group is not None and all(ref.dtype.name == "F32" for ref in group)]
    return whole if len(whole) == len(found) else []


def _without_aliases(file: TorchFile, module: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Of several names for the same bytes, the first: tied weights have one master."""
    owners: dict[object, str] = {}
    for name, ref in module.items():
        if is_float(ref.dtype) and 0 not in ref.shape:
            owners.setdefault(file.alias_key(ref), name)
    return {name: module[name] for name in owners.values()}


@dataclass(frozen=True, slots=True)
class _Master:
    """A nameless tensor, with its parameter group and its place in it."""

    ref: TensorRef
    group: int
    place: int


@dataclass(slots=True)
class _Alike:
    """Names and masters that look the same so far."""

    names: list[str] = field(default_factory=list)
    masters: list[_Master] = field(default_factory=list)

    @property
    def decided(self) -> bool:
        return not self.masters or len(self.names) == len(self.masters) == 1


class _NameSearch:
    """The search for names in one file."""

    def __init__(self, file: TorchFile, module: Mapping[str, TensorRef]) -> None:
        self._file = file
        self._module = module
        self._order = {name: index for index, name in enumerate(module)}
        self._samples = Samples()

    def of_groups(self, groups: Sequence[Sequence[TensorRef]]) -> dict[str, TensorRef] | None:
        """Names whole tensors."""
        masters = [
            _Master(ref, number, place)
            for number, group in enumerate(groups)
            for place, ref in enumerate(group)
            if prod(ref.shape)
        ]
        alike = [_Alike(list(self._module), masters)]
        for closer in _CLOSER:
            alike = [part for many in alike for part in ([many] if many.decided else self._split(many, closer))]
        named: dict[str, _Master] = {}
        for many in alike:
            if many.masters and len(many.names) != len(many.masters):
                return None
            named.update(zip(many.names, many.masters, strict=bool(many.masters)))
        return self._checked(named, [many for many in alike if len(many.masters) > 1])

    def _split(self, many: _Alike, closer: int) -> Iterable[_Alike]:
        """Parts what looks alike by the values of ``closer`` elements; a master's, rounded to the 16-bit type."""
        found: dict[object, _Alike] = {}
        types: dict[Shape, dict[str, DType]] = {}
        for name in many.names:
            ref = self._module[name]
            types.setdefault(ref.shape, {})[ref.dtype.name] = ref.dtype
            found.setdefault(self._look(ref, ref.dtype, closer), _Alike()).names.append(name)
        for master in many.masters:
            looks = [self._look(master.ref, dtype, closer) for dtype in types.get(master.ref.shape, {}).values()]
            look = next((look for look in looks if look in found), None)
            found.setdefault(look, _Alike()).masters.append(master)
        return found.values()

    def _look(self, ref: TensorRef, dtype: DType, most: int) -> tuple[object, ...]:
        numel = prod(ref.shape)
        indices = spread_places(numel, most if numel > _SMALL else _SMALL)
        self._file.entry("masters", ref)  # raises where the bytes are not there
        values = self._samples.elements(self._file, ref, indices)
        return ref.shape, dtype.name, b"".join(rounded_bytes(value, dtype) for value in values)

    def _checked(self, named: Mapping[str, _Master], alike: Sequence[_Alike]) -> dict[str, TensorRef] | None:
        """Returns the names if they are sure.

        Tensors alike in 16 bits (norms that are all ones) were named in their order. That holds where the whole of
        their group stands in the model's order, which the tensors between them, known by their values, tell.
        """
        doubtful = {master.group for many in alike for master in many.masters}
        if any(len({master.group for master in many.masters}) > 1 for many in alike):
            return None
        for group in doubtful:
            mine = sorted((master.place, self._order[name]) for name, master in named.items() if master.group == group)
            if any(left[1] > right[1] for left, right in pairwise(mine)):
                return None
        return {name: master.ref for name, master in named.items()}

    def of_flats(self, flats: Sequence[TensorRef]) -> dict[str, TensorRef] | None:
        """Names the parts of flat groups."""
        named: dict[str, TensorRef] = {}
        for flat in flats:
            found = self._cut(flat, [name for name in self._module if name not in named])
            if found is None:
                return None
            named.update(found)
        return named

    def _cut(self, flat: TensorRef, names: list[str]) -> dict[str, TensorRef] | None:
        """Cuts a flat group where the next parameter's values begin: parameters in the model's order, or all unlike."""
        if len(flat.shape) != 1 or not is_dense(flat):
            return None
        found = self._walk(flat, names, unlike=False)
        order = [self._order[name] for name in found or ()]
        return found if order == sorted(order) else self._walk(flat, names, unlike=True)

    def _walk(self, flat: TensorRef, names: list[str], *, unlike: bool) -> dict[str, TensorRef] | None:
        """Takes the first parameter whose values come next, those after the last one first; or the only one."""
        found: dict[str, TensorRef] = {}
        budget = [_MOST_SEARCHED]
        start, last = 0, -1
        while start < flat.shape[0]:
            rest = [name for name in names if name not in found]
            here = self._here(flat, start, sorted(rest, key=lambda n: (self._order[n] < last, self._order[n])), budget)
            name = next(here, None)
            if name is None or (unlike and next(here, None) is not None) or budget[0] < 0:
                return None
            found[name] = self._part(flat, start, name)
            start, last = start + prod(self._module[name].shape), self._order[name]
        return found

    def _here(self, flat: TensorRef, start: int, names: list[str], budget: list[int]) -> Iterator[str]:
        """Yields the parameters whose values stand at an element of a flat group."""
        for name in names:
            ref = self._module[name]
            budget[0] -= 1
            if start + prod(ref.shape) <= flat.shape[0]:
                part = self._part(flat, start, name)
                if self._begins_alike(part, ref) and all(
                    self._look(part, ref.dtype, closer) == self._look(ref, ref.dtype, closer) for closer in _CLOSER
                ):
                    yield name

    def _begins_alike(self, part: TensorRef, ref: TensorRef) -> bool:
        mine, theirs = (self._samples.elements(self._file, tensor, [0])[0] for tensor in (part, ref))
        return rounded_bytes(mine, ref.dtype) == rounded_bytes(theirs, ref.dtype)

    def _part(self, flat: TensorRef, start: int, name: str) -> TensorRef:
        shape = self._module[name].shape
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return replace(flat, offset=flat.offset + start, shape=shape, strides=strides)
