"""Tensor-parallel rank sets: one file a rank, all with the same names. Here Meta's ``consolidated.NN.pth``.

A tensor of rank 3 is called ``03.name`` in the catalog: how the parts make one tensor (joined along which dimension,
or the same in every rank) is for the mapping to say. The layout is that of ``llama/generation.py``, ``Llama.build``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.json_limits import weighed
from shardmerge.sources.rank_files import META
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Catalog, Fact, FileStamp, TensorEntry

_LARGEST_PARAMS = 1 << 20


def read_meta(folder: Path) -> Catalog | None:
    """Returns the catalog of a directory of ``consolidated.NN.pth``, or ``None`` where there is none.

    Raises
    ------
    CheckpointError
        ``missing-rank``: the numbers have a gap, or the shapes say there are more ranks. ``mixed-ranks``: the ranks do
        not hold the same names. And what the torch reader raises.
    """
    found = {int(match[1]) for path in folder.iterdir() if (match := META.fullmatch(path.name))}
    if not found:
        return None
    _check_numbers(folder, found, max(found) + 1)
    ranks = {f"{rank:02d}": read_torch_checkpoint(folder / _meta_name(rank)) for rank in sorted(found)}
    check_same_names(folder, ranks)
    _check_numbers(folder, found, _stated_ranks(folder, ranks["00"]))
    facts: dict[str, Fact] = {"ranks": len(ranks), "embedding_dim": _embedding_dim(ranks["00"])}
    return stack_ranks(folder, f"Meta consolidated, {ranks_in_words(len(ranks))}", ranks, facts)


def _embedding_dim(first: Catalog) -> int:
    """Returns the axis along which the embedding is cut: 1, the columns, in Llama 1 and 2; 0, the rows, in Llama 3."""
    if "tok_embeddings.weight" not in first or "norm.weight" not in first:
        return 0
    return int(first["tok_embeddings.weight"].shape[1:] != first["norm.weight"].shape)


def stack_ranks(
    folder: Path, kind: str, ranks: Mapping[str, Catalog], facts: Mapping[str, Fact] | None = None
) -> Catalog:
    """Returns one catalog of all ranks, every name under its rank: ``00.name``."""
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    absent: set[str] = set()
    files: list[FileStamp] = []
    for rank, catalog in ranks.items():
        entries |= {f"{rank}.{name}": replace(entry, name=f"{rank}.{name}") for name, entry in catalog.entries.items()}
        aliases |= {f"{rank}.{alias}": f"{rank}.{owner}" for alias, owner in catalog.aliases.items()}
        absent |= {f"{rank}.{name}" for name in catalog.absent}
        files += catalog.files
    notes = dict.fromkeys(note for catalog in ranks.values() for note in catalog.notes)
    return Catalog(
        str(folder),
        kind,
        entries,
        aliases,
        tuple(files),
        absent=frozenset(absent),
        notes=tuple(notes),
        warnings=tuple(dict.fromkeys(text for catalog in ranks.values() for text in catalog.warnings)),
        facts=facts or {},
    )


def check_same_names(folder: Path, ranks: Mapping[str, Catalog]) -> None:
    """Raises ``mixed-ranks`` unless all ranks hold the same names, as the parts of one model do."""
    check_names(folder, {rank: _all_names(catalog) for rank, catalog in ranks.items()})


def check_names(folder: Path, ranks: Mapping[str, AbstractSet[str]]) -> None:
    """Raises ``mixed-ranks`` unless all ranks have the same names."""
    (first, names), *others = ranks.items()
    for rank, other in others:
        odd = sorted(names ^ other)
        if odd:
            raise CheckpointError(
                "mixed-ranks",
                f"ranks {first} and {rank} do not hold the same names: {len(odd)} are in one of them alone",
                where=str(folder),
                found=", ".join(odd[:5]),
                hint="files of two models, or of two downloads, are mixed: fetch all ranks again",
            )


def missing_ranks(folder: Path, names: Sequence[str], total: int) -> CheckpointError:
    """Returns the error for rank files that are not there."""
    return CheckpointError(
        "missing-rank",
        f"not all of {total} rank files are there: {', '.join(names[:5])} {'is' if len(names) == 1 else 'are'} missing",
        where=str(folder),
        hint="each rank holds a part of every tensor: bring the files of all ranks into the directory",
    )


def ranks_in_words(ranks: int) -> str:
    """Returns ``1 rank``, ``8 ranks``."""
    return f"{ranks} rank" if ranks == 1 else f"{ranks} ranks"


def _all_names(catalog: Catalog) -> set[str]:
    return {*catalog.names(), *catalog.absent}


def _meta_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def _check_numbers(folder: Path, found: Iterable[int], total: int) -> None:
    missing = sorted(set(range(total)) - set(found))
    if missing:
        raise missing_ranks(folder, [_meta_name(rank) for rank in missing], total)


def _stated_ranks(folder: Path, first: Catalog) -> int:
    """Returns how many ranks the first one's embedding speaks of, 0 where it does not say.

    Llama 1 and 2 cut the embedding along its columns, and the norm is whole; Llama 3 cuts it along its rows, and
    ``params.json`` has their number.
    """
    if "tok_embeddings.weight" not in first or "norm.weight" not in first:
        return 0
    embedding, norm = first["tok_embeddings.weight"].shape, first["norm.weight"].shape
    if len(embedding) != 2 or len(norm) != 1 or 0 in embedding:
        return 0
    rows, columns = embedding
    return _times(norm[0], columns) if norm[0] != columns else _times(_vocabulary(folder), rows)


def _times(whole: int, part: int) -> int:
    return whole // part if whole % part == 0 else 0


def _vocabulary(folder: Path) -> int:
    """``vocab_size`` of params.json; 0 where it has none (Llama 2 has -1)."""
    path = folder / "params.json"
    if not path.is_file() or path.stat().st_size > _LARGEST_PARAMS:
        return 0
    with SourceFile(path) as file:
        raw = file.read(0, file.size)
    try:
        value = json.loads(weighed(raw))
    except (ValueError, RecursionError):
        return 0
    size = value.get("vocab_size") if isinstance(value, dict) else 0
    return size if isinstance(size, int) and size > 0 else 0
