"""LoRA: low-rank factors merged into a weight.

Formulas as in peft 0.21 (``tuners/lora/layer.py``). An adapter of an embedding, or one trained with
``fan_in_fan_out``, is the same sum over transposed views, a convolution's over reshaped ones: the planner makes those.

peft casts ``scale * B @ A`` to the adapter's type before it adds, so on a 16-bit base it rounds twice; here the cast
behind the op rounds a float32 sum. On a float32 base both are the same up to the rounding of peft's own product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import one_thread
from shardmerge.ops.contract import Meta, OpKind, Param, ParamValue, State, Typed, result_dtype
from shardmerge.ops.low_rank import Factor, LowRank, check_factors, narrow


@dataclass(frozen=True, slots=True)
class Lora(LowRank):
    """``base + scale * B @ A``. Inputs: A ``[r, in]``, B ``[out, r]``, base ``[out, in]``."""

    @property
    def label(self) -> str:
        """``lora x 0.5``."""
        return f"lora x {self.scale:g}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``LoRA r 16 merged``."""
        return f"LoRA r {inputs[0].shape[0]} merged"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the base's shape."""
        a, b, base = inputs
        check_factors(self.label, a, b, base)
        return Meta(result_dtype(inputs), base.shape)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills whole rows."""
        factor = Factor.of(state)
        base, result = factor.rows_of(tiles[-1], out)
        overflows = 0
        with np.errstate(all="ignore"), one_thread():
            for rows, columns, product, total in factor.sums(tiles[1], self.scale, base):
                overflows += narrow(total, result[rows, columns], product, base[rows, columns])
        return overflows


def scale_of(values: Mapping[str, ParamValue]) -> float:
    """Returns the parameter ``scale``."""
    value = values["scale"]
    assert isinstance(value, (int, float))
    return float(value)


SCALE = Param("scale", "number", "`alpha / r`, or `alpha / sqrt(r)` for rsLoRA.", 1.0)

KINDS = (
    OpKind(
        name="lora",
        about="Adds `scale * B @ A` to a weight, in float32, rounded once. For whole adapters use `adapters:`, which "
        "finds the pairs, the scale and the special cases automatically.",
        example='q.weight: {op: lora, a: "adapter:q.lora_A", b: "adapter:q.lora_B", of: "src:q.weight", scale: 0.5}',
        params=(SCALE,),
        build=lambda values: Lora(scale_of(values)),
        terms=("a", "b"),
        lossy="the base cannot be told from the sum",
    ),
)
