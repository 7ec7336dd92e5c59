"""Tensor parallel ranks of a DeepSpeed checkpoint, each read as a checkpoint of its own, put together.

``mp_rank_RR`` in names of files is the tensor rank. What is cut how, the checkpoint itself says (``tensor_layouts``);
where it does not, nothing is guessed: two halves of a matrix have the shapes of a matrix cut in either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_claims import DeepSpeedClaims
from shardmerge.sources.deepspeed_values import spread_places
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.rank_sets import check_same_names, ranks_in_words
from shardmerge.sources.tensor_layouts import SAYING, TensorLayout, TensorLayouts, read_layouts
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.sources.value_digest import value_digest
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.tensors.shards import ShardPart, assembled, element_place, part_entry

_INFO = "universal_checkpoint_info"
# Elements of what several ranks hold that are compared, all tensors together, and at least of each.
_COMPARED, _EACH = 16384, 4
_GATHERED = (
    "resume the run once and let engine.save_16bit_model write the whole model, or save it by DeepSpeed 0.19, which"
    " says how it cut it"
)


@dataclass(frozen=True, slots=True)
class TensorRank:
    """One tensor parallel rank.

    Attributes
    ----------
    catalog
        Its shards, whole over its data-parallel ranks.
    claims, root
        What its model file states, and holds.
    path
        The model file.
    """

    catalog: Catalog
    claims: DeepSpeedClaims
    root: Mapping[object, PickleValue]
    path: Path


def join_ranks(folder: Path, ranks: Sequence[TensorRank]) -> Catalog:
    """Returns one catalog of all tensor parallel ranks.

    Raises
    ------
    CheckpointError
        ``kind-not-yet``: the checkpoint does not say how its shards make one tensor, or says it in a way that is not
        read. ``tensor-layout``, ``name-pattern``, ``box-hole``, ``box-overlap``: it says what does not fit.
        ``mixed-runs``, ``mixed-ranks``: the ranks are not of one save.
    """
    raise_all(_two_saves(folder, ranks))
    check_same_names(folder, {rank.path.name: rank.catalog for rank in ranks})
    raise_all(_other_ties(folder, ranks))
    first = ranks[0]
    info = as_dict(first.root.get(_INFO))
    if not info.keys() & SAYING:
        raise _unsaid(folder, first.path, len(ranks))
    layouts = read_layouts(info, str(first.path))
    joined = _Joined({}, {}, [], 0)
    buffers = first.root.get("buffer_names")
    whole = {name for name in buffers if isinstance(name, str)} if isinstance(buffers, list) else set()
    for name in first.catalog.entries:
        try:
            joined.add(name, [rank.catalog[name] for rank in ranks], layouts, copied=name in whole)
        except ShardmergeError as error:
            joined.errors += error.each()
    raise_all(joined.errors)
    raise_all(_drifted(folder, joined.replicas))
    notes = [
        f"{len(joined.entries)} tensors of {ranks_in_words(len(ranks))} of tensor parallelism, joined as {_INFO} says"
    ]
    if joined.padded:
        notes.append(f"rows that pad the vocabulary are left out of {joined.padded} tensor(s)")
    return _catalog(ranks, joined.entries, notes)


@dataclass(slots=True)
class _Joined:
    """Whole tensors so far; copies of one thing in several ranks, by where they were found."""

    entries: dict[str, TensorEntry]
    replicas: dict[str, list[list[TensorEntry]]]
    errors: list[ShardmergeError]
    padded: int

    def add(self, name: str, shards: Sequence[TensorEntry], layouts: TensorLayouts, *, copied: bool) -> None:
        """Adds a tensor; buffers are copies, since no rule speaks of them.

        A rank that has none of a parameter has no master of it, but a placeholder in 16 bits.
        """
        first = next((shard for shard in shards if shard.numel), shards[0])
        if any(shard.dtype != first.dtype for shard in shards if shard.numel):
            raise CheckpointError(
                "mixed-ranks",
                f"the shards of {shown(name)} are of several types",
                where=layouts.where,
                found=", ".join(shard.dtype.name for shard in shards[:8]),
                expected="one type in all ranks",
                hint="the masters of some ranks have no names: take the 16-bit weights of all of them, --view module"
                " (in a mapping, `view: module`)",
            )
        shapes = [shard.shape for shard in shards]
        layout = layouts.copies(name, shapes) if copied else layouts.layout(name, shapes)
        pieces = assembled(first.dtype, layout.shape, shards, layout.parts, f"{layouts.where}, {name}")
        entry = replace(first, shape=layout.shape, pieces=pieces)
        if layout.shape and layout.rows < layout.shape[0]:
            zeros = (0,) * len(layout.shape)
            entry = part_entry(entry, ShardPart(0, (layout.rows, *layout.shape[1:]), zeros, zeros))
            entry = replace(entry, origin=first.origin)
            self.padded += 1
        self.entries[name] = entry
        self.replicas[name] = list(_replicas(shards, layout))


def _replicas(shards: Sequence[TensorEntry], layout: TensorLayout) -> Iterator[list[TensorEntry]]:
    """Yields what several ranks hold of one part of a tensor."""
    held: dict[object, list[ShardPart]] = {}
    for part in layout.parts:
        held.setdefault((part.at, part.shape), []).append(part)
    for parts in held.values():
        if len(parts) > 1 and 0 not in parts[0].shape:
            yield [part_entry(shards[part.rank], part) for part in parts]


def _drifted(folder: Path, replicas: Mapping[str, list[list[TensorEntry]]]) -> Iterator[CheckpointError]:
    """Compares some elements of what the ranks hold in common, as ``ds_to_universal`` does with all of them."""
    copies = [(name, entries) for name, found in replicas.items() for entries in found]
    each = max(_COMPARED // max(sum(len(entries) for _, entries in copies), 1), _EACH)
    pool = FilePool()
    odd: dict[str, list[TensorEntry]] = {}
    for name, entries in copies:
        size = entries[0].dtype.itemsize
        for index in spread_places(entries[0].numel, each):
            values = {pool.get(file).read(at, size) for file, at in (element_place(one, index) for one in entries)}
            if len(values) > 1:
                odd.setdefault(name, entries)
                break
    if odd:
        yield CheckpointError(
            "mixed-ranks",
            "tensors that all ranks hold in common differ between them",
            where=str(folder),
            found=f"{len(odd)}: {shown(list(odd))}",
            expected="the same values in every rank",
            hint="files of two saves are mixed, or the run let them drift apart: copy the files of one save",
        )


def _two_saves(folder: Path, ranks: Sequence[TensorRank]) -> Iterator[CheckpointError]:
    facts: list[tuple[str, list[object]]] = [
        ("ds_config", [rank.claims.settings for rank in ranks]),
        ("global_steps", [rank.claims.steps for rank in ranks]),
        ("skipped_steps", [rank.claims.skipped for rank in ranks]),
        ("world size", [rank.claims.world for rank in ranks]),
        ("DeepSpeed version", [rank.claims.version for rank in ranks]),
        (_INFO, [value_digest(rank.root.get(_INFO)) for rank in ranks]),
        ("the ZeRO stage", [rank.catalog.kind for rank in ranks]),
    ]
    for what, values in facts:
        other = next((rank for rank, value in zip(ranks, values, strict=True) if value != values[0]), None)
        if other is not None:
            yield CheckpointError(
                "mixed-runs",
                f"the tensor parallel ranks are not of one run: they differ in {what}",
                where=str(folder),
                found=other.path.name,
                expected=f"the same as in {ranks[0].path.name}",
                hint="copy the files of one save into a directory of their own",
            )


def _other_ties(folder: Path, ranks: Sequence[TensorRank]) -> Iterator[CheckpointError]:
    """A weight that is tied, or there, in one rank is so in all; a placeholder of ZeRO-3 says nothing of a tie."""
    first = ranks[0]
    for rank in ranks[1:]:
        mine, theirs = first.catalog, rank.catalog
        odd = [name for name in mine.entries if name not in theirs]
        odd += [name for name, owner in mine.aliases.items() if theirs.aliases.get(name, owner) != owner]
        odd += [name for name in mine.aliases if name in theirs.entries]
        if odd:
            yield CheckpointError(
                "mixed-ranks",
                f"tensors of {first.path.name} are not so in {rank.path.name}",
                where=str(folder),
                found=f"{len(odd)}: {shown(odd)}",
                expected="the same weights, tied to the same ones",
                hint="copy the files of one save into a directory of their own",
            )


def _unsaid(folder: Path, path: Path, ranks: int) -> CheckpointError:
    return CheckpointError(
        "kind-not-yet",
        f"this checkpoint of {ranks} tensor parallel ranks does not say how their shards make one tensor",
        where=str(folder),
        found=f"no {_INFO} in {path.name}",
        expected="patterns of names, or AutoTP's affine_map",
        hint=_GATHERED,
    )


def _catalog(ranks: Sequence[TensorRank], entries: Mapping[str, TensorEntry], notes: Sequence[str]) -> Catalog:
    catalogs = [rank.catalog for rank in ranks]
    first = catalogs[0]
    warnings = dict.fromkeys(text for catalog in catalogs for text in catalog.warnings)
    return replace(
        first,
        kind=f"{first.kind}, {ranks_in_words(len(ranks))} of tensor parallelism",
        entries=entries,
        files=tuple(stamp for catalog in catalogs for stamp in catalog.files),
        absent=frozenset(name for catalog in catalogs for name in catalog.absent if name not in first.aliases),
        notes=(*first.notes, *notes),
        warnings=tuple(warnings),
    )
