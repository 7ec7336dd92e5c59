"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MIB = 1 << 20


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yields what ``suite.bench`` found, line by line; ``Any`` is JSON."""
    card = found["machine"]
    yield f"shardmerge {found['shardmerge']}, {found['rounds']} rounds, warm page cache"
    yield f"{card['cpu']}, {card['cores']} cores, {card['memory_gib']} GiB, {card['file_system']}"
    yield f"Linux {card['kernel']}, Python {card['python']}, numpy {card['numpy']}, ml_dtypes {card['ml_dtypes']}"
    for job in found["jobs"]:
        yield ""
        yield f"{job['title']}: {job['bytes_read'] / 1e9:.2f} GB in, {job['bytes_written'] / 1e9:.2f} GB out"
        yield f"  {'':32} {'seconds':>22} {'GB/s out':>9} {'x floor':>8} {'peak MiB':>9}"
        for contender in job["contenders"]:
            yield _line(contender)
    yield ""
    yield "Seconds: median (smallest to largest). GB/s: bytes written, by the median. Ratios: medians, round by round."
    yield "A floor is what `dd` needs to read the input and write as many bytes as the output has."


def _line(contender: Mapping[str, Any]) -> str:
    wall = contender["wall"]
    seconds = f"{wall['median']:.2f} ({wall['min']:.2f} to {wall['max']:.2f})"
    floor = contender["key"].startswith("floor")
    ratio = "" if floor else f"{contender['to_floor']['median']:.2f}"
    peak = "" if floor else f"{contender['peak'] / _MIB:.0f}"
    return f"  {contender['title']:32} {seconds:>22} {contender['gb_per_s']:>9.2f} {ratio:>8} {peak:>9}"
