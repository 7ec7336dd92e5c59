"""Standard normal numbers of random words, with the same bits on every machine.

Box-Muller in float64, by additions, multiplications, divisions and square roots alone: IEEE 754 says what those round
to. It does not say so of ``log`` and ``cos``: numpy takes code for the processor where it has some (AVX-512), and the
platform's C library where not, and they may differ in the last bits.
"""

from __future__ import annotations

from math import factorial, pi

import numpy as np

from shardmerge.ops.arrays import Array

# What `normals` takes for a number: shifted words, two uniforms, and the temporaries of a series.
NORMAL_BYTES = 88

_LN2 = 0.6931471805599453
_ROOT_HALF = 0.7071067811865476

# log x = 2 (s + s^3/3 + s^5/5 + ...), s = (x - 1) / (x + 1); |s| < 0.172 between the roots of 1/2 and 2.
_ATANH = tuple(1 / (2 * k + 1) for k in range(11))
# cos x and sin x / x, in powers of x^2, for |x| <= pi / 4.
_COS = tuple((-1) ** k / factorial(2 * k) for k in range(9))
_SIN = tuple((-1) ** k / factorial(2 * k + 1) for k in range(9))


def normals(words: Array) -> Array:
    """Returns one standard normal number for each pair of 64-bit words, as float64.

    The upper 53 bits of a word are a uniform number u below 1; a pair (u, v) makes ``sqrt(-2 log(1 - u)) cos(2 pi v)``.
    """
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * log(1 - uniform[0::2]))
    normal: Array = radius * cos_turns(uniform[1::2])
    return normal


def log(x: Array) -> Array:
    """Returns the natural logarithm of positive normal float64 numbers, to within three units in the last place."""
    mantissa, exponent = np.frexp(x)  # exact
    low = mantissa < _ROOT_HALF
    mantissa[low] *= 2
    s = (mantissa - 1) / (mantissa + 1)
    result: Array = (exponent - low) * _LN2 + 2 * s * _series(_ATANH, s * s)
    return result


def cos_turns(turns: Array) -> Array:
    """Returns the cosine of so many turns, from 0 to 1, within 4e-16."""
    eighths = 4 * turns
    quarter = np.floor(eighths + 0.5)
    x = (eighths - quarter) * (pi / 2)
    square = x * x
    even = quarter % 2 == 0
    size = np.where(even, _series(_COS, square), x * _series(_SIN, square))
    # cos(x + q pi/2): cos x, -sin x, -cos x, sin x.
    return np.where((quarter == 1) | (quarter == 2), -size, size)


def _series(factors: tuple[float, ...], x: Array) -> Array:
    """Returns ``factors[0] + factors[1] x + ...``, the last first."""
    total = np.full_like(x, factors[-1])
    for factor in reversed(factors[:-1]):
        total *= x
        total += factor
    return total
