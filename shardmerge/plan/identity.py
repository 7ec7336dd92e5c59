"""What decides the bytes of a result, and nothing else: the plan's id is the SHA-256 of it.

Two plans that differ in a name of a source, a comment of the mapping, a path or a warning write the same bytes and
have one id. So have plans that say the same moves in other words: a slice and a split, a transpose of a transpose,
parts that are put together again (see ``marks``). What is computed is compared as it is written: two formulas that
happen to give the same numbers have two ids.

Nobody reads the data of a source to tell it from another. A file is its size, its header, and the time it was last
modified; a copy that keeps the time is the same file, and one that does not is another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from shardmerge.json_rows import Fields, Rows, canonical_text
from shardmerge.plan.marks import Marks
from shardmerge.plan.shard import PlannedShard
from shardmerge.tensors import Extent, FileStamp, SideFile

# Version of what a plan means, and of its text. It is part of the plan id.
SCHEMA = 5

_SECOND = 10**9


def identity(
    shards: Sequence[PlannedShard],
    side_files: Sequence[SideFile],
    copies: Mapping[Extent, str],
    files: Sequence[FileStamp],
) -> str:
    """Returns the SHA-256 (hex) of what decides the bytes of a result.

    Parameters
    ----------
    shards, side_files
        What is written.
    copies
        SHA-256 of the parts of side files that are copied.
    files
        Stamps of all files that are read.
    """
    marks = Marks(_names(files))
    value = Fields(
        {
            "schema": SCHEMA,
            "shards": Rows(lambda: (_shard(shard, marks) for shard in shards)),
            "side_files": Rows(lambda: (_side(side, copies) for side in sorted(side_files, key=lambda s: s.name))),
        }
    )
    digest = hashlib.sha256()
    for piece in canonical_text(value):
        digest.update(piece.encode())
    return digest.hexdigest()


def _names(files: Sequence[FileStamp]) -> Callable[[str], str]:
    """Returns what tells a file from others, of its path.

    A time of whole seconds was set by somebody, or is all that the file system keeps: files of two checkpoints may
    have it, and headers and sizes of such are equal anyway. There, and where two files of the plan look alike, the
    path counts too.
    """
    rows = {stamp.path: (stamp.size, stamp.mtime_ns, stamp.header) for stamp in files}
    alike = Counter(rows.values())
    names = {}
    for path, row in rows.items():
        telling = alike[row] == 1 and row[1] % _SECOND
        names[path] = json.dumps(row if telling else (*row, path))
    return names.__getitem__


def _shard(shard: PlannedShard, marks: Marks) -> Fields:
    fields = {tensor.name: tensor.offset for tensor in shard.tensors} if shard.checksums else {}
    return Fields(
        {
            "blobs": [[offset, hashlib.sha256(blob).hexdigest()] for offset, blob in shard.blobs],
            "checksums": sorted([fields[name], list(places)] for name, places in shard.checksums.items() if places),
            "data": Rows(lambda: ([t.offset, t.dtype.itemsize, f"{marks.of(t.entry):x}"] for t in shard.tensors)),
            "name": shard.name,
            "nbytes": shard.nbytes,
        }
    )


def _side(side: SideFile, copies: Mapping[Extent, str]) -> list[object]:
    """The same for bytes made here and for the same bytes copied: nobody can tell them apart."""
    parts: list[list[object]] = []
    for made, group in groupby(side.parts, key=lambda part: isinstance(part, bytes)):
        if made:
            data = b"".join(part for part in group if isinstance(part, bytes))
            parts += [[len(data), hashlib.sha256(data).hexdigest()]] if data else []
        else:
            parts += [[part.nbytes, copies[part]] for part in group if isinstance(part, Extent) and part.nbytes]
    return [side.name, parts]
