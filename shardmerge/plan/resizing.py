"""A tensor over the vocabulary with more or fewer rows than its source has."""

from __future__ import annotations

from shardmerge.compose import compose
from shardmerge.ops.cutting import Slice
from shardmerge.ops.joining import Concat
from shardmerge.ops.vocabulary import NewRows
from shardmerge.targets.expectation import Resize
from shardmerge.tensors import Shape, TensorEntry


def resized(entry: TensorEntry, shape: Shape, resize: Resize) -> TensorEntry:
    """Returns the entry with as many rows (dim 0) as ``shape`` says: cut off at the end, or with new ones behind."""
    rows = shape[0] - entry.shape[0]
    if rows < 0:
        return compose(Slice(0, 0, shape[0]), [entry])
    new = compose(NewRows(rows, resize.how, resize.row, resize.seed), [entry])
    return compose(Concat(0), [entry, new])
