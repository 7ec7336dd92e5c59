"""Means and ways on a sphere, with the semantics of mergekit 0.1.5: slerp, nuslerp, multislerp, karcher.

Roots, sines and arc cosines of single numbers are those of the platform's C library, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import acos, cos, sin

import numpy as np

from shardmerge.errors import CheckpointError, MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Meta, OpKind, Param, ParamValue
from shardmerge.ops.params import positive
from shardmerge.ops.pointwise import check_weights, number, numbers
from shardmerge.ops.shapes import odd_shape
from shardmerge.ops.spanned import Factors, Gram, Spanned

# The cosine above which two tensors count as parallel, and the norm below which one has no direction: mergekit's.
_PARALLEL, _NO_NORM = 0.9995, 1e-8
# nuslerp's: the smallest norm that a vector is divided by, and the sine below which two are parallel.
_LEAST_NORM, _LEAST_SINE = 1e-7, 1e-8
# multislerp's ``eps``.
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Slerp(Spanned):
    """From one tensor to the other along the great circle (Shoemake, 1985), as mergekit's ``slerp``.

    The angle is that between the whole tensors as vectors. Where the cosine is above 0.9995 or below -0.9995 the result
    is linear. A tensor of norm below 1e-8 counts as one of norm 1.

    Attributes
    ----------
    t
        0 is the first tensor, 1 the second.
    """

    t: float

    @property
    def label(self) -> str:
        """``slerp 0.5``."""
        return f"slerp {self.t}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        _check_two(self.label, len(inputs))
        return Spanned.infer(self, inputs)

    def factors(self, gram: Gram) -> Factors:
        """Returns the two factors."""
        norms = np.sqrt(_squares(gram))
        norms[~(norms > _NO_NORM)] = 1
        cosine = gram[0, 1] / norms[0] / norms[1]
        # NaN: one of the tensors has one, and so has the result.
        return _on_the_circle(self.t, cosine, linear=~(np.abs(cosine) <= _PARALLEL))


@dataclass(frozen=True, slots=True)
class NuSlerp(Spanned):
    """Spherical interpolation of whole tensors, rows or columns, or of deltas from a base: mergekit's ``nuslerp``.

    ``t`` is the share of the second weight. Vectors are taken for parallel only where their angle is 0 in float64.
    """

    given: tuple[float, ...]
    along: str = "whole"
    from_base: bool = False

    @property
    def label(self) -> str:
        """``nuslerp [0.5, 0.5]``, ``nuslerp [0.5, 0.5] rows from base``."""
        words = [f"nuslerp {list(self.given) or 1}", *([self.along] if self.along != "whole" else [])]
        return " ".join([*words, *(["from base"] if self.from_base else [])])

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        _check_two(self.label, len(inputs) - self.from_base)
        check_weights(self.label, self.given, 2)
        return Spanned.infer(self, inputs)

    def factors(self, gram: Gram) -> Factors:
        """Returns the factors of both, for every pair of vectors."""
        first, second = self.given or (1.0, 1.0)
        t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
        norms = np.maximum(np.sqrt(_squares(gram)), _LEAST_NORM)
        cosine = np.clip(gram[0, 1] / norms[0] / norms[1], -1, 1)
        return _on_the_circle(t, cosine, linear=~(1 - cosine * cosine > _LEAST_SINE**2))


def _on_the_circle(t: float, cosine: Array, linear: Array) -> Factors:
    """Returns both factors for every cosine; those of a straight line where that is asked for."""
    angle = _each(acos, np.where(linear, 0, cosine))
    sine = _each(sin, angle)
    first = np.where(linear, 1 - t, _each(sin, (1 - t) * angle) / sine)
    second = np.where(linear, t, _each(sin, t * angle) / sine)
    return np.stack([first, second])


@dataclass(frozen=True, slots=True)
class MultiSlerp(Spanned):
    """The weighted mean of the directions, as long as the weighted mean of the lengths: mergekit's ``multislerp``.

    mergekit projects the vectors onto the tangent space at the mean of their directions, adds them up there and goes
    back; that sum is zero by the choice of the mean, so nothing of it is left but rounding.

    Attributes
    ----------
    normalize
        Whether weights are divided by their sum.
    """

    given: tuple[float, ...] = ()
    normalize: bool = True
    from_base: bool = False

    @property
    def label(self) -> str:
        """``multislerp [0.5, 0.5]``."""
        words = [f"multislerp {list(self.given) or 1}", *([] if self.normalize else ["not normalized"])]
        return " ".join([*words, *(["from base"] if self.from_base else [])])

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        check_weights(self.label, self.given, len(inputs) - self.from_base)
        if self.normalize and self.given and not sum(self.given):
            what = f"{self.label}: weights that add up to 0 cannot be divided by their sum"
            raise MappingError("op-value", what, expected="a sum that is not 0, or `normalize: false`")
        return Spanned.infer(self, inputs)

    def factors(self, gram: Gram) -> Factors:
        """Returns the factors of all.

        Raises
        ------
        CheckpointError
            ``no-mean``: the directions add up to nothing.
        """
        count = len(gram)
        weights = np.array(self.given or (1.0,) * count)
        if count == 1:
            return np.ones((1, 1))
        weights = weights / weights.sum() if self.normalize else weights
        norms = np.sqrt(_squares(gram))[:, 0]
        shares = weights / (norms + _EPSILON)
        length = float(np.sqrt(max(_quadratic(gram[:, :, 0], shares), 0.0)))
        if length < _EPSILON:
            if count == 2:
                return weights[:, None].copy()
            raise CheckpointError(
                "no-mean",
                "the weighted directions of the tensors add up to zero, so they have no mean",
                found=f"weights {weights.tolist()}",
                expected="a sum that is not zero",
                hint="use other weights, or `op: linear`, which has no directions",
            )
        mean = float(np.sum(norms * weights))
        return (shares / length * (mean * cos(_EPSILON)))[:, None]


@dataclass(frozen=True, slots=True)
class Karcher(Spanned):
    """The Karcher mean of the directions, by gradient steps on the sphere, as long as the mean of the lengths.

    mergekit's ``karcher``: equal shares, from their normalised mean on, up to ``max_iter`` steps, until a step is
    shorter than ``tol``. Inputs of norm up to ``tol`` have no direction.
    """

    max_iter: int = 10
    tol: float = 1e-5

    @property
    def label(self) -> str:
        """``karcher 10 1e-05``."""
        return f"karcher {self.max_iter} {self.tol}"

    def factors(self, gram: Gram) -> Factors:
        """Returns the factors of all."""
        count, norms = len(gram), np.sqrt(_squares(gram))[:, 0]
        found = np.zeros(count)
        valid = norms > self.tol
        if count == 1 or np.isnan(norms).any():
            return np.full((count, 1), 1.0 if count == 1 else np.nan)
        if valid.any():
            units = gram[valid][:, valid, 0] / norms[valid][:, None] / norms[valid]
            found[valid] = self._mean(units) / norms[valid]
        return (found * float(np.sum(norms / count)))[:, None]

    def _mean(self, units: Array) -> Array:
        """Returns the mean as factors of unit vectors, from their cosines."""
        share = 1 / len(units)
        mean = np.full(len(units), share)
        length = _length(units, mean)
        mean = mean / length if length >= self.tol else np.eye(len(units))[0]
        for _ in range(self.max_iter):
            tangent = np.zeros(len(units))
            for index in range(len(units)):
                dot = min(max(float(np.sum(units[index] * mean)), -1.0), 1.0)
                angle = acos(dot)
                if angle >= self.tol:
                    step = np.eye(len(units))[index] - dot * mean
                    tangent += share * (angle / sin(angle)) * step
            size = _length(units, tangent)
            if size < self.tol:
                break
            mean = cos(size) * mean + sin(size) * (tangent / size)
            length = _length(units, mean)
            mean = mean / length if length > self.tol else mean
        return mean


def _length(gram: Array, shares: Array) -> float:
    """Returns the length of a sum of vectors with these scalar products."""
    return float(np.sqrt(max(_quadratic(gram, shares), 0.0)))


def _quadratic(gram: Array, shares: Array) -> float:
    return float(np.sum(gram * shares[:, None] * shares))


def _squares(gram: Gram) -> Array:
    """Returns the squared lengths, [n, vectors]."""
    return np.stack([gram[index, index] for index in range(len(gram))])


def _each(function: Callable[[float], float], values: Array) -> Array:
    """Returns a function of ``math`` of each number: numpy's own differ from processor to processor in the last bit."""
    return np.array([function(value) for value in values.tolist()])


