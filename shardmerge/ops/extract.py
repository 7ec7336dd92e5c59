"""The way back of a LoRA: the factors of what a training changed, by a truncated SVD.

``tuned - base = U S V^T``; ``A = sqrt(S_r) V_r^T`` and ``B = U_r sqrt(S_r)``, so that ``B @ A`` is the best product of
its rank (Eckart and Young), at a scale of 1. The roots keep both of one size, as mergekit's ``mergekit-extract-lora``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from shardmerge.dtypes import DTYPES, DType
from shardmerge.errors import MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.blas import PRODUCT_BYTES, one_thread
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, ParamValue, State, Stream, Typed, result_dtype
from shardmerge.ops.leading import Streamed, directions, directions_bytes, projected


@dataclass(frozen=True, slots=True)
class LoraExtract(Arithmetic):
    """A ``[rank, in]`` or B ``[out, rank]`` of ``tuned - base``. Inputs: base, tuned, ``[out, in]``.

    Attributes
    ----------
    rank
        At most the smaller side of the weight.
    take
        ``A`` or ``B``.
    """

    rank: int
    take: str

    multiplies: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """``lora_extract A of rank 16``."""
        return f"lora_extract {self.take} of rank {self.rank}"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``LoRA r 16 extracted``."""
        del inputs
        return f"LoRA r {self.rank} extracted"

    @property
    def own(self) -> DType | None:
        """float32: what is left of a difference has more digits than the 16 bits of its weights."""
        return DTYPES["F32"]

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the factor's shape."""
        base, tuned = inputs
        fits = base.shape == tuned.shape and len(base.shape) == 2 and {base.dtype.kind, tuned.dtype.kind} == {"float"}
        if not fits:
            raise MappingError(
                "op-shape",
                f"{self.label}: base and tuned model are not float matrices of the same shape",
                found=f"base {list(base.shape)}, tuned {list(tuned.shape)}",
                hint="name as the base the model that the training began with",
            )
        if not 0 < self.rank <= min(base.shape):
            raise MappingError(
                "op-shape",
                f"{self.label}: the weight {list(base.shape)} has a lower rank",
                expected=f"at most {min(base.shape)}",
                hint=f"say `--let rank={min(base.shape)}`, or a smaller number",
            )
        rows, columns = base.shape
        return Meta(result_dtype(inputs), (self.rank, columns) if self.take == "A" else (rows, self.rank))

    @property
    def preparing(self) -> LoraExtract:
        """Both factors come of one search."""
        return replace(self, take="")

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Nothing: the factors are in the state."""
        return (0, 0), (0, 0)

    def state_peak(self, inputs: Sequence[Meta]) -> int:
        """The search for the directions, and the factors."""
        rows, columns = inputs[0].shape
        return directions_bytes(inputs, self.rank) + 8 * self.rank * (rows + columns) + PRODUCT_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns both factors, A and B."""
        base, tuned = inputs
        matrix = Streamed((tuned, base))
        with np.errstate(all="ignore"), one_thread():
            found = directions(matrix, self.rank)
            roots = np.sqrt(found.lengths)
            inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
            if not found.right:
                return projected(matrix, found.vectors) * inverse[:, None], found.vectors * roots
            b = np.empty((matrix.shape[0], self.rank))
            for rows, block in matrix.blocks():
                np.matmul(block, found.vectors.T, out=b[rows])
            b *= inverse
            return found.vectors * roots[:, None], b

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Nothing but what numpy takes for a copy."""
        return 1 << 18

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range."""
        assert isinstance(state, tuple)
        factor = state["AB".index(self.take)]
        np.copyto(out, factor.reshape(-1)[start : start + len(out)], casting="unsafe")
        return 0


def _build(values: Mapping[str, ParamValue]) -> LoraExtract:
    rank, take = values["rank"], values["take"]
    assert isinstance(rank, int)
    if take not in ("A", "B"):
        raise MappingError("op-value", f"lora_extract has no part {take!r}", expected="take: A, or take: B")
    return LoraExtract(rank, take)


KINDS = (
    OpKind(
        name="lora_extract",
        about="Computes a factor of the best low-rank approximation of a difference: `B @ A` is closest to "
        "`of - base`. Computed by numpy's LAPACK in float64, one weight at a time, in about `40 * n ** 2` bytes, with "
        "n the smaller side. The preset `peft/extract` makes a whole adapter.",
        example='q.lora_A: {op: lora_extract, base: "src:base.q.weight", of: "src:tuned.q.weight", rank: 1, take: A}',
        params=(
            Param("rank", "int", "The number of rows of A."),
            Param("take", "text", "`A` with shape `[rank, in]`, or `B` with shape `[out, rank]`."),
        ),
        build=_build,
        terms=("base",),
        lossy="what the rank leaves out is gone",
    ),
)
