"""Small files beside the weights: what a plan reads of them, what it copies, and that the run meets the same bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

from shardmerge.errors import CheckpointError
from shardmerge.execute.pins import Pins, source_changed
from shardmerge.plan.value import Plan
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent, FileStamp, SideFile

# Read and hashed at a time: a tokenizer.json of 20 MB takes 13 ms and no memory.
_BLOCK = 1 << 20


class SideFiles:
    """Reads side files for one plan and remembers what they were."""

    def __init__(self) -> None:
        self._stamps: dict[str, FileStamp] = {}

    def read(self, extent: Extent) -> bytes:
        """Returns the bytes of a small file, or of a part of it.

        Raises
        ------
        CheckpointError
            ``source-changed``: it is not what it was when it was read before.
        """
        with self._open(extent) as file:
            return file.read(extent.offset, extent.nbytes)

    def pinned(self, plan: Plan) -> Plan:
        """Returns the plan with the digests of what it copies, and the stamps of all side files that it depends on."""
        parts = dict.fromkeys(part for side in plan.side_files for part in side.parts if isinstance(part, Extent))
        digests = {part: self._digest(part) for part in parts}
        for path in dict.fromkeys(part.file for part in parts):
            self._reaches_end(path, max(part.offset + part.nbytes for part in parts if part.file == path))
        return replace(plan, copies=digests, side_sources=tuple(self._stamps.values()))

    def _open(self, extent: Extent) -> SourceFile:
        file, end = SourceFile(extent.file), extent.offset + extent.nbytes
        Pins(self._stamps.values()).opened(file)
        stamp = self._stamps.setdefault(extent.file, FileStamp.of(extent.file, file.status))
        if file.size < end:  # since the directory was listed
            raise source_changed(replace(stamp, size=end), f"{file.size} bytes")
        return file

    def _digest(self, part: Extent) -> str:
        digest = hashlib.sha256()
        with self._open(part) as file:
            for start in range(0, part.nbytes, _BLOCK):
                digest.update(file.read(part.offset + start, min(_BLOCK, part.nbytes - start)))
        return digest.hexdigest()

    def _reaches_end(self, path: str, end: int) -> None:
        """A file that grew since the directory was listed would be copied cut off."""
        stamp = self._stamps[path]
        if end != stamp.size:
            raise source_changed(replace(stamp, size=end), f"{stamp.size} bytes")


def content(plan: Plan, side: SideFile) -> bytes:
    """Returns the bytes of a side file of the output; what is copied is what the plan saw.

    Raises
    ------
    CheckpointError
        ``source-changed``.
    """
    pins = Pins(plan.side_sources)
    try:
        return side.content(partial(_as_planned, plan, pins))
    except CheckpointError:
        pins.check()  # as for weights: it may be gone
        raise


def _as_planned(plan: Plan, pins: Pins, part: Extent) -> bytes:
    with SourceFile(part.file) as file:
        pins.opened(file)
        data = file.read(part.offset, part.nbytes)
    if hashlib.sha256(data).hexdigest() != plan.copies[part]:
        stamp = next(stamp for stamp in plan.side_sources if stamp.path == part.file)
        raise source_changed(stamp, "other bytes under the same times")
    return data
