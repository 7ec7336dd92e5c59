"""Merges of fine-tuned models with their base: task arithmetic, TIES, DARE, Model Breadcrumbs, DELLA.

A delta is a model less its base, in float32 (float64 where an input is), never stored. The semantics are those of
mergekit 0.1.5 (``merge_methods/generalized_task_arithmetic.py``, ``sparsify.py``) where not said otherwise. mergekit
computes in the type of the tensors unless told to widen them; here the one rounding comes last.

Nothing depends on how the tensor is cut: what is known of the whole is found in blocks of fixed size, random numbers
belong to the absolute position of an element, and the rest is one IEEE operation after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, Stream, Typed
from shardmerge.ops.deltas import Room
from shardmerge.ops.random_masks import DRAWING_BYTES, below, uniforms
from shardmerge.ops.selection import Kept, kept, keys, select_peak
from shardmerge.ops.task_vectors import TaskVectors, Trimmed, keys_of, one_a_model, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic(TaskVectors):
    """``base + scale * sum(w_i * (model_i - base))`` (Ilharco et al., "Editing models with task arithmetic", 2023)."""

    @property
    def label(self) -> str:
        """``task arithmetic [0.5, 0.5]``."""
        return f"task arithmetic {_weighted(self)}"

    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        del state, model, delta, start, room
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties(TaskVectors):
    """Trim, elect sign, merge (Yadav et al., "TIES-Merging", 2023), as mergekit's ``ties``.

    Of each delta the ``max(1, floor(density * numel))`` largest by float32 magnitude are kept, the others are 0; among
    equal ones at the threshold those with the lowest row-major index (mergekit leaves that to an unstable sort). The
    sign of an element is that of the sum of the weighted deltas, + for 0. The weighted deltas of that sign are added
    up and divided by the sum of their weights (by 1 where that is 0), and ``scale`` times this is added to the base.

    Attributes
    ----------
    density
        From 0, nothing kept, to 1, everything; one for all, or one a model.
    """

    density: tuple[float, ...] = (1.0,)

    @property
    def label(self) -> str:
        """``ties density 0.5 [0.5, 0.5] scale 1.0``."""
        return f"ties density {shown(self.density)} {_weighted(self, always=True)}"

    def shares(self) -> dict[str, tuple[float, ...]]:
        """The density."""
        return {"density": self.density}

    def _counts(self, models: int, numel: int) -> list[int]:
        return [max(1, int(d * numel)) if d > 0 else 0 for d in one_a_model(self.density, models)]

    def _trimming_peak(self, inputs: Sequence[Meta]) -> int:
        return select_peak(len(inputs) - 1) if any(0 < density < 1 for density in self.density) else 0

    def _select(self, inputs: Sequence[Stream]) -> tuple[object, ...]:
        models, numel = len(inputs) - 1, prod(inputs[0].meta.shape)
        return kept(keys_of(inputs, range(models)), self._counts(models, numel), numel)

    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        return _largest(state.kept[model], delta, start, room)


@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs(TaskVectors):
    """Without the smallest and the largest changes (Davari and Belilovsky, "Model Breadcrumbs", 2023), as mergekit's.

    Of each delta the ``floor(gamma * numel)`` largest by magnitude are outliers and go, or fewer where otherwise less
    than ``floor(density * numel)`` would be left; of the others that many of the largest are kept.

    Attributes
    ----------
    density, gamma
        One for all, or one a model.
    """

    density: tuple[float, ...] = (1.0,)
    gamma: tuple[float, ...] = (0.01,)

    @property
    def label(self) -> str:
        """``breadcrumbs density 0.5 gamma 0.01 [0.5, 0.5]``; ``breadcrumbs ties`` with a consensus of signs."""
        return (
            f"{_named(self, 'breadcrumbs')} density {shown(self.density)} gamma {shown(self.gamma)} {_weighted(self)}"
        )

    def shares(self) -> dict[str, tuple[float, ...]]:
        """Density and gamma."""
        return {"density": self.density, "gamma": self.gamma}

    def _trimming_peak(self, inputs: Sequence[Meta]) -> int:
        return select_peak(2 * (len(inputs) - 1)) if any(density < 1 for density in self.density) else 0

    def _select(self, inputs: Sequence[Stream]) -> tuple[object, ...]:
        models, numel = len(inputs) - 1, prod(inputs[0].meta.shape)
        shares = zip(one_a_model(self.density, models), one_a_model(self.gamma, models), strict=True)
        above, outliers = zip(*(_band(density, gamma, numel) for density, gamma in shares), strict=True)
        stream = keys_of(inputs, [*range(models)] * 2)
        found = kept(stream, [*above, *outliers], numel)
        return tuple(zip(found[:models], found[models:], strict=True))

    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        found = state.kept[model]
        assert isinstance(found, tuple)
        above, outliers = found
        mask, outside = _largest(above, delta, start, room), _largest(outliers, delta, start, room)
        assert outside is not None
        if mask is None:
            return np.logical_not(outside, out=outside)
        return np.greater(mask, outside, out=mask)

    def _mask_bytes(self) -> int:
        return 1


def _band(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """Returns how many of the largest are kept or outliers, and how many outliers, as ``magnitude_outliers`` counts."""
    if density >= 1:
        return numel, 0
    wanted = int(density * numel)
    low = max(0, numel - wanted - int(gamma * numel))
    return numel - low, numel - low - wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Dare(TaskVectors):
    """Drop and rescale (Yu et al., "Language models are super Mario", 2024): mergekit's ``dare_linear``, ``dare_ties``.

    Every element of a delta is kept with probability ``density``. With ``rescale: density`` it is then divided by that,
    which keeps the expectation, as in the paper; with ``l1`` the delta gets its L1 norm back, as in mergekit. The
    weighted deltas are added to the base; with ``sign_consensus`` only those of the elected sign, as in TIES.

    Element p is kept where its number of ``random_masks`` is below ``density * 2**53``.

    Attributes
    ----------
    density
        Above 0, up to 1; one for all, or one a model.
    salt
        Makes the masks of two targets differ.
    """

    density: tuple[float, ...] = (1.0,)
    seed: int = 0
    salt: str = ""
    rescale: str = "density"

    @property
    def label(self) -> str:
        """``dare density 0.5 [0.5, 0.5] seed 0 salt 0f1e2d``; ``dare ties`` with a consensus of signs."""
        return f"{_named(self, 'dare')} density {shown(self.density)} {_weighted(self, 'density')} {_drawn(self)}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """The label without what is drawn anew for each tensor."""
        del inputs
        return self.label.rpartition(" salt ")[0]

    def shares(self) -> dict[str, tuple[float, ...]]:
        """The density."""
        return {"density": self.density}

    def _divisor(self, model: int) -> float:
        density = self.density[model if len(self.density) > 1 else 0]
        return density if self.rescale == "density" else 1.0

    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        del state, room
        density = self.density[model if len(self.density) > 1 else 0]
        return None if density >= 1 else self.mask(model, start, len(delta))

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers, its masks, and of random words."""
        return TaskVectors.peak(self, inputs, count) + DRAWING_BYTES

    def _trimming_peak(self, inputs: Sequence[Meta]) -> int:
        del inputs
        return DRAWING_BYTES if self.rescale == "l1" else 0

    def mask(self, model: int, start: int, count: int) -> Array:
        """Returns which elements of a model's delta are kept, as booleans."""
        mask = np.empty(count, np.bool_)
        limit = below(self.density[model if len(self.density) > 1 else 0])
        for done, numbers in uniforms(self.seed, self.salt, model, start, count):
            np.less(numbers, limit, out=mask[done : done + len(numbers)])
        return mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Della(TaskVectors):
    """Drop by magnitude, and rescale (Deep et al., "DELLA-Merging", 2024): mergekit's ``della``, ``della_linear``.

    In each row (axis 1; a vector is one row) the elements of a delta are ranked by magnitude. The smallest is kept with
    probability ``density - epsilon``, the largest with ``density + epsilon``, those between in equal steps; the only
    one of a row with ``density``. With ``rescale: l1`` the delta gets its L1 norm back, as in mergekit (the paper
    divides each element by its own probability). Equal magnitudes rank by their place.

    Attributes
    ----------
    density, epsilon
        One for all, or one a model.
    salt
        Makes the masks of two targets differ.
    """

    density: tuple[float, ...] = (1.0,)
    epsilon: tuple[float, ...] = (0.15,)
    seed: int = 0
    salt: str = ""
    rescale: str = "l1"

    @property
    def label(self) -> str:
        """``della density 0.5 epsilon 0.15 [0.5, 0.5] seed 0 salt 0f1e2d``; ``della linear`` without consensus."""
        word = "della" if self.sign_consensus else "della linear"
        shares = f"density {shown(self.density)} epsilon {shown(self.epsilon)}"
        return f"{word} {shares} {_weighted(self, 'l1')} {_drawn(self)}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """The label without what is drawn anew for each tensor."""
        del inputs
        return self.label.rpartition(" salt ")[0]

    def shares(self) -> dict[str, tuple[float, ...]]:
        """Density and epsilon."""
        return {"density": self.density, "epsilon": self.epsilon}

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns the elements that are ranked together, along axis 1 and all behind it."""
        shape = inputs[0].shape
        return max(prod(shape[1:]) if len(shape) > 1 else prod(shape), 1)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part's buffers, its masks, of ranks, and of random words."""
        return TaskVectors.peak(self, inputs, count) + DRAWING_BYTES

    def _trimming_peak(self, inputs: Sequence[Meta]) -> int:
        del inputs
        return DRAWING_BYTES if self.rescale == "l1" else 0

    def _mask_bytes(self) -> int:
        return _RANKING_BYTES

    def _select(self, inputs: Sequence[Stream]) -> tuple[object, ...]:
        """The shape of a row: tiles do not say."""
        shape = inputs[0].meta.shape
        across = shape[1] if len(shape) > 1 else prod(shape)
        return (across,) * (len(inputs) - 1)

    def _mask(self, state: Trimmed, model: int, delta: Array, start: int, room: Room) -> Array | None:
        density, epsilon = (one[model if len(one) > 1 else 0] for one in (self.density, self.epsilon))
        across = state.kept[model]
        assert isinstance(across, int)
        if density >= 1:
            return None
        mask = np.zeros(len(delta), np.bool_)
        if density <= 0:
            return mask
        sizes = np.abs(delta, out=room.term).reshape(-1, across, state.row // across)
        order = np.argsort(sizes, axis=1, kind="stable")
        chances = np.empty(sizes.shape)
        step = 2 * epsilon / (across - 1) if across > 1 else 0.0
        ranked = (density - epsilon if across > 1 else density) + step * np.arange(across)
        np.put_along_axis(chances, order, ranked[None, :, None], axis=1)
        limits = np.multiply(chances, float(1 << 53), out=chances).reshape(-1)
        for done, numbers in uniforms(self.seed, self.salt, model, start, len(delta)):
            np.less(numbers, limits[done : done + len(numbers)], out=mask[done : done + len(numbers)])
        return mask


# Bytes an element of `Della._mask`: the order and what sorting and `put_along_axis` keep of it, and the probabilities.
_RANKING_BYTES = 8 + 8 + 8 + 8 + 8


def _largest(found: object, delta: Array, start: int, room: Room) -> Array | None:
    if found is None:
        return None
    assert isinstance(found, Kept)
    return found.mask(keys(delta, room.key), start)


# --- how the plan calls them ---


def _named(op: TaskVectors, word: str) -> str:
    return f"{word} ties" if op.sign_consensus else word


def _weighted(op: TaskVectors, rescale: str = "none", *, always: bool = False) -> str:
    """Returns the weights, and whatever is not the usual."""
    words = [str(list(op.given) or 1)]
    words += [f"scale {op.scale}"] if always or op.scale != 1 else []
    words += ["normalized"] if op.normalize and not isinstance(op, Ties) else []
    words += ["not normalized"] if isinstance(op, Ties) and not op.normalize else []
    words += [f"rescale {op.rescale}"] if op.rescale != rescale else []
    return " ".join(words)


def _drawn(op: Dare | Della) -> str:
    return f"seed {op.seed} salt {op.salt}"
