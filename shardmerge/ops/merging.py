"""Merges of fine-tuned models with their base: task arithmetic, TIES, DARE.

A delta is a model less its base, in float32 (float64 where an input is), never stored. The semantics are those of
mergekit 0.1.5 (``merge_methods/generalized_task_arithmetic.py``, ``sparsify.py``) where not said otherwise. mergekit
computes in the type of the tensors unless told to widen them; here the one rounding comes last.

Nothing depends on how the tensor is cut: what is known of the whole is found in blocks of fixed size, random numbers
belong to the absolute position of an element, and the rest is one IEEE operation after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Meta, OpKind, Param, ParamValue, State, Stream, result_dtype
from shardmerge.ops.deltas import Merge, Room, add_agreeing, room_bytes, weights_of
from shardmerge.ops.params import integer
from shardmerge.ops.parts import CALL_BYTES, PART, parts
from shardmerge.ops.pointwise import number, numbers
from shardmerge.ops.selection import Kept, keys, select, select_peak


@dataclass(frozen=True, slots=True)
class TaskArithmetic(Merge):
    """``base + sum(w_i * (model_i - base))`` (Ilharco et al., "Editing models with task arithmetic", 2023).

    Attributes
    ----------
    given
        One weight a model, or none for 1 each. Not normalised.
    """

    given: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """``task arithmetic [0.5, 0.5]``."""
        return f"task arithmetic {list(self.given) or 1}"

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        del state, start
        out[...] = 0
        for model, weight in zip(models, weights_of(self.given, len(models)), strict=True):
            np.add(out, room.less_base(model, weight), out=out)
        np.add(room.base, out, out=out)


@dataclass(frozen=True, slots=True)
class Ties(Merge):
    """Trim, elect sign, merge (Yadav et al., "TIES-Merging", 2023), as mergekit's ``ties``.

    Of each delta the ``max(1, floor(density * numel))`` largest by float32 magnitude are kept, the others are 0; among
    equal ones at the threshold those with the lowest row-major index (mergekit leaves that to an unstable sort). The
    sign of an element is that of the sum of the weighted deltas, + for 0. The weighted deltas of that sign are added
    up and divided by the sum of their weights (by 1 where that is 0), and ``scale`` times this is added to the base.

    Attributes
    ----------
    density
        From 0, nothing kept, to 1, everything.
    given
        One weight a model, or none for 1 each.
    scale
        ``lambda`` in the paper and in mergekit.
    """

    density: float
    given: tuple[float, ...] = ()
    scale: float = 1.0

    @property
    def label(self) -> str:
        """``ties density 0.5 [0.5, 0.5] scale 1.0``."""
        return f"ties density {self.density} {list(self.given) or 1} scale {self.scale}"

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """Returns the bytes of one part of all inputs, of its buffers, and of a histogram a model."""
        part = sum(meta.dtype.itemsize for meta in inputs) + room_bytes(inputs)
        return PART * part + select_peak(len(inputs) - 1) + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what is kept of each delta: a threshold, and how far its equals are. Reads all inputs three times."""
        numel = prod(inputs[0].meta.shape)
        if self.density <= 0 or self.density >= 1 or not numel:
            return None
        kept = max(1, int(self.density * numel))
        return select(lambda wanted: _all_keys(inputs, wanted), len(inputs) - 1, kept, numel)

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        if self.density <= 0:
            np.copyto(out, room.base)
            return
        weights = weights_of(self.given, len(models))
        every: tuple[Kept | None, ...] = state if isinstance(state, tuple) else (None,) * len(models)

        def delta(index: int) -> Array:
            found, kept = room.less_base(models[index]), every[index]
            if kept is not None:
                np.multiply(found, kept.mask(keys(found, room.key), start), out=found)  # NaN stays NaN
            np.multiply(found, found.dtype.type(weights[index]), out=found)
            return found

        add_agreeing(delta, weights, out, room, normalize=True)
        np.multiply(out, out.dtype.type(self.scale), out=out)
        np.add(room.base, out, out=out)


