"""Files and folders of rank sets, told apart by name: Megatron's and Meta's. Read before any of them is opened.

Names are those of ``megatron/training/checkpointing.py`` (``get_checkpoint_name``, and the tracker file of
``get_checkpoint_tracker_filename``): a pipeline number stands in them only where there are stages, an expert number
only where there are experts. Meta's are those of ``llama/generation.py``, ``Llama.build``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.markers import read_marker
from shardmerge.storage.listing import matching

TRACKER = "latest_checkpointed_iteration.txt"

# model_rng.pt: versions of 2022, which kept the distributed optimizer in folders of its own.
FILES = ("model_optim_rng.pt", "model_rng.pt")

# What torch's distributed checkpoint says of its own: one file of all ranks, or one of each (``FileSystemWriter``).
METADATA, RANK_METADATA = ".metadata", "__*.metadata"
# Beside it in a checkpoint of Megatron (``dist_checkpointing/core.py``, ``strategies/common.py``).
MEGATRON_DIST = ("common.pt", "metadata.json")

_RANK = re.compile(r"mp_rank_(\d{2,})((?:_\d{3,})*)")
META = re.compile(r"consolidated\.(\d\d)\.pth")


@dataclass(frozen=True, slots=True)
class MegatronRankFile:
    """The file of one tensor rank in one pipeline stage; ``experts`` where its folder names an expert rank too."""

    path: Path
    tensor: int
    stage: int
    experts: bool

    @property
    def key(self) -> tuple[int, int]:
        """Its place in the grid: tensor rank, stage."""
        return self.tensor, self.stage


def is_megatron_folder(folder: Path) -> bool:
    """Tells whether a directory holds the rank folders of one iteration, or a distributed checkpoint."""
    return bool(list_ranks(folder)) or is_distributed(folder)


def is_rank_folder(folder: Path) -> bool:
    """Tells whether a directory is that of one rank."""
    return _rank_file(folder) is not None


def is_rank_file(path: Path) -> bool:
    """Tells whether a file is the model of one rank."""
    return path.name in FILES and is_rank_folder(path.parent)


def is_distributed(folder: Path) -> bool:
    """Tells whether a directory is a checkpoint of torch's or Megatron's distributed checkpointing, whole or not."""
    if (folder / METADATA).is_file() or matching(folder, RANK_METADATA) or matching(folder, "*.distcp"):
        return True
    return all((folder / name).is_file() for name in MEGATRON_DIST)


def newest_iteration(folder: Path) -> Path | None:
    """Returns the directory that the tracker file names, or ``None`` without a tracker file.

    Raises
    ------
    CheckpointError
        ``missing-tag``: it names a directory that is not there.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = read_marker(tracker)
    name = f"iter_{int(text):07d}" if text.isascii() and text.isdigit() else text
    if name == "release" or name.startswith("iter_"):
        found = folder / name
        if found.name == name and is_megatron_folder(found):
            return found
    raise CheckpointError(
        "missing-tag",
        f"{TRACKER} names an iteration that is not a Megatron checkpoint",
        where=str(tracker),
        found=repr(text[:80]),
        expected="a number, with its directory iter_NNNNNNN, or the word release",
        hint="pass the directory of the iteration itself, e.g. .../iter_0001000",
    )


def list_ranks(folder: Path) -> list[MegatronRankFile]:
    """Returns the ranks of one iteration, stage by stage."""
    found = [rank for path in matching(folder, "mp_rank_*") if (rank := _rank_file(path))]
    return sorted(found, key=lambda rank: (rank.stage, rank.tensor))


def _rank_file(folder: Path) -> MegatronRankFile | None:
    match = _RANK.fullmatch(folder.name)
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if match is None or path is None:
        return None
    numbers = [int(number) for number in match[2].split("_")[1:]]
    return MegatronRankFile(path, int(match[1]), numbers[0] if numbers else 0, len(numbers) > 1)


def is_meta_file(path: Path) -> bool:
    """Tells by its name whether a file is a rank of Meta's."""
    return META.fullmatch(path.name) is not None
