"""Sets of files of which each is the pickle of one rank, told apart by name, and how many there must be.

Names are those of verl (``FSDPCheckpointManager``), which SkyRL and EasyR1 share; of accelerate
(``utils/fsdp_utils.py``, ``save_fsdp_model``, ``_rankR`` with and without the model's number); and of
torch_checkpointing, whose ``metadata.pkl`` names the items and the world.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.json_limits import shallow, weighed
from shardmerge.shown import shown
from shardmerge.storage.reading import SourceFile

FSDP_CONFIG = "fsdp_config.json"
_ITEMS = "metadata.pkl"

# Numbers as they are written, without zeros in front: two names are never one rank.
_NUMBER = r"(0|[1-9]\d{0,6})"
_VERL = re.compile(rf"(model_world_size_{_NUMBER}_rank_){_NUMBER}(\.pt)")
_ACCELERATE = re.compile(rf"(pytorch_model_fsdp(?:_\d+)?_rank_?)(){_NUMBER}(\.bin)")
_ITEM = re.compile(rf"(.+_)(){_NUMBER}(\.pt)")
_MODEL = "model_"

# metadata.pkl has a list of sizes for every tensor of every item.
_LARGEST_ITEMS = 256 << 20
_LARGEST_JSON = 1 << 20


@dataclass(frozen=True, slots=True)
class RankPickles:
    """The files of one model, one a rank.

    Attributes
    ----------
    folder
        Where they lie.
    begin, end
        Their names, around the rank.
    files
        By rank, in ascending order.
    world
        How many there must be; 0 where neither names nor a file beside say.
    """

    folder: Path
    begin: str
    end: str
    files: Mapping[int, Path]
    world: int

    def name(self, rank: int) -> str:
        """Returns the name of a rank's file, there or not."""
        return f"{self.begin}{rank}{self.end}"


def rank_pickles(folder: Path) -> list[RankPickles]:
    """Returns the sets of rank files in a directory.

    Raises
    ------
    CheckpointError
        What ``interpret`` raises of a ``metadata.pkl`` that lies beside such files.
    """
    names = [path.name for path in sorted(folder.iterdir()) if path.name.endswith((".pt", ".bin"))]
    found = [*_grouped(folder, _VERL, names, 0), *_grouped(folder, _ACCELERATE, names, 0)]
    if not found and (folder / _ITEMS).is_file() and any(_ITEM.fullmatch(name) for name in names):
        found += _items(folder, names)
    return found


def actor_folder(step: Path) -> Path | None:
    """Returns ``actor/`` of a step of verl, where it has rank files: the policy, beside its ``critic/``."""
    actor = step / "actor"
    return actor if actor.is_dir() and rank_pickles(actor) else None


def set_of(path: Path) -> RankPickles | None:
    """Returns the set that a file is of, None where its name is not that of a rank."""
    if not any(pattern.fullmatch(path.name) for pattern in (_VERL, _ACCELERATE, _ITEM)):
        return None
    return next((one for one in rank_pickles(path.parent) if path in one.files.values()), None)


def stated_world(folder: Path) -> int:
    """Returns the ranks that verl's ``fsdp_config.json`` counts, 0 where it is not there or does not say."""
    world = read_object(folder / FSDP_CONFIG).get("world_size")
    return world if type(world) is int and world > 0 else 0


def model_first(found: Sequence[RankPickles], folder: Path) -> list[RankPickles]:
    """Returns the sets that may be meant: the items that are called a model, and those of the world that is stated."""
    world = stated_world(folder)
    stated = [one for one in found if world in (0, one.world)] or found
    return [one for one in stated if one.begin.startswith(_MODEL)] or list(stated)


def read_object(path: Path) -> dict[str, object]:
    """Returns what a small file of JSON holds, empty where it is not there or no object."""
    if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
        return {}
    with SourceFile(path) as file:
        raw = file.read(0, file.size)
    try:
        value = shallow(json.loads(weighed(raw)))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _grouped(folder: Path, pattern: re.Pattern[str], names: Sequence[str], world: int) -> Iterator[RankPickles]:
    """Yields the sets that names of one pattern make."""
    found: dict[tuple[str, str, str], dict[int, Path]] = {}
    for name in names:
        if (match := pattern.fullmatch(name)) is not None:
            found.setdefault((match[1], match[2], match[4]), {})[int(match[3])] = folder / name
    for (begin, count, end), files in found.items():
        yield RankPickles(folder, begin, end, dict(sorted(files.items())), int(count or world))


def _items(folder: Path, names: Sequence[str]) -> Iterator[RankPickles]:
    """The items of a ``metadata.pkl`` of torch_checkpointing; none where it is another file of that name."""
    from shardmerge.sources.pickle_vm import interpret

    with SourceFile(folder / _ITEMS) as file:
        if file.size > _LARGEST_ITEMS:
            found = f"{file.size:,} bytes"
            raise CheckpointError("hostile-pickle", "metadata.pkl is too large", where=file.path, found=found)
        root = interpret(file.read(0, file.size), where=file.path)
    items = root.get("metadata") if isinstance(root, dict) else None
    if isinstance(root, dict) and isinstance(items, dict):
        world = _world(root.get("world_size"), folder / _ITEMS)
        yield from (one for one in _grouped(folder, _ITEM, names, world) if one.begin[:-1] in items)


def _world(world: object, path: Path) -> int:
    if type(world) is int and world > 0:
        return world
    raise CheckpointError(
        "damaged-pickle", "metadata.pkl does not say how many ranks there are", where=str(path), found=shown(world)
    )