@dataclass(frozen=True, slots=True)
class Dare(Merge):
    """Drop and rescale (Yu et al., "Language models are super Mario", 2024): mergekit's ``dare_linear``, ``dare_ties``.

    Every element of a delta is kept with probability ``density``, and then divided by it, which keeps the expectation
    (mergekit rescales to the L1 norm of the whole delta instead). The weighted deltas are added to the base; with
    ``sign_consensus`` only those of the elected sign, as in TIES. No normalisation, as in mergekit.

    Element p is kept where word ``p % 4`` of Philox4x64-10 at counter ``p // 4``, shifted right by 11, is below
    ``density * 2**53``; the key is the first 16 bytes of SHA-256 of ``seed:salt:model``.

    Attributes
    ----------
    density
        Above 0, up to 1.
    given
        One weight a model, or none for 1 each.
    salt
        Makes the masks of two targets differ.
    """

    density: float
    given: tuple[float, ...] = ()
    seed: int = 0
    sign_consensus: bool = False
    salt: str = ""

    @property
    def label(self) -> str:
        """``dare density 0.5 [0.5, 0.5] seed 0 salt 0f1e2d``; ``dare ties`` with a consensus of signs."""
        word = "dare ties" if self.sign_consensus else "dare"
        return f"{word} density {self.density} {list(self.given) or 1} seed {self.seed} salt {self.salt}"

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers, of its masks, one a model, and of random words, twice."""
        return Merge.peak(self, inputs, count) + min(count, PART) * len(inputs) + 16 * _WORDS

    def _part(self, state: State, room: Room, models: Sequence[Array], start: int, out: Array) -> None:
        del state
        weights = weights_of(self.given, len(models))
        masks = [self.mask(model, start, len(out)) for model in range(len(models))]  # a delta may be asked for twice

        def delta(index: int) -> Array:
            found = room.less_base(models[index])
            np.multiply(found, masks[index], out=found)
            np.divide(found, found.dtype.type(self.density), out=found)
            np.multiply(found, found.dtype.type(weights[index]), out=found)
            return found

        if self.sign_consensus:
            add_agreeing(delta, weights, out, room, normalize=False)
        else:
            out[...] = 0
            for index in range(len(models)):
                np.add(out, delta(index), out=out)
        np.add(room.base, out, out=out)

    def mask(self, model: int, start: int, count: int) -> Array:
        """Returns which elements of a model's delta are kept, as booleans."""
        key = int.from_bytes(hashlib.sha256(f"{self.seed}:{self.salt}:{model}".encode()).digest()[:16], "little")
        generator, skipped = np.random.Philox(key=key, counter=start // 4), start % 4
        mask, done = np.empty(count, np.bool_), 0
        while done < count:
            words = generator.random_raw(skipped + min(_WORDS, count - done))[skipped:]
            np.right_shift(words, np.uint64(11), out=words)
            np.less(words, np.uint64(self.density * (1 << 53)), out=mask[done : done + len(words)])
            done, skipped = done + len(words), 0
        return mask


# Random words drawn at a time, 64 KiB: numpy draws into new memory only.
_WORDS = 8 << 10


def _all_keys(inputs: Sequence[Stream], wanted: Collection[int]) -> Iterator[tuple[int, int, Array]]:
    """Yields the first index, the model's number and the keys of its delta, for every part and model wanted."""
    base, *models = inputs
    numel = prod(base.meta.shape)
    whole = Room.of(numel, numpy_dtype(result_dtype([one.meta for one in inputs])))
    for part in parts(numel):
        start, count = part.start, part.stop - part.start
        room = whole.cut(base.read(start, count))
        for index in sorted(wanted):
            with np.errstate(all="ignore"):
                found = keys(room.less_base(models[index].read(start, count)), room.key)
            yield start, index, found


# --- parameters ---


def _density(values: Mapping[str, ParamValue], *, zero: bool) -> float:
    density = number(values, "density")
    if not 0 <= density <= 1 or (density == 0 and not zero):
        raise MappingError("op-value", f"`density` is {density}", expected=f"{'' if zero else 'above 0, '}from 0 to 1")
    return density


def _dare(values: Mapping[str, ParamValue]) -> Dare:
    return Dare(
        _density(values, zero=False),
        numbers(values, "weights"),
        integer(values, "seed"),
        bool(values["sign_consensus"]),
        str(values["salt"]),
    )


_WEIGHTS = Param("weights", "numbers", "One a model of `of`. 1 each where absent.", optional=True)
_LOSSY = "the models of a merge are not known"

KINDS = (
    OpKind(
        name="task_arithmetic",
        about="Adds what several models learned to their base: `base + sum(w * (model - base))`, in float32 (Ilharco "
        "et al., 2023). The weights are not normalised.",
        example='x.weight: {op: task_arithmetic, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], '
        "weights: [0.5, 0.5]}",
        params=(_WEIGHTS,),
        build=lambda values: TaskArithmetic(numbers(values, "weights")),
        terms=("base",),
        many=True,
        lossy=_LOSSY,
    ),
    OpKind(
        name="ties",
        about="TIES merging (Yadav et al., 2023): keeps the largest part of every delta, elects a sign for every "
        "element, and averages the deltas of that sign. As in mergekit, weights are normalised per element. The "
        "number kept is exact; among equal magnitudes the lowest index is kept.",
        example='x.weight: {op: ties, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], density: 0.5}',
        params=(
            Param("density", "number", "The part of each delta that is kept, from 0 to 1."),
            _WEIGHTS,
            Param("scale", "number", "What the merged delta is multiplied with.", 1),
        ),
        build=lambda values: Ties(_density(values, zero=True), numbers(values, "weights"), number(values, "scale")),
        terms=("base",),
        many=True,
        lossy=_LOSSY,
    ),
    OpKind(
        name="dare",
        about="DARE merging (Yu et al., 2024): keeps a random part of every delta and divides it by `density`. The "
        "numbers depend on `seed`, the target's name and the place in the tensor, and on nothing else. With "
        "`sign_consensus` only deltas of the elected sign are added (mergekit's `dare_ties`).",
        example='x.weight: {op: dare, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], density: 0.5}',
        params=(
            Param("density", "number", "The probability that an element is kept, above 0, up to 1."),
            _WEIGHTS,
            Param("seed", "int", "Another seed gives other random numbers.", 0),
            Param("sign_consensus", "flag", "Whether signs are elected as in TIES.", default=False),
        ),
        build=_dare,
        terms=("base",),
        many=True,
        lossy=_LOSSY,
    ),
)
