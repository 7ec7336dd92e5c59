"""How the shards of tensor parallel ranks make whole tensors, as a DeepSpeed checkpoint says it.

``universal_checkpoint_info`` of the model files is what ``ds_to_universal`` joins by (``merge_tp_slices`` there, of
DeepSpeed 0.12 to 0.19). Megatron-DeepSpeed writes patterns of names: replicated, cut along axis 1 (row parallel),
several matrices in one, a padded vocabulary; all else is cut along axis 0. AutoTP of 0.19 writes these and, for every
parameter, the boxes themselves (``affine_map``, ``checkpoint/affine.py``), which are taken where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shardmerge.errors import CheckpointError
from shardmerge.shown import shown
from shardmerge.sources.affine_maps import affine_layout
from shardmerge.sources.name_patterns import NamePatterns
from shardmerge.sources.pickle_values import PickleValue
from shardmerge.sources.torch_checkpoint import as_dict
from shardmerge.tensors import Shape
from shardmerge.tensors.shards import ShardPart

# Without one of these the info is of something else, a version alone or stages, and says nothing of shards.
SAYING = frozenset({"affine_map", "parameter_with_row_parallelism_patterns", "tp_replicated_parameter_patterns"})
# Since then sub-parameters have the widths of their shards written down, and are not cut evenly.
_WIDTHS_VERSION = 0.4
# Rows that pad a vocabulary for each rank: Megatron's --make-vocab-size-divisible-by is 128 and may be set higher. A
# table with more of them beyond the vocabulary is another one, of positions.
_MOST_PADDING = 1024
# Matrices in one parameter; axes of a tensor, as in torch.
_MOST_MATRICES, _MOST_AXES = 1024, 64
# What its formats are numbered by; ``AFFINE_MAP_FORMAT_VERSION``.
_AFFINE_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A whole tensor: its shape with all rows, how many of them are kept, and the parts of the shards."""

    shape: Shape
    rows: int
    parts: tuple[ShardPart, ...]


@dataclass(frozen=True, slots=True)
class SubParameters:
    """Matrices in one parameter, one behind the other along an axis, each of them cut over the ranks."""

    patterns: tuple[str, ...]
    shape: tuple[PickleValue, ...]
    axis: int


