"""The floor: what any program would have to do, done by `dd` and `cp`.

Only the bytes of the tensors are read, range by range: the moments of a ZeRO checkpoint are nobody's business.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import shardmerge
from benchmarks.contender import Contender
from shardmerge.tensors import Extent, Strided


def needed(sources: Iterable[Path]) -> list[Extent]:
    """Returns the ranges of files that hold the tensors of some checkpoints, joined where they touch."""
    extents = chain.from_iterable(map(_extents, sources))
    ranges: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.file, extent.offset)):
        last = ranges[-1] if ranges else None
        if last and last.file == extent.file and extent.offset <= last.offset + last.nbytes:
            end = max(last.offset + last.nbytes, extent.offset + extent.nbytes)
            ranges[-1] = Extent(last.file, last.offset, end - last.offset)
        else:
            ranges.append(extent)
    return ranges


def _extents(source: Path) -> Iterator[Extent]:
    for entry in shardmerge.inspect(source).entries.values():
        for piece in entry.pieces:
            held = piece.held
            if isinstance(held, Strided):
                yield held.extent
            elif isinstance(held, Extent):
                yield held
            else:
                raise TypeError(f"{entry.name} is computed; a checkpoint holds bytes")


def floors(ranges: list[Extent], reference: Path, script: Path, *, casts: bool) -> list[Contender]:
    """Returns the floor with and without waiting for the disk.

    Parameters
    ----------
    ranges
        What must be read.
    reference
        A directory with files as large as the output, which is what gets copied.
    script
        Gets the commands that read.
    casts
        Whether the output is another size than the input. If it is not, a copy reads all there is to read, and is the
        whole floor; else reading comes first, and a copy by itself is shown too.
    """
    copy = 'mkdir "$2" && cp --reflink=never "$1"/*.safetensors "$2"'
    sync = 'sync "$2"/*'
    if not casts:
        return [
            _shell("floor-sync", "cp and sync", f"{copy} && {sync}", script, reference, synced=True),
            _shell("floor", "cp", copy, script, reference),
        ]
    script.write_text("set -e\n" + "".join(map(reading, ranges)), "utf-8")
    read = f'. "$0" && {copy}'
    return [
        _shell(
            "floor-sync", "read the input, cp the output, sync", f"{read} && {sync}", script, reference, synced=True
        ),
        _shell("floor", "read the input, cp the output", read, script, reference),
        _shell("cp", "cp the output alone", copy, script, reference),
    ]


def reading(part: Extent) -> str:
    """Returns the line of a shell script that reads a range of a file and throws it away."""
    flags = "bs=1M iflag=skip_bytes,count_bytes status=none"
    return f"dd if={shlex.quote(part.file)} of=/dev/null {flags} skip={part.offset} count={part.nbytes}\n"


def _shell(key: str, title: str, line: str, script: Path, reference: Path, *, synced: bool = False) -> Contender:
    return Contender(key, title, "floor", lambda out: ["sh", "-c", line, script, reference, out], title, synced=synced)
