"""Of several checkpoints in a directory: which one a convention chooses, and what is said of the others.

A fact that decides which values come out is a warning: a second model that could have been meant, a tag that is newer
than the one that ``latest`` names, shards that no index names. The rest is a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.deepspeed_files import is_tag_folder
from shardmerge.sources.rank_files import is_megatron_folder
from shardmerge.sources.rank_pickle_files import actor_folder
from shardmerge.tensors import Catalog
from shardmerge.tensors.file_roles import (
    ADAPTER_CONFIG,
    READ_SUFFIXES,
    UNFINISHED,
    foreign_weights,
    shard_place,
    training_state,
)

# In the order in which ``from_pretrained`` of transformers looks for them (``modeling_utils.py``,
# ``_get_resolved_checkpoint_files``).
USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# ``1_Pooling``: folders that modules.json of sentence-transformers names.
SENTENCE_MODULE = re.compile(r"\d+_[A-Za-z]+")

_MOST_FOLDERS = 1000
# Accelerate's FSDP writes ``optimizer_0/`` beside ``pytorch_model_fsdp_0/``.
_NO_CHECKPOINTS = (".", "optim", "scheduler")
_LISTED = 8
_NUMBER = re.compile(r"\d+")
# ``checkpoint-500`` of the Trainer, ``global_step500`` of DeepSpeed, ``step_500``, ``epoch-1``, ``iter_500.pth``.
_NUMBERED = re.compile(r"(checkpoint|global_step|step|epoch|iter)[-_=]?\d+(\.\w+)?")


@dataclass(frozen=True, slots=True)
class Remarks:
    """What is to be said of a directory's other contents."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def on(self, catalog: Catalog) -> Catalog:
        """Returns the catalog with these remarks in front of its own."""
        return replace(
            catalog, notes=(*self.notes, *catalog.notes), warnings=(*self.warnings, *catalog.warnings)
        )  # fmt: skip


def whole_set(catalog: Catalog, member: Path) -> Catalog:
    """Returns the catalog of a set with the note that one member of it was named."""
    whole = Path(catalog.path).name
    return Remarks((f"{member.name} is one part of a checkpoint: the whole of {whole}/ is read",)).on(catalog)


def usual_models(folder: Path) -> list[Path]:
    """Returns the files under the usual names of a model, the one that transformers loads first."""
    return [folder / name for name in USUAL if (folder / name).is_file()]