@dataclass(slots=True)
class TensorLayouts:
    """What ``universal_checkpoint_info`` says, by names; made by ``read_layouts``."""

    where: str
    version: float
    replicated: NamePatterns
    averaged: NamePatterns
    rows: NamePatterns
    halves: NamePatterns
    vocabulary: NamePatterns
    joined: NamePatterns
    unsupported: NamePatterns
    affine: NamePatterns
    vocabulary_rows: int
    reasons: Mapping[object, PickleValue]
    maps: Mapping[object, PickleValue]
    widths: Mapping[object, PickleValue]
    sub_parameters: tuple[SubParameters, ...] = field(default_factory=tuple)

    def layout(self, name: str, shapes: Sequence[Shape]) -> TensorLayout:
        """Returns how the shards of a parameter, of these shapes by rank, make the whole.

        Raises
        ------
        CheckpointError
            ``tensor-layout``: what the checkpoint says does not fit the shards. ``kind-not-yet``: it says what is not
            read (an average, a scale, a layout that DeepSpeed itself does not describe).
        """
        if any(len(shape) > _MOST_AXES for shape in shapes):
            raise self._misfit(name, f"at most {_MOST_AXES} axes", shapes)
        reason = self.unsupported.find(name)
        if reason:
            raise self._not_read(name, shown(self.reasons.get(reason[0])))
        boxes = self._one(self.affine, name)
        if boxes:
            return self._of_map(name, self.maps.get(boxes), shapes)
        if self._one(self.averaged, name):
            raise self._not_read(name, "the average of its shards")
        found = self._of_patterns(name, shapes)
        return self._kept(name, found, shapes) if self._one(self.vocabulary, name) else found

    def _of_map(self, name: str, entry: PickleValue, shapes: Sequence[Shape]) -> TensorLayout:
        found = affine_layout(as_dict(entry), shapes)
        if isinstance(found, str):
            raise self._misfit(name, found, shapes)
        shape, parts, scaled = found
        if scaled:
            raise self._not_read(name, "shards that are the whole times a factor")
        return TensorLayout(shape, shape[0] if shape else 1, parts)

    def _of_patterns(self, name: str, shapes: Sequence[Shape]) -> TensorLayout:
        if self._one(self.replicated, name):
            return self.copies(name, shapes)
        if self._one(self.halves, name):
            widths = [[shape[0] // 2 if shape and not shape[0] % 2 else -1 for shape in shapes]] * 2
            return self._cut(name, 0, widths, shapes)
        joined = self._one(self.joined, name)
        if joined:
            axis, widths = self._sub_widths(name, joined, shapes)
            return self._cut(name, axis, widths, shapes)
        axis = 1 if self._one(self.rows, name) else 0
        return self._cut(name, axis, [[shape[axis] if axis < len(shape) else -1 for shape in shapes]], shapes)

    def copies(self, name: str, shapes: Sequence[Shape]) -> TensorLayout:
        """Returns the layout of a tensor that every rank holds whole."""
        if len(set(shapes)) > 1:
            raise self._misfit(name, "every rank holds the whole", shapes)
        whole = shapes[0]
        start = (0,) * len(whole)
        parts = tuple(ShardPart(rank, whole, start, start) for rank in range(len(shapes)))
        return TensorLayout(whole, whole[0] if whole else 1, parts)

    def _cut(self, name: str, axis: int, widths: Sequence[Sequence[int]], shapes: Sequence[Shape]) -> TensorLayout:
        """Returns the layout of matrices one behind the other, each cut along an axis: widths by matrix and rank."""
        others = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        held = [sum(row[rank] for row in widths) for rank in range(len(shapes))]
        fits = len(others) == 1 and all(n >= 0 for row in widths for n in row)
        if not fits or any(shape[axis : axis + 1] != (n,) for shape, n in zip(shapes, held, strict=True)):
            raise self._misfit(name, f"cut along axis {axis}, {_in_words(widths)}", shapes)
        parts, at = [], 0
        inside = [0] * len(shapes)
        for row in widths:
            for rank, width in enumerate(row):
                shape = _with(shapes[rank], axis, width)
                zeros = (0,) * len(shape)
                parts.append(ShardPart(rank, shape, _with(zeros, axis, inside[rank]), _with(zeros, axis, at)))
                inside[rank] += width
                at += width
        whole = _with(shapes[0], axis, at)
        return TensorLayout(whole, whole[0], tuple(part for part in parts if prod(part.shape)))

    def _sub_widths(self, name: str, pattern: str, shapes: Sequence[Shape]) -> tuple[int, list[list[int]]]:
        """Returns axis and widths of sub-parameters; cut evenly where the version knows no other cut."""
        one = next(sub for sub in self.sub_parameters if pattern in sub.patterns)
        axis, ranks = one.axis, len(shapes)
        if len(one.shape) != len(shapes[0]) or not 0 <= axis < len(one.shape):
            raise self._misfit(name, f"sub-parameters of the form {shown(list(one.shape))}", shapes)
        if self.version >= _WIDTHS_VERSION:
            stated = self.widths.get(pattern)
            rows = [_numbers(row) for row in stated] if isinstance(stated, list) else []
            if not rows or any(len(row) != ranks for row in rows):
                raise self._misfit(name, "sub-parameters, and no widths of theirs", shapes)
            return axis, rows
        total = sum(shape[axis] for shape in shapes if axis < len(shape))
        stated = one.shape[axis]
        count = stated if isinstance(stated, int) and 0 < stated <= _MOST_MATRICES else 0
        sizes = [total // count] * count if count and not total % count else _numbers(stated)
        if sum(sizes) != total:
            raise self._misfit(name, f"sub-parameters of {shown(stated)}", shapes)
        return axis, [[size // ranks] * ranks for size in sizes]

    def _kept(self, name: str, found: TensorLayout, shapes: Sequence[Shape]) -> TensorLayout:
        """Returns the layout without the rows that pad a vocabulary so that all ranks hold as many."""
        rows = found.shape[0] if found.shape else 0
        if not 0 < self.vocabulary_rows <= rows <= self.vocabulary_rows + _MOST_PADDING * len(shapes):
            raise self._misfit(name, f"the {self.vocabulary_rows} rows of the vocabulary, padded", shapes)
        return TensorLayout(found.shape, self.vocabulary_rows, found.parts)

    def _one(self, patterns: NamePatterns, name: str) -> str:
        """Returns the pattern of a kind that matches a name, ``""`` for none; DeepSpeed, too, takes no two of them."""
        found = patterns.find(name)
        if len(found) > 1:
            raise CheckpointError(
                "tensor-layout",
                f"the checkpoint says twice how the shards of {shown(name)} make one tensor",
                where=self.where,
                found=", ".join(found[:4]),
                expected="one pattern of a kind",
            )
        return found[0] if found else ""

    def _misfit(self, name: str, stated: str, shapes: Sequence[Shape]) -> CheckpointError:
        return CheckpointError(
            "tensor-layout",
            f"the shards of {shown(name)} are not cut as the checkpoint says",
            where=self.where,
            found=", ".join(shown(list(shape)) for shape in shapes[:8]),
            expected=stated,
        )

    def _not_read(self, name: str, how: str) -> CheckpointError:
        return CheckpointError(
            "kind-not-yet",
            f"the shards of {shown(name)} make one tensor in a way that shardmerge does not read yet",
            where=self.where,
            found=how,
            expected="copies, or parts beside each other",
        )


def read_layouts(info: Mapping[object, PickleValue], where: str) -> TensorLayouts:
    """Returns what a model file's ``universal_checkpoint_info`` says.

    Raises
    ------
    CheckpointError
        ``name-pattern``; ``tensor-layout``: an ``affine_map`` of a version that is not known.
    """
    affine = as_dict(info.get("affine_map"))
    if affine and affine.get("version", _AFFINE_VERSION) != _AFFINE_VERSION:
        raise CheckpointError(
            "tensor-layout",
            "the checkpoint describes its shards in a form of another version",
            where=where,
            found=f"affine_map {shown(affine.get('version'))}",
            expected=str(_AFFINE_VERSION),
        )
    maps = as_dict(affine.get("params"))
    reasons = as_dict(info.get("autotp_unsupported_parameter_patterns"))
    subs = _sub_parameters(info.get("parameter_with_sub_params"))
    version = info.get("universal_checkpoint_version")
    rows = info.get("original_vocab_size")

    def patterns(value: PickleValue | tuple[object, ...]) -> NamePatterns:
        return NamePatterns.of(_texts(value), where)

    return TensorLayouts(
        where,
        version if isinstance(version, float) else 0.0,
        replicated=patterns(info.get("tp_replicated_parameter_patterns")),
        averaged=patterns(info.get("parameter_to_average_patterns")),
        rows=patterns(info.get("parameter_with_row_parallelism_patterns")),
        halves=patterns(info.get("parameter_with_2_sub_params_cat_dim_0")),
        vocabulary=patterns(info.get("vocabulary_parameter_patterns")),
        joined=patterns(tuple(text for sub in subs for text in sub.patterns)),
        unsupported=patterns(tuple(reasons)),
        affine=patterns(tuple(maps)),
        vocabulary_rows=rows if isinstance(rows, int) else 0,
        reasons=reasons,
        maps=maps,
        widths=as_dict(info.get("sub_param_shard_widths")),
        sub_parameters=subs,
    )


def _sub_parameters(value: PickleValue) -> tuple[SubParameters, ...]:
    found = []
    for item in value if isinstance(value, list) else []:
        one = as_dict(item)
        shape, axis = one.get("shape"), one.get("partition_dim")
        if isinstance(shape, (list, tuple)):
            patterns = tuple(_texts(one.get("patterns")))
            found.append(SubParameters(patterns, tuple(shape), axis if isinstance(axis, int) else -1))
    return tuple(found)


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


def _numbers(value: PickleValue) -> list[int]:
    """Returns a list of sizes; nothing where one of them is none."""
    found = [item for item in value if isinstance(item, int)] if isinstance(value, (list, tuple)) else []
    return found if isinstance(value, (list, tuple)) and len(found) == len(value) else []


def _with(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _in_words(widths: Sequence[Sequence[int]]) -> str:
    return " and ".join(" + ".join(map(str, row)) for row in widths[:4])