def _check_two(label: str, count: int) -> None:
    if count != 2:
        raise odd_shape(f"{label}: between how many tensors?", count, "2 tensors")


# --- parameters ---

_Values = Mapping[str, ParamValue]
_LOSSY = "the tensors of a merge are not known"
_BASE = "base"


def _has_base(values: _Values) -> bool:
    return bool(values.get(_BASE, False))


KINDS = (
    OpKind(
        name="slerp",
        about="Spherical interpolation between two tensors, linear if they are almost parallel.",
        example='x.weight: {op: slerp, of: ["src:a.weight", "src:b.weight"], t: 0.3}',
        params=(Param("t", "number", "0 is the first tensor, 1 the second."),),
        build=lambda values: Slerp(number(values, "t")),
        many=True,
        lossy="the two tensors are not known",
    ),
    OpKind(
        name="nuslerp",
        about="Spherical interpolation between two tensors with one weight each, of whole tensors, rows or columns. "
        "With a `base`, interpolates the differences from it. mergekit's `nuslerp`.",
        example='x.weight: {op: nuslerp, of: ["src:a.weight", "src:b.weight"], weights: [0.75, 0.25]}',
        params=(
            Param("weights", "numbers", "One per tensor. Default: 1 each.", optional=True),
            Param(
                "along", "text", "The vectors: the `whole` tensor, its `rows` (last axis) or `columns` (first).",
                "whole", choices=("whole", "rows", "columns"),
            ),
        ),
        build=lambda values: NuSlerp(numbers(values, "weights"), str(values["along"]), _has_base(values)),
        optional_terms=(_BASE,),
        many=True,
        lossy=_LOSSY,
    ),
    OpKind(
        name="multislerp",
        about="The weighted mean of the directions of several tensors, with the weighted mean of their norms. With a "
        "`base`, averages the differences from it. mergekit's `multislerp`.",
        example='x.weight: {op: multislerp, of: ["src:a.weight", "src:b.weight"], weights: [0.75, 0.25]}',
        params=(
            Param("weights", "numbers", "One per tensor. Default: 1 each.", optional=True),
            Param("normalize", "flag", "Whether the weights are divided by their sum.", default=True),
        ),
        build=lambda values: MultiSlerp(numbers(values, "weights"), bool(values["normalize"]), _has_base(values)),
        optional_terms=(_BASE,),
        many=True,
        lossy=_LOSSY,
    ),
    OpKind(
        name="karcher",
        about="The Karcher mean: the direction on the sphere that is closest to those of all tensors, with the mean of "
        "their norms. mergekit's `karcher`.",
        example='x.weight: {op: karcher, of: ["src:a.weight", "src:b.weight"]}',
        params=(
            Param("max_iter", "int", "The maximum number of steps.", 10),
            Param("tol", "number", "The norm below which a step or a tensor counts as zero.", 1e-5),
        ),
        build=lambda values: Karcher(positive(values, "max_iter")[0], number(values, "tol")),
        many=True,
        lossy=_LOSSY,
    ),
)  # fmt: skip
