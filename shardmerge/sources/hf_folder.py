"""A Hugging Face directory: one file, or shards with an index that is checked against their headers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.json_limits import weighed
from shardmerge.sources.choosing import SENTENCE_MODULE, WITH_LINKS, leads_nowhere
from shardmerge.sources.links import odd_links, outside
from shardmerge.storage.listing import files_below
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Extent, FileStamp, TensorEntry
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, comes_along, is_weights

ReadShard: TypeAlias = Callable[[Path], Catalog]

# A shard is a plain file beside its index. Anything else in an index ("../", absolute, a drive) is an attack or a
# mistake: transformers #46913, huggingface_hub #4935.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.(safetensors|bin|pt|pth)")
# An index of a million tensors is about 100 MB.
_LARGEST_INDEX = 128 << 20
# tokenizer.json of the largest vocabularies is about 20 MB; weights are told apart by suffix, not by size.
_LARGEST_SIDE_FILE = 64 << 20


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index file: which shard holds which tensor, as it claims."""

    path: Path
    weight_map: dict[str, str]
    total_size: int | None


def read_indexed(path: Path, read_shard: ReadShard) -> Catalog:
    """Returns the catalog of all shards that an index names, after comparing it with their headers.

    Raises
    ------
    CheckpointError
        ``unsafe-index``: a shard name with a path in it. ``damaged-index``: not the expected JSON.
        ``missing-shard``, ``lying-index``: shards absent, or tensors not where the index says; all at once.
    """
    index = _read_index(path)
    names = sorted(set(index.weight_map.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            "missing-shard",
            f"{len(missing)} of {len(names)} shards are not there: {', '.join(missing[:5])}",
            where=str(path),
            hint=WITH_LINKS
            if any(leads_nowhere(path.parent / name) for name in missing)
            else "download the rest, or remove the index if a single file is the whole model",
        )
    shards = {name: read_shard(path.parent / name) for name in names}
    raise_all(_lies(index, shards))
    return _merged(index, shards)


def read_unindexed(paths: Sequence[Path], read_shard: ReadShard) -> Catalog:
    """Returns the catalog of shards that no index names, told by their own names (``-00001-of-00003``) to be all.

    Raises
    ------
    CheckpointError
        ``duplicate-name``: two shards hold one tensor, so they are not of one model.
    """
    shards = {path.name: read_shard(path) for path in paths}
    seen: dict[str, str] = {}
    for shard, catalog in shards.items():
        for name in catalog.names():
            if name in seen:
                raise CheckpointError(
                    "duplicate-name",
                    f"two shards hold a tensor of the same name: {seen[name]} and {shard}",
                    where=f"{paths[0].parent}, {name[:200]}",
                    hint="the shards are of different models: keep those of one, and its index",
                )
            seen[name] = shard
    merged = _merged(ShardIndex(paths[0], {}, None), shards)
    if len(paths) == 1:  # torchtune calls a whole model ft-model-00001-of-00001
        return merged
    text = f"no index names the {len(paths)} shards: all that their names count are read"
    return replace(merged, warnings=(text, *merged.warnings))


def named_shards(index: Path) -> frozenset[str]:
    """Returns the shards that an index file names; raises as ``read_indexed``."""
    return frozenset(_read_index(index).weight_map.values())


def side_files(folder: Path) -> dict[str, Extent]:
    """Returns the small files of a directory that are no weights, by their path inside of it.

    Folders inside are looked into where they are part of a model: extra chat templates, Python packages that the
    model's code imports, modules of sentence-transformers.

    Raises
    ------
    CheckpointError
        ``link-outside``: a file that would go where the model goes is a link out of the directory.
    """
    sizes = {path: size for path in _beside(folder) if (size := _small_size(path)) is not None}
    paths = {path.relative_to(folder).as_posix(): path for path in sizes}
    whole = "config.json" in paths
    links = [path for name, path in paths.items() if path.is_symlink() or path.parent.is_symlink()]
    gone = [path for path in links if outside(path, folder)]
    wanted = [path for path in gone if comes_along(path.relative_to(folder).as_posix(), model_folder=whole)]
    raise_all(odd_links(wanted, folder))
    return {name: Extent(str(path), 0, sizes[path]) for name, path in paths.items() if path not in gone}


def _beside(folder: Path) -> Iterator[Path]:
    """Yields what may be a file that goes where a model goes."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            with suppress(PermissionError):
                yield from _inside(path)
        else:
            yield path


def _inside(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder that is part of a model; folders of runs, caches and other checkpoints are not."""
    if folder.name == "additional_chat_templates" or SENTENCE_MODULE.fullmatch(folder.name):
        yield from sorted(folder.iterdir())
    elif (folder / ADAPTER_CONFIG).is_file():  # another adapter of the run, as peft saves it: what it says of itself
        yield folder / ADAPTER_CONFIG
    elif folder.name.isidentifier() and (folder / "__init__.py").is_file():
        yield from (path for path in sorted(files_below(folder)) if path.suffix == ".py")


def _small_size(path: Path) -> int | None:
    """Returns the bytes of a small file that holds no weights; None of anything else, and of what has just gone."""
    if is_weights(path.name) or not path.is_file():
        return None
    with suppress(FileNotFoundError):
        size = path.stat().st_size
        return size if size <= _LARGEST_SIDE_FILE else None
    return None


def _read_index(path: Path) -> ShardIndex:
    with SourceFile(path) as file:
        if file.size > _LARGEST_INDEX:
            raise _damaged(path, f"{file.size} bytes is too large for an index")
        raw = file.read(0, file.size)
    try:
        value = json.loads(weighed(raw).decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not strict JSON: {error}") from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _damaged(path, "weight_map is not an object of strings")
    if not weight_map:
        raise _damaged(path, "weight_map names no shard")
    raise_all(_unsafe_names(path, weight_map))
    metadata = value.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(path, weight_map, total if isinstance(total, int) else None)


def _unsafe_names(path: Path, weight_map: dict[str, str]) -> Iterator[ShardmergeError]:
    suffix = ".safetensors" if ".safetensors" in path.name else ""
    for name in sorted(set(weight_map.values())):
        if not _SHARD_NAME.fullmatch(name) or not name.endswith(suffix):
            yield CheckpointError(
                "unsafe-index",
                f"the index names {name!r} as a shard",
                where=str(path),
                expected="a plain file name beside the index" + (f", ending in {suffix}" if suffix else ""),
                hint="do not use this checkpoint unless you know who made it",
            )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice, so a tensor may be in two shards")
    return found


def _lies(index: ShardIndex, shards: dict[str, Catalog]) -> Iterator[ShardmergeError]:
    claimed: dict[str, set[str]] = {name: set() for name in shards}
    for tensor, shard in index.weight_map.items():
        claimed[shard].add(tensor)
    for shard, catalog in shards.items():
        held = set(catalog.names()) | catalog.absent
        for what, names in (
            ("the shard does not hold", claimed[shard] - held),
            ("the index leaves out", held - claimed[shard]),
        ):
            if names:
                yield CheckpointError(
                    "lying-index",
                    f"{what} {len(names)} tensors: {', '.join(sorted(names)[:5])}",
                    where=f"{index.path}, shard {shard}",
                    hint="the index and the shards are from different downloads: fetch both again",
                )


def _merged(index: ShardIndex, shards: dict[str, Catalog]) -> Catalog:
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    files: list[FileStamp] = []
    absent: set[str] = set()
    for catalog in shards.values():
        entries.update(catalog.entries)
        aliases.update(catalog.aliases)
        files.extend(catalog.files)
        absent.update(catalog.absent)
    total = sum(entry.nbytes for entry in entries.values())
    warnings = dict.fromkeys(text for catalog in shards.values() for text in catalog.warnings)
    notes = list(dict.fromkeys(note for catalog in shards.values() for note in catalog.notes))
    if index.total_size not in (None, total):
        notes.append(f"{index.path.name} says total_size {index.total_size}; the headers add up to {total}")
    kind = f"{next(iter(shards.values())).kind}, {len(shards)} shards"
    return Catalog(
        str(index.path.parent),
        kind,
        entries,
        aliases,
        tuple(files),
        absent=frozenset(absent),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError("damaged-index", f"the index cannot be used: {what}", where=str(path))
