"""Random numbers that belong to the absolute place of an element, by a counter; nothing depends on how it is cut.

Element p of a model has word ``p % 4`` of Philox4x64-10 at counter ``p // 4``, shifted right by 11, a uniform number of
53 bits; the key is the first 16 bytes of SHA-256 of ``seed:salt:model``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from shardmerge.ops.arrays import Array

# Random words drawn at a time, 64 KiB: numpy draws into new memory only.
WORDS = 8 << 10
# What drawing allocates: words, twice.
DRAWING_BYTES = 16 * WORDS


def uniforms(seed: int, salt: str, model: int, start: int, count: int) -> Iterator[tuple[int, Array]]:
    """Yields place and 53-bit numbers, uint64, of elements ``[start, start + count)``, in blocks."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{salt}:{model}".encode()).digest()[:16], "little")
    generator, skipped = np.random.Philox(key=key, counter=start // 4), start % 4
    done = 0
    while done < count:
        words = generator.random_raw(skipped + min(WORDS, count - done))[skipped:]
        np.right_shift(words, np.uint64(11), out=words)
        yield done, words
        done, skipped = done + len(words), 0


def below(probability: float) -> np.uint64:
    """Returns what a 53-bit number is below with this probability."""
    return np.uint64(probability * (1 << 53))
