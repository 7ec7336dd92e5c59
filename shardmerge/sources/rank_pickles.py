"""A model of which every rank saved its own part by ``torch.save``: read as one, from the boxes of all ranks.

A tensor of a rank's file is a DTensor, a ShardedTensor, or a plain tensor. A plain one was not sharded: buffers, and
the whole model of a run of one rank. All ranks have it, and one copy is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.sources.rank_pickle_copies import CopyCheck
from shardmerge.sources.rank_pickle_files import RankPickles, stated_world
from shardmerge.sources.rank_pickle_values import RankTensor, rank_tensors
from shardmerge.sources.rank_sets import check_names, missing_ranks, ranks_in_words
from shardmerge.sources.torch_file import read_torch_file
from shardmerge.tensors import Box, Catalog, FileStamp, Shape, TensorEntry
from shardmerge.tensors.boxes import boxed

# Errors that are worth reading at once, and missing files that are named.
_MOST_TOLD = 20
_MOST_NAMED = 6

_Place: TypeAlias = "tuple[tuple[int, ...], Shape]"


@dataclass(slots=True)
class _Gathered:
    """One tensor, as far as ranks were read.

    Attributes
    ----------
    dtype, shape, ranks
        Of the first rank: the whole tensor, and how many ranks share it.
    boxes
        By offsets and shape; of copies the first one.
    ties
        What the ranks hold it by: equal for two names of one tensor.
    """

    dtype: DType
    shape: Shape
    ranks: int
    boxes: dict[_Place, Box] = field(default_factory=dict)
    ties: list[tuple[object, ...]] = field(default_factory=list)


@dataclass(slots=True)
class _Reading:
    """What was read of a set so far. Where nothing told the world, the tensors do."""

    found: RankPickles
    world: int
    told: bool
    root_key: str = ""
    tensors: dict[str, _Gathered] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    stamps: list[FileStamp] = field(default_factory=list)
    skipped: dict[str, None] = field(default_factory=dict)
    meshes: dict[str, None] = field(default_factory=dict)
    copies: CopyCheck = field(default_factory=CopyCheck)

    def read(self, rank: int, path: Path, root: str) -> None:
        """Reads the file of one rank; its pickle is let go of before the next one comes."""
        file = read_torch_file(path)
        self.stamps.append(file.stamp)
        held = rank_tensors(file, root)
        self.root_key = held.root_key
        self.skipped |= dict.fromkeys(held.skipped)
        names = frozenset(held.tensors)
        if self.names:
            first = next(iter(self.found.files))
            check_names(self.found.folder, {str(first): self.names, str(rank): names})
        self.names = self.names or names
        for name, tensor in held.tensors.items():
            self._add(rank, name, tensor)

    def _add(self, rank: int, name: str, tensor: RankTensor) -> None:
        if tensor.world > self.world:
            if self.told:
                raise _mixed(self.found, f"the mesh of {name} has {tensor.world} ranks", self.world)
            self.world = tensor.world
        mine = self.tensors.setdefault(name, _Gathered(tensor.dtype, tensor.shape, tensor.ranks))
        if (mine.dtype, mine.shape, mine.ranks) != (tensor.dtype, tensor.shape, tensor.ranks):
            raise _other_tensor(self.found, rank, name, mine, tensor)
        if tensor.mesh:
            self.meshes[tensor.mesh] = None
        for box, content, tie in tensor.parts:
            place = (box.offsets, box.shape)
            kept = mine.boxes.setdefault(place, box)
            mine.ties.append((rank, *tie))
            if tensor.ranks < self.world:  # nothing says that ranks which share no mesh hold the same
                self.copies.compare(name, kept, box, content)


def read_rank_pickles(found: RankPickles, *, root: str = "") -> Catalog:
    """Returns the catalog of a set of rank files.

    Parameters
    ----------
    found
        The set.
    root
        Dotted path of the state dict inside each file; empty to find it.

    Raises
    ------
    CheckpointError
        ``missing-rank``: files that are not there, of ranks whose part no other has. ``mixed-ranks``: files of several
        runs. ``ranks-differ``: a tensor that is not sharded, and of which ranks hold other values. ``flat-parameters``:
        a LOCAL_STATE_DICT. And what the torch reader, ``local_tensor`` and ``boxed`` raise.
    """
    stated = _stated_world(found)
    reading = _Reading(found, stated or max(found.files) + 1, told=stated > 0)
    for rank, path in found.files.items():
        reading.read(rank, path, root)
    world = reading.world
    warnings = reading.copies.settle()
    missing = world - len(found.files)
    if missing and not _all_say_copies(reading):
        raise _missing(found, world)
    entries, aliases = _entries(reading, missing)
    notes = [f"{ranks_in_words(world)}" + "".join(f", mesh {mesh}" for mesh in islice(reading.meshes, 3))]
    if missing:
        notes.append(f"{len(found.files)} of {world} rank files are here, and hold all: the others are copies")
    if reading.skipped:
        names = ", ".join(name[:80] for name in islice(reading.skipped, 3))
        notes.append(f"{len(reading.skipped)} entries are no tensors and are left out: {names}")
    return Catalog(
        str(found.folder),
        f"torch rank files, {ranks_in_words(world)}",
        entries,
        aliases,
        tuple(reading.stamps),
        notes=tuple(notes),
        warnings=warnings,
    )


def _stated_world(found: RankPickles) -> int:
    """Returns how many ranks there are by the names and by what lies beside them, 0 where neither says."""
    stated = stated_world(found.folder)
    if stated and found.world and stated != found.world:
        raise _mixed(found, f"fsdp_config.json says {stated} ranks", found.world)
    world = found.world or stated
    last = max(found.files)
    if world and last >= world:
        raise _mixed(found, found.name(last), world)
    return world


def _all_say_copies(reading: _Reading) -> bool:
    """Tells whether all sharded tensors lie on a mesh of the whole world, so that coverage says who is needed."""
    shared = {tensor.ranks for tensor in reading.tensors.values() if tensor.ranks > 1}
    return shared == {reading.world}


def _entries(reading: _Reading, missing: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[tuple[object, ...], ...], str] = {}
    errors: list[ShardmergeError] = []
    origin = f"{reading.root_key or 'top level'} of {len(reading.found.files)} rank files"
    for name, tensor in reading.tensors.items():
        owner = owners.setdefault(tuple(tensor.ties), name) if tensor.ties else name
        if owner != name:
            aliases[name] = owner
            continue
        try:
            pieces = boxed(tensor.dtype, tensor.shape, tensor.boxes.values(), name)
        except CheckpointError as error:
            if missing and error.code == "box-hole":
                raise _missing(reading.found, reading.world) from error
            errors.append(error)
        else:
            entries[name] = TensorEntry(name, tensor.dtype, tensor.shape, pieces, origin)
    raise_all(errors[:_MOST_TOLD])
    return entries, aliases


def _missing(found: RankPickles, world: int) -> CheckpointError:
    gone = islice((rank for rank in range(world) if rank not in found.files), _MOST_NAMED)
    return missing_ranks(found.folder, [found.name(rank) for rank in gone], world)


def _mixed(found: RankPickles, what: str, world: int) -> CheckpointError:
    return CheckpointError(
        "mixed-ranks",
        "the files do not agree on how many ranks there are",
        where=str(found.folder),
        found=what,
        expected=f"{world}, as the file names say" if found.world else f"{world}",
        hint="rank files of two runs are mixed: keep those of one",
    )


def _other_tensor(found: RankPickles, rank: int, name: str, mine: _Gathered, other: RankTensor) -> CheckpointError:
    return CheckpointError(
        "mixed-ranks",
        "two ranks describe one tensor differently",
        where=f"{found.folder / found.name(rank)}, {name[:200]}",
        found=_told(other.dtype, other.shape, other.ranks),
        expected=_told(mine.dtype, mine.shape, mine.ranks),
        hint="rank files of two runs are mixed: keep those of one",
    )


def _told(dtype: DType, shape: Shape, ranks: int) -> str:
    return f"{dtype.name} {list(shape)}, " + (f"sharded over {ranks} ranks" if ranks > 1 else "not sharded")
