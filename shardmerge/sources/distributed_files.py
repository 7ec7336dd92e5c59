"""The files of torch's distributed safetensors, told by name: one or several a rank, and no index.

``HuggingFaceStorageWriter(save_distributed=True)`` of torch >= 2.8 writes them (``torch/distributed/checkpoint/``
``_hf_utils.py``, ``_gen_file_name``), and so do transformers 5 (``save_pretrained(distributed_checkpoint=True)``),
torchtitan and NeMo Automodel. A rank that has nothing to save in a file writes none. How many ranks there were stands
nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shardmerge.errors import CheckpointError

# Where the writer puts the shards if it consolidates them: the whole tensors are in the directory above.
SHARDED = "sharded"

_NAME = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")
_MOST_NAMED = 5
# One sentence for all that a missing file looks like, one for all that a file of another save does.
BRING_ALL = "copy the files of all ranks into the directory"
KEEP_ONE = "the files of two saves are mixed: keep those of one"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file of one rank.

    Attributes
    ----------
    path
        The file.
    rank
        Counted from 1, as in its name.
    part, parts
        Which of how many files the tensors of the whole model go into; from 1, too.
    """

    path: Path
    rank: int
    part: int
    parts: int


def shard_file(path: Path) -> ShardFile | None:
    """Returns what a file's name says, or None for any other name."""
    match = _NAME.fullmatch(path.name)
    return ShardFile(path, int(match[1]), int(match[2]), int(match[3])) if match else None


def list_shards(folder: Path) -> list[ShardFile]:
    """Returns the shards in a directory, by rank and part."""
    found = (shard_file(path) for path in folder.iterdir() if path.is_file())
    return sorted((file for file in found if file), key=lambda file: (file.rank, file.part))


def shard_name(rank: int, part: int, parts: int) -> str:
    """Returns the name of a file, as torch writes it."""
    return f"shard-{rank:05d}-model-{part:05d}-of-{parts:05d}.safetensors"


def check_numbers(folder: Path, files: Sequence[ShardFile]) -> None:
    """Checks what the names say of a set; how many ranks there were, they do not.

    Raises
    ------
    CheckpointError
        ``mixed-shards``: the names count different numbers of files. ``missing-shard``: a number below the highest has
        no file. ``lone-shard``: all files are of the first rank.
    """
    totals = sorted({file.parts for file in files})
    if len(totals) > 1:
        raise mixed_shards(
            folder, "the names of the shards count different numbers of files", " and ".join(map(str, totals))
        )
    ranks, parts = {file.rank for file in files}, {file.part for file in files}
    if gaps := _gaps(ranks, max(ranks)):
        raise missing_shards(folder, f"no shard of {_listed('rank', gaps)} is there", _listed("rank", sorted(ranks)))
    if gaps := _gaps(parts, totals[0]):
        what = f"{_listed('file', gaps)} of {totals[0]} of the model is there of no rank"
        raise missing_shards(folder, what, _listed("file", sorted(parts)))
    if ranks == {1}:
        raise CheckpointError(
            "lone-shard",
            "these are the shards of one rank of a distributed checkpoint, and files of other ranks may be missing",
            where=str(folder),
            found=", ".join(file.path.name for file in files[:_MOST_NAMED]),
            expected="those of all ranks: a shard holds a part of each tensor",
            hint=f"{BRING_ALL}; if the run had one process, take `shard-00001-` off the name of each file",
        )


def missing_shards(folder: Path, what: str, found: str, expected: str = "") -> CheckpointError:
    """Returns the error for files that are not there."""
    return CheckpointError("missing-shard", what, where=str(folder), found=found, expected=expected, hint=BRING_ALL)


def mixed_shards(where: Path | str, what: str, found: str) -> CheckpointError:
    """Returns the error for files that are not of one save."""
    return CheckpointError("mixed-shards", what, where=str(where), found=found, hint=KEEP_ONE)


def _gaps(numbers: Iterable[int], highest: int) -> list[int]:
    """Returns the first numbers that are missing; a name that lies may count to a billion."""
    return list(islice(_missing(frozenset(numbers), highest), _MOST_NAMED))


def _missing(numbers: frozenset[int], highest: int) -> Iterator[int]:
    return (number for number in range(1, highest + 1) if number not in numbers)


def _listed(what: str, numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > _MOST_NAMED else ""
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_MOST_NAMED]))}{more}"
