"""Model stock: how far from the base the average of fine-tuned models is best, by the angles between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from shardmerge.ops.contract import Meta, OpKind, Param
from shardmerge.ops.shapes import odd_shape
from shardmerge.ops.spanned import Factors, Gram, Spanned

# mergekit's: the least product of norms that is divided by, and the least denominator.
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class ModelStock(Spanned):
    """``t * mean(model_i) + (1 - t) * base`` (Jang et al., "Model Stock", 2024), as mergekit's ``model_stock``.

    ``t = n c / (1 + (n - 1) c)``, where c is the mean cosine between any two of n deltas; 0 where that has no value.

    Attributes
    ----------
    filter_wise
        Whether each row has a t of its own.
    """

    filter_wise: bool = False

    @property
    def label(self) -> str:
        """``model stock``."""
        return "model stock filter-wise" if self.filter_wise else "model stock"

    @property
    def along(self) -> str:
        """Rows, or the whole."""
        return "rows" if self.filter_wise else "whole"

    @property
    def from_base(self) -> bool:
        """Always."""
        return True

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        if len(inputs) < 3:
            what = f"{self.label}: angles are between two models at least"
            raise odd_shape(what, f"{len(inputs) - 1} model", "a base and 2 models")
        return Spanned.infer(self, inputs)

    def factors(self, gram: Gram) -> Factors:
        """Returns the factors of the deltas, which are equal."""
        count = len(gram)
        norms = [np.sqrt(gram[index, index]) for index in range(count)]
        pairs = [
            np.clip(gram[i, j] / np.maximum(norms[i] * norms[j], _LEAST), -1, 1)
            for i, j in combinations(range(count), 2)
        ]
        cosine = sum(pairs[1:], pairs[0]) / len(pairs)
        below = 1 + (count - 1) * cosine
        t = np.where(np.abs(below) < _LEAST, 0, count * cosine / below)
        return np.stack([t / count] * count)


KINDS = (
    OpKind(
        name="model_stock",
        about="Model Stock (Jang et al., 2024): the average of fine-tuned models, moved towards their base by the "
        "angles between their differences: wider angles, closer to the base. Needs two models and their base.",
        example='x.weight: {op: model_stock, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"]}',
        params=(Param("filter_wise", "flag", "Whether each row has its own angles.", default=False),),
        build=lambda values: ModelStock(bool(values["filter_wise"])),
        terms=("base",),
        many=True,
        lossy="the models of a merge are not known",
    ),
)
