"""Softmax and the distance of two of them, with the same bits on every machine.

numpy takes ``exp`` from code for the processor where it has some, and they may differ in the last bits; this one is
made of additions, multiplications and shifts of the exponent, as ``normals.log`` is.
"""

from __future__ import annotations

from math import factorial

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.normals import log

# ln 2 in two parts: a product of the first with a small whole number is exact.
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
_EXP = tuple(1 / factorial(k) for k in range(14))

# Bytes an element that `divergences` allocates: both tables of probabilities, what makes them, and logarithms.
SOFTMAX_BYTES = 120


def exp(x: Array) -> Array:
    """Returns e**x for float64 numbers up to 0, within two units in the last place; 0 below -745."""
    clipped = np.maximum(x, -746.0)
    turns = np.rint(clipped * 1.4426950408889634)
    rest = clipped - turns * _LN2_HIGH
    rest -= turns * _LN2_LOW
    total = np.full_like(rest, _EXP[-1])
    for factor in reversed(_EXP[:-1]):
        total *= rest
        total += factor
    turns[np.isnan(turns)] = 0
    made: Array = np.ldexp(total, turns.astype(np.int32))
    return made


def softmax(rows: Array) -> Array:
    """Returns the softmax of each row."""
    made = exp(rows - rows.max(axis=1, keepdims=True))
    made /= made.sum(axis=1, keepdims=True)
    return made


def divergences(rows: Array, base: Array, epsilon: float) -> Array:
    """Returns the Kullback-Leibler divergence of softmax(rows) from softmax(base), both plus epsilon, of every row."""
    p, q = softmax(rows) + epsilon, softmax(base) + epsilon
    np.divide(p, q, out=q)
    made: Array = np.multiply(p, log(q), out=p).sum(axis=1)
    return made
