"""Models of Hugging Face in a directory: which file or index is the model, and what else lies there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.choosing import Remarks, beside_model, several, usual_models, weight_files
from shardmerge.sources.hf_folder import ReadShard, named_shards, read_indexed, read_unindexed
from shardmerge.sources.peft_folder import stray_config
from shardmerge.storage.listing import matching
from shardmerge.tensors import Catalog
from shardmerge.tensors.file_roles import READ_SUFFIXES, shard_place

# Indexes of weights, and no ``model_index.json`` of diffusers.
_INDEXES = tuple(f"{suffix}.index.json" for suffix in READ_SUFFIXES)


def read_usual(folder: Path, read_shard: ReadShard) -> Catalog | None:
    """Returns the catalog of the model under the first usual name, as transformers would load it; None without one."""
    chosen = next(iter(usual_models(folder)), None)
    return read_model(chosen, read_shard) if chosen else None


def read_model(chosen: Path, read_shard: ReadShard) -> Catalog:
    """Reads the file or index of a directory, and says what else lies there."""
    folder = chosen.parent
    if chosen.suffix == ".json":
        catalog, used = read_indexed(chosen, read_shard), named_shards(chosen)
    else:
        catalog, used = replace(read_shard(chosen), path=str(folder)), frozenset(_sole_index(chosen))
    return beside_model(folder, chosen, used).on(Remarks(stray_config(folder)).on(catalog))


def _sole_index(file: Path) -> list[str]:
    """An index that names this one file alone is no second model."""
    index = file.with_name(f"{file.name}.index.json")
    try:
        return [index.name] if index.is_file() and named_shards(index) == {file.name} else []
    except CheckpointError:  # not used, and so no reason to stop
        return []


def read_single(path: Path, read_shard: ReadShard, read_file: ReadShard) -> Catalog | None:
    """Returns the catalog of one weight file under any name, one index, or a whole set of shards without one.

    Parameters
    ----------
    path
        The directory.
    read_shard, read_file
        Read a part of a model, and a file that may be a checkpoint of any kind.

    Raises
    ------
    CheckpointError
        ``several-files``, ``missing-shard``, and what the readers raise.
    """
    indexes = [item for item in matching(path, "*.index.json") if item.name.endswith(_INDEXES)]
    if len(indexes) > 1:
        raise several("several-files", f"the directory holds {len(indexes)} indexes", path, indexes)
    if indexes:
        return read_model(indexes[0], read_shard)
    found = weight_files(path)
    shards = [item for item in found if shard_place(item.name)]
    if shards:
        return _unindexed(shards[0], read_shard)
    # One model in two formats: safetensors, as everywhere.
    stems = {_stem(item) for item in found}
    if len(stems) > 1 or (len(found) > len(stems) and not found[0].name.endswith(READ_SUFFIXES[0])):
        raise several("several-files", f"the directory holds {len(found)} files of weights and no index", path, found)
    chosen = next((item for item in found if item.suffix == READ_SUFFIXES[0]), found[0] if found else None)
    if chosen is None:
        return None
    if chosen.is_dir():
        return read_file(chosen)
    return beside_model(path, chosen, ()).on(read_file(chosen))


def _stem(path: Path) -> str:
    """``open_clip_pytorch_model.bin`` is called after its format where ``open_clip_model.safetensors`` is not."""
    return path.stem.replace("pytorch_", "")


def _unindexed(shard: Path, read_shard: ReadShard) -> Catalog:
    """Reads the shards of one model that no index names, if all that their names count are there."""
    place = shard_place(shard.name)
    assert place is not None
    stem, _, total, suffix = place
    parts = [shard.with_name(f"{stem}-{number:05d}-of-{total:05d}{suffix}") for number in range(1, total + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(
            "missing-shard",
            f"{len(missing)} of {total} shards are not there: {', '.join(missing[:5])}",
            where=str(shard.parent),
            found=f"{total - len(missing)} of {total}, and no index: a save or download that did not end",
            hint="copy or download the rest, with the index",
        )
    strangers = [item.name for item in weight_files(shard.parent) if item not in parts]
    remarks = Remarks(warnings=(f"not read: {', '.join(strangers[:8])}",) if strangers else ())
    return remarks.on(read_unindexed(parts, read_shard))


def read_set_of(shard: Path, read_shard: ReadShard) -> Catalog | None:
    """Returns the catalog of the model that a shard is a part of, or None if its name is not that of one of several."""
    place = shard_place(shard.name)
    if place is None or place[2] == 1:
        return None
    for index in matching(shard.parent, "*.index.json"):
        if index.name.endswith(_INDEXES) and shard.name in named_shards(index):
            return read_indexed(index, read_shard)
    return _unindexed(shard, read_shard)
