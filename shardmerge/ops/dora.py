"""DoRA: a weight with LoRA's product added, each row of which then gets a length of its own.

Formulas as in peft 0.21 (``tuners/lora/dora.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import one_thread
from shardmerge.ops.contract import Meta, OpKind, State, Typed, result_dtype
from shardmerge.ops.lora import SCALE, scale_of
from shardmerge.ops.low_rank import Factor, LowRank, check_factors, narrow, sum_bytes


@dataclass(frozen=True, slots=True)
class Dora(LowRank):
    """``magnitude * W / ||W||`` by rows, where ``W = base + scale * B @ A``.

    Inputs: A ``[r, in]``, B ``[out, r]``, magnitude ``[out]``, base ``[out, in]``. The norm is that of ``W`` itself, as
    in peft, with no epsilon: a row of zeros has no direction and becomes NaN, which is counted as overflow.
    """

    @property
    def label(self) -> str:
        """``dora x 0.5``."""
        return f"dora x {self.scale:g}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``DoRA r 16 merged``."""
        return f"DoRA r {inputs[0].shape[0]} merged"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, magnitude, base = inputs
        check_factors(self.label, a, b, base, magnitude)
        if magnitude.shape != base.shape[:1]:
            what = f"{self.label}: the magnitude is not one number a row"
            raise MappingError("op-shape", what, found=str(list(magnitude.shape)), expected=str([base.shape[0]]))
        return Meta(result_dtype(inputs), base.shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """What a sum takes beside the state, and four numbers a row."""
        return sum_bytes(inputs, count) + 4 * 8 * (count // max(inputs[-1].shape[1], 1))

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows: first with ``W``, then each row times its factor."""
        factor = Factor.of(state)
        base, result = factor.rows_of(tiles[-1], out)
        with np.errstate(all="ignore"), one_thread():
            norms = self.fill(factor, tiles[1], base, result)
            return _scale_rows(factor, tiles[2].astype(np.float64) / norms, result, base)

    def fill(self, factor: Factor, b: Array, base: Array, result: Array) -> Array:
        """Fills ``result`` with ``W``; returns the norm of each row, summed in float64 before the rounding."""
        squares = np.zeros(len(base))
        for rows, columns, _, total in factor.sums(b, self.scale, base):
            np.copyto(result[rows, columns], total, casting="unsafe")
            squares[rows] += np.square(total, out=total).sum(axis=1)
        return np.sqrt(squares, out=squares)


@dataclass(frozen=True, slots=True)
class DoraOnto(LowRank):
    """DoRA onto a weight that other adapters have changed: ``magnitude * (base + D) / ||untouched + D||`` by rows.

    ``D`` is ``scale * B @ A``. The norm is that of the weight that the adapter was trained on, as in peft 0.21
    (``DoraLinearVariant.merge_unsafe``; huggingface/peft#3608), where all adapters are active on one model.

    Inputs: A ``[r, in]``, B ``[out, r]``, magnitude ``[out]``, untouched ``[out, in]``, base ``[out, in]``.
    """

    @property
    def label(self) -> str:
        """``dora x 0.5 onto changed rows``."""
        return f"dora x {self.scale:g} onto changed rows"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``DoRA r 16 merged``."""
        return self._dora.words(inputs)

    @property
    def _dora(self) -> Dora:
        return Dora(self.scale)

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, magnitude, untouched, base = inputs
        self._dora.infer((a, b, magnitude, untouched))
        self._dora.infer((a, b, magnitude, base))
        return Meta(result_dtype(inputs), base.shape)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """That of DoRA: the norms come first, and their buffers are gone before the sum is made."""
        return self._dora.peak(inputs, count)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows: the norms over the untouched weight, then the sum, then each row times its factor."""
        factor = Factor.of(state)
        untouched, base, result = factor.rows_of(*tiles[-2:], out)
        with np.errstate(all="ignore"), one_thread():
            norms = self._dora.fill(factor, tiles[1], untouched, result)
            self._dora.fill(factor, tiles[1], base, result)
            return _scale_rows(factor, tiles[2].astype(np.float64) / norms, result, base)


def _scale_rows(factor: Factor, lengths: Array, result: Array, base: Array) -> int:
    """Multiplies each row of ``result`` by a number; returns how many are not finite where ``base`` is."""
    overflows = 0
    for columns in factor.panels():
        for rows in factor.blocks(len(result)):
            wide = factor.widened(result[rows, columns])
            wide *= lengths[rows, None]
            overflows += narrow(wide, result[rows, columns], base[rows, columns])
    return overflows


KINDS = (
    OpKind(
        name="dora",
        about="Adds `scale * B @ A` to a weight and scales each row to the norm `magnitude`, in float32, rounded once.",
        example='q_proj.weight: {op: dora, a: "adapter:q.lora_A", b: "adapter:q.lora_B", '
        'magnitude: "adapter:q.magnitude", of: "src:q.weight", scale: 0.5}',
        params=(SCALE,),
        build=lambda values: Dora(scale_of(values)),
        terms=("a", "b", "magnitude"),
        lossy="the base cannot be told from the result",
    ),
)
