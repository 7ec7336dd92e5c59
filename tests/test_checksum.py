"""The checksum of tiles: that of zlib, from whatever library, and whole from its parts."""

from __future__ import annotations

import subprocess
import sys
import zlib
from itertools import pairwise

import numpy as np
import pytest

from shardmerge.execute.checksum import combine, crc32

DATA = np.random.default_rng(0).bytes(3 << 20)


@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 63, 64, 255, 4097, 3 << 20])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_it_is_that_of_zlib(size: int, offset: int) -> None:
    data = memoryview(DATA)[offset : offset + size]
    assert crc32(data) == zlib.crc32(data)
    assert crc32(bytearray(data), 0xDEADBEEF) == zlib.crc32(data, 0xDEADBEEF)


def test_it_is_that_of_zlib_without_the_library() -> None:
    code = (
        "import sys; sys.modules['zlib_ng'] = None\n"
        "from shardmerge.execute.checksum import crc32\n"
        "print(crc32(b'123456789'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0xCBF43926  # the check value of CRC-32/ISO-HDLC in the catalogue of CRCs


def test_parts_in_any_order_make_the_whole() -> None:
    bounds = [0, 1, 4096, 1 << 20, len(DATA)]
    total = 0
    for low, high in pairwise(bounds):
        total = combine(total, crc32(DATA[low:high]), high - low)
    assert total == zlib.crc32(DATA)
