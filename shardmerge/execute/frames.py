"""All bytes of a file of weights that are no tensor data: its frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardmerge.execute.checksum import crc32
from shardmerge.plan.shard import PlannedShard


def patched_blobs(shard: PlannedShard, checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
    """Yields the frame as (offset, bytes), the CRC-32 of tensors in the places that a torch file has for them."""
    places = {at: checksums[name] for name, offsets in shard.checksums.items() for at in offsets}
    ordered = sorted(places)
    cursor = 0
    for offset, blob in shard.blobs:
        patched = bytearray(blob)
        while cursor < len(ordered) and ordered[cursor] < offset + len(blob):
            at = ordered[cursor]
            patched[at - offset : at - offset + 4] = places[at].to_bytes(4, "little")
            cursor += 1
        yield offset, bytes(patched)


def frame_crc32(shard: PlannedShard, checksums: Mapping[str, int]) -> int:
    """Returns the CRC-32 of the frame, its pieces one after the other."""
    total = 0
    for _, blob in patched_blobs(shard, checksums):
        total = crc32(blob, total)
    return total
