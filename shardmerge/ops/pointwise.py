"""Sums of tensors, element by element, and the test that tensors are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardmerge.errors import CheckpointError, MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Arithmetic, Meta, OpKind, Param, State, Value, result_dtype


def same_shape(label: str, inputs: Sequence[Meta]) -> Meta:
    """Returns type and shape of arithmetic over tensors that must be floats of one shape."""
    first = inputs[0]
    odd = next((one for one in inputs if one.shape != first.shape or one.dtype.kind != "float"), None)
    if odd is not None:
        raise MappingError(
            "op-shape",
            f"{label}: the tensors cannot be added up",
            found=f"{first.dtype} {list(first.shape)} and {odd.dtype} {list(odd.shape)}",
            expected="floats of one shape",
            hint="are these models of one architecture?",
        )
    return Meta(result_dtype(inputs), first.shape)


@dataclass(frozen=True, slots=True)
class Linear(Arithmetic):
    """The sum of the inputs, each times its weight, plus ``bias``; added up in the order of the inputs."""

    weights: tuple[float, ...]
    bias: float = 0.0

    @property
    def label(self) -> str:
        """``linear [1, 0.5]``."""
        bias = f" + {self.bias:g}" if self.bias else ""
        return f"linear [{', '.join(f'{weight:g}' for weight in self.weights)}]{bias}"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the common shape."""
        if len(inputs) != len(self.weights):
            what = f"{self.label}: not one weight a tensor"
            raise MappingError("op-value", what, found=f"{len(inputs)} tensors", expected=f"{len(self.weights)}")
        return same_shape(self.label, inputs)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """One product and one widened tile."""
        return 2 * count * result_dtype(inputs).itemsize

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range."""
        out[...] = self.bias
        for weight, tile in zip(self.weights, tiles, strict=True):
            product = tile.astype(out.dtype)
            product *= out.dtype.type(weight)
            out += product
        return 0


@dataclass(frozen=True, slots=True)
class AssertEqual(Arithmetic):
    """The first input, once all others are seen to have its values: what every rank holds alike, tied weights."""

    @property
    def label(self) -> str:
        """``assert equal``."""
        return "assert equal"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the first one's."""
        odd = next((one for one in inputs if one.shape != inputs[0].shape), None)
        if odd is not None:
            found = f"{list(inputs[0].shape)} and {list(odd.shape)}"
            raise MappingError("op-shape", "tensors that should be equal have different shapes", found=found)
        return inputs[0]

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Two widened tiles and masks."""
        return 2 * count * 8 + 6 * count

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills any range, or raises CheckpointError ``not-equal`` with the first element that differs."""
        first = _wide(tiles[0])
        for number, other in enumerate(tiles[1:], start=2):
            wide = _wide(other)
            unequal = ~((first == wide) | ((first != first) & (wide != wide)))  # noqa: PLR0124  # NaN equals NaN here
            if unequal.any():
                at = int(unequal.argmax())
                raise CheckpointError(
                    "not-equal",
                    "tensors that should be equal are not",
                    where=f"element {start + at} of tensor {number}",
                    found=str(wide[at]),
                    expected=str(first[at]),
                    hint="`shardmerge explain` shows which tensors these are",
                )
        out[...] = tiles[0]
        return 0


def _wide(tile: Array) -> Array:
    narrow = tile.dtype.itemsize < 4 and tile.dtype.kind not in "iub"
    return tile.astype(np.float32) if narrow else tile


def numbers(values: Mapping[str, Value], key: str) -> tuple[float, ...]:
    """Returns a parameter that is a list of numbers."""
    value = values[key]
    assert isinstance(value, tuple)  # the reader of the mapping made sure
    return tuple(float(one) for one in value)


def number(values: Mapping[str, Value], key: str) -> float:
    """Returns a parameter that is a number."""
    value = values[key]
    assert isinstance(value, (int, float))
    return float(value)


KINDS = (
    OpKind(
        name="linear",
        about="Adds tensors up, each times its weight: averages of checkpoints, deltas.",
        example='{n}.weight: {op: linear, of: ["a:{n}.weight", "b:{n}.weight"], weights: [0.5, 0.5]}',
        params=(
            Param("weights", "numbers", "One for each tensor."),
            Param("bias", "number", "Added to every element.", 0.0),
        ),
        build=lambda values: Linear(numbers(values, "weights"), number(values, "bias")),
        many=True,
        lossy="the summands cannot be told from the sum",
    ),
    OpKind(
        name="scale",
        about="Multiplies a tensor by a number.",
        example='{n}.weight: {op: scale, of: "a:{n}.weight", by: 0.5}',
        params=(Param("by", "number", "The factor."),),
        build=lambda values: Linear((number(values, "by"),)),
        lossy="the product is rounded",
    ),
    OpKind(
        name="assert_equal",
        about="Takes the first of several tensors, and stops if another one differs: norms that every tensor-parallel "
        "rank holds, or a head that should be tied to the embedding.",
        example='norm.weight: {op: assert_equal, of: "src:{r*}.norm.weight"}',
        params=(),
        build=lambda values: AssertEqual(),
        many=True,
        lossy="how many tensors were equal is not known",
    ),
)