def weight_files(folder: Path) -> list[Path]:
    """Returns what may be weights in a directory, by name: no state of a run; mmengine's directories too."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.endswith(READ_SUFFIXES)
        and not training_state(path.name)
        and (path.is_file() or is_tag_folder(path))
    ]


def checkpoints_inside(folder: Path) -> list[Path]:
    """Returns the directories right inside of one that hold a checkpoint, in the order of their numbers."""
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(_NO_CHECKPOINTS))
    found = [path for index, path in enumerate(folders) if index < _MOST_FOLDERS and _holds_checkpoint(path)]
    return sorted(found, key=lambda path: (_last_number(path.name), path.name))


def _holds_checkpoint(folder: Path) -> bool:
    try:
        return _looks_like_one(folder)
    except PermissionError:  # not readable for this user, and none of their business
        return False


def _looks_like_one(folder: Path) -> bool:
    if usual_models(folder) or (folder / ADAPTER_CONFIG).is_file() or (folder / "latest").is_file():
        return True
    if is_tag_folder(folder) or is_megatron_folder(folder) or actor_folder(folder):
        return True
    return bool(weight_files(folder))


def _last_number(name: str) -> int:
    numbers = _NUMBER.findall(name)
    return int(numbers[-1]) if numbers else -1


def tags_near(folder: Path) -> tuple[str, ...]:
    """Returns the ZeRO checkpoints in a directory and beside it, the newest first: they have what was not gathered.

    Beside it only what a run numbers: any other directory there may be of another model.
    """
    inside = [path for path in (folder, *checkpoints_inside(folder)) if _is_zero(path)]
    if not inside and (folder / ADAPTER_CONFIG).is_file() | bool(usual_models(folder)):
        with suppress(OSError):  # they are for a hint alone: whatever is wrong there, this checkpoint can be read
            beside = (path for path in checkpoints_inside(folder.parent) if path != folder)
            inside = [path for path in beside if _NUMBERED.fullmatch(path.name) and _is_zero(path)]
    return tuple(str(path) for path in reversed(inside))


def _is_zero(folder: Path) -> bool:
    return is_tag_folder(folder) or (folder / "latest").is_file()


def beside_model(folder: Path, chosen: Path, used: Iterable[str]) -> Remarks:
    """Returns what is to be said of what lies beside the model that a convention chose.

    Parameters
    ----------
    folder
        The directory.
    chosen
        The file of weights, or the index.
    used
        Names of the files of weights that belong to it.
    """
    mine = {chosen.name, *used}
    others = [path.name for path in (*usual_models(folder), *weight_files(folder)) if path.name not in mine]
    rivals = [name for name in dict.fromkeys(others) if name in USUAL or shard_place(name)]
    rest = [name for name in dict.fromkeys(others) if name not in rivals]
    warnings = []
    if rivals:
        whole = [name for name in rivals if name in USUAL]
        other = f"; pass {folder / whole[0]} for that one" if whole else ""
        text = f"{chosen.name} is read; another model, or a part of one, lies beside it: {_listed(rivals)}{other}"
        warnings.append(text)
    warnings += _unfinished(folder)
    notes = []
    if rest:
        notes.append(f"{chosen.name} is read, and not what lies beside it: {_listed(rest)}")
    inside = [path.name for path in checkpoints_inside(folder)]
    modules = [f"{name}/" for name in inside if SENTENCE_MODULE.fullmatch(name)]
    if modules:
        warnings.append(f"weights of further modules are not part of the result: {_listed(modules)}")
    inside = [name for name in inside if f"{name}/" not in modules]
    if inside:
        notes.append(f"{chosen.name} is read, and not the checkpoints in {_listed([f'{name}/' for name in inside])}")
    return Remarks(tuple(notes), tuple(warnings))


def beside_tag(folder: Path, chosen: Path, by: str) -> Remarks:
    """Returns what is to be said of other tags, and of the 16-bit model that the Trainer gathered beside its tag."""
    tags = [path for path in sorted(folder.iterdir()) if path.is_dir() and path != chosen and is_tag_folder(path)]
    remarks = beside_numbered(chosen.name, [tag.name for tag in tags], by)
    models = [path.name for path in usual_models(folder)]
    if models:
        text = f"{chosen.name}/ is read, with the weights that the optimizer keeps; {models[0]} beside it is not"
        remarks = Remarks((*remarks.notes, f"{text}: pass {folder / models[0]} for that"), remarks.warnings)
    return remarks


def beside_numbered(chosen: str, others: Sequence[str], by: str) -> Remarks:
    """Returns what is to be said of others of a numbered series: one that is newer than the chosen one is a warning."""
    if not others:
        return Remarks()
    text = f"{chosen} is read, as {by} says; others are here: {_listed(others)}"
    series = [name for name in others if _NUMBER.sub("", name) == _NUMBER.sub("", chosen)]
    newer = [name for name in series if _last_number(name) > _last_number(chosen)]
    return Remarks(warnings=(f"{text}; {newer[-1]} is newer",)) if newer else Remarks(notes=(text,))


def several(code: str, what: str, folder: Path, paths: Sequence[Path]) -> CheckpointError:
    """Returns the error for several candidates and no convention: the lines to choose from."""
    lines = " or ".join(str(path) for path in paths[-_LISTED:])
    return CheckpointError(
        code,
        what,
        where=str(folder),
        found=_listed([path.name for path in paths]),
        hint=f"pass the one that is meant: {lines}",
    )


def nothing_here(folder: Path) -> Iterator[str]:
    """Yields what a directory without weights holds instead."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = f"{foreign_weights(name)} weights, which are not read" if foreign_weights(name) else training_state(name)
        if kind:
            kinds.setdefault(kind, []).append(name)
    yield from (f"{_listed(found)}: {kind}" for kind, found in kinds.items())
    yield from _unfinished(folder)
    gone = [path.name for path in sorted(folder.iterdir()) if leads_nowhere(path) and _is_of_weights(path.name)]
    if gone:
        yield f"{_listed(gone)}: links to files that are not there; {WITH_LINKS}"


# A snapshot of the hub cache is links alone, and `cp -r` copies links.
WITH_LINKS = "remove this copy, and make one with what the links lead to: cp -rL, or rsync -L"


def leads_nowhere(path: Path) -> bool:
    """Tells whether a path is a link to what is not there, or to itself."""
    return path.is_symlink() and not path.exists()


def _unfinished(folder: Path) -> list[str]:
    """Says which files of weights a save or download left unfinished; the hub keeps its own in a cache."""
    found = [
        path.name
        for place in (folder, folder / ".cache" / "huggingface" / "download")
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.name.endswith(UNFINISHED) and (place != folder or _is_of_weights(path.name))
    ]
    return [f"a save or download did not end: {_listed(found)}"] if found else []


def _is_of_weights(name: str) -> bool:
    return any(f"{suffix}." in name or name.endswith(suffix) for suffix in READ_SUFFIXES)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", ... ({len(names)} in all)" if len(names) > _LISTED else "")
