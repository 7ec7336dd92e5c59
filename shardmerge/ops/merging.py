"""Merges of fine-tuned models with their base: task arithmetic, TIES, DARE.

A delta is a model less its base, in float32 (float64 where an input is), never stored. The semantics are those of
mergekit 0.1.5 (``merge_methods/generalized_task_arithmetic.py``, ``sparsify.py``) where not said otherwise. mergekit
computes in the type of the tensors unless told to widen them; here the one rounding comes last.

Nothing depends on how the tensor is cut: what is known of the whole is found in blocks of fixed size, random numbers
belong to the absolute position of an element, and the rest is one IEEE operation after the other.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array, numpy_dtype
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, State, Stream, result_dtype
from shardmerge.ops.params import integer
from shardmerge.ops.pointwise import (
    CALL_BYTES,
    OVERFLOW_BYTES,
    check_weights,
    count_overflows,
    infer_floats,
    number,
    numbers,
)
from shardmerge.ops.selection import BLOCK, Kept, blocks, keys, select, select_peak


class _Merge(Arithmetic):
    """A base and models, of one shape. Tiles are made block by block, so that temporaries stay small."""

    __slots__ = ()

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        check_weights(self.label, self.given, len(inputs) - 1)
        return infer_floats(self.label, inputs, least=2)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of six arrays of one block, of random numbers, and of masks."""
        each = 6 * result_dtype(inputs).itemsize + 8 + 2 * OVERFLOW_BYTES
        return min(count, BLOCK) * each + CALL_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from tiles as long as it, base first."""
        lost = 0
        with np.errstate(all="ignore"):
            for low in range(0, len(out), BLOCK):
                part = slice(low, low + BLOCK)
                inside = [tile[part] for tile in tiles]
                self._block(state, inside, start + low, out[part])
                lost += count_overflows(out[part], inside)
        return lost

    @property
    @abstractmethod
    def given(self) -> tuple[float, ...]:
        """The weights as written: none, or one a model."""

    @abstractmethod
    def _block(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> None:
        """Fills at most ``BLOCK`` elements."""


def _weights(given: tuple[float, ...], models: int) -> tuple[float, ...]:
    return given or (1.0,) * models


@dataclass(frozen=True, slots=True)
class TaskArithmetic(_Merge):
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

    def _block(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> None:
        del state, start
        base, *models = tiles
        wide = base.astype(out.dtype)
        out[...] = 0
        for model, weight in zip(models, _weights(self.given, len(models)), strict=True):
            np.add(out, _delta(wide, model, weight), out=out)
        np.add(wide, out, out=out)


@dataclass(frozen=True, slots=True)
class Ties(_Merge):
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
        """Returns the bytes of one block of all inputs, of its deltas, and of a histogram a model."""
        wide = result_dtype(inputs).itemsize
        block = sum(meta.dtype.itemsize for meta in inputs) + 3 * wide
        return BLOCK * block + select_peak(len(inputs) - 1) + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns what is kept of each delta: a threshold, and how far its equals are. Reads all inputs three times."""
        numel = prod(inputs[0].meta.shape)
        if self.density <= 0 or self.density >= 1 or not numel:
            return None
        kept = max(1, int(self.density * numel))
        return select(lambda wanted: _all_keys(inputs, wanted), len(inputs) - 1, kept, numel)

    def _block(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> None:
        base, *models = tiles
        if self.density <= 0:
            np.copyto(out, base, casting="unsafe")
            return
        wide = base.astype(out.dtype)
        weights = _weights(self.given, len(models))
        kept = state if isinstance(state, tuple) else (None,) * len(models)

        def delta(index: int) -> Array:
            return _trimmed(_delta(wide, models[index]), kept[index], start, weights[index])

        _agreed(delta, weights, out, normalize=True)
        np.multiply(out, out.dtype.type(self.scale), out=out)
        np.add(wide, out, out=out)


@dataclass(frozen=True, slots=True)
class Dare(_Merge):
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

    def _block(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> None:
        del state
        base, *models = tiles
        wide = base.astype(out.dtype)
        weights = _weights(self.given, len(models))

        def delta(index: int) -> Array:
            found = _delta(wide, models[index])
            np.multiply(found, self.mask(index, start, len(found)), out=found)
            np.divide(found, found.dtype.type(self.density), out=found)
            np.multiply(found, found.dtype.type(weights[index]), out=found)
            return found

        if self.sign_consensus:
            _agreed(delta, weights, out, normalize=False)
        else:
            out[...] = 0
            for index in range(len(models)):
                np.add(out, delta(index), out=out)
        np.add(wide, out, out=out)

    def mask(self, model: int, start: int, count: int) -> Array:
        """Returns which elements of a model's delta are kept, as booleans."""
        key = int.from_bytes(hashlib.sha256(f"{self.seed}:{self.salt}:{model}".encode()).digest()[:16], "little")
        skipped = start % 4
        words = np.random.Philox(key=key, counter=start // 4).random_raw(skipped + count)
        np.right_shift(words, np.uint64(11), out=words)
        mask: Array = words[skipped:] < np.uint64(self.density * (1 << 53))
        return mask


# --- deltas ---


def _delta(wide: Array, model: Array, weight: float = 1.0) -> Array:
    """Returns ``weight * (model - base)`` in the type of the widened base, in memory of its own."""
    found = model.astype(wide.dtype)
    np.subtract(found, wide, out=found)
    return found if weight == 1 else np.multiply(found, found.dtype.type(weight), out=found)


def _trimmed(delta: Array, kept: Kept | None, start: int, weight: float) -> Array:
    """Sets what is not kept to 0 and weighs the rest, in place. NaN stays NaN."""
    if kept is not None:
        np.multiply(delta, kept.mask(keys(delta), start), out=delta)
    np.multiply(delta, delta.dtype.type(weight), out=delta)
    return delta


def _agreed(delta: Callable[[int], Array], weights: Sequence[float], out: Array, *, normalize: bool) -> None:
    """Fills ``out`` with the sum of the weighted deltas of the elected sign; each is made twice rather than kept."""
    out[...] = 0
    for index in range(len(weights)):
        np.add(out, delta(index), out=out)
    positive = out >= 0
    out[...] = 0
    divisor = np.zeros_like(out)
    for index, weight in enumerate(weights):
        found = delta(index)
        agrees = np.where(positive, found > 0, found < 0)
        np.multiply(found, agrees, out=found)
        np.add(out, found, out=out)
        np.add(divisor, out.dtype.type(weight), out=divisor, where=agrees)
    if normalize:
        divisor[divisor == 0] = 1
        np.divide(out, divisor, out=out)


def _all_keys(inputs: Sequence[Stream], wanted: Collection[int]) -> Iterator[tuple[int, int, Array]]:
    """Yields the first index, the model's number and the keys of its delta, for every block and model wanted."""
    base, *models = inputs
    dtype = numpy_dtype(result_dtype([one.meta for one in inputs]))
    for start, count in blocks(prod(base.meta.shape)):
        wide = base.read(start, count).astype(dtype, copy=False)
        for index in sorted(wanted):
            with np.errstate(all="ignore"):
                found = keys(_delta(wide, models[index].read(start, count)))
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
