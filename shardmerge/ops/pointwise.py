"""Element by element: weighted sums, comparison, and a delta added to a smaller base.

All of it is done in float32, or float64 where an input is. An element of the result depends on the same element of the
inputs alone, and every step is one IEEE operation, so the bits are the same however the tensor is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, prod

import numpy as np

from shardmerge.errors import CheckpointError, MappingError
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import (
    Arithmetic,
    Meta,
    OpKind,
    Param,
    ParamValue,
    Shape,
    State,
    Stream,
    Typed,
    result_dtype,
)
from shardmerge.ops.parts import (
    CALL_BYTES,
    OVERFLOW_BYTES,
    PART,
    count_overflows,
    parts,
    weighted_sum,
    weighted_sum_bytes,
)
from shardmerge.ops.shapes import odd_shape


def infer_floats(label: str, inputs: Sequence[Meta], least: int = 1) -> Meta:
    """Returns the type arithmetic is done in and the one shape of all inputs.

    Raises
    ------
    MappingError
        ``op-shape``: fewer than ``least`` inputs, unequal shapes, or a type that is not a float.
    """
    check_floats(label, inputs, least)
    check_shapes(label, inputs)
    return Meta(result_dtype(inputs), inputs[0].shape)


def check_floats(label: str, inputs: Sequence[Meta], least: int = 1) -> None:
    """Raises MappingError ``op-shape`` where there are too few inputs or one is not a float tensor."""
    if len(inputs) < least:
        raise odd_shape(f"{label}: there are too few tensors", len(inputs), f"at least {least}")
    if any(meta.dtype.kind != "float" for meta in inputs):
        raise odd_shape(f"{label}: only floats are computed with", [str(meta.dtype) for meta in inputs], "float types")


def check_shapes(label: str, inputs: Sequence[Meta]) -> None:
    """Raises MappingError ``op-shape`` where the inputs' shapes differ."""
    if len({meta.shape for meta in inputs}) > 1:
        raise odd_shape(f"{label}: the shapes differ", [list(meta.shape) for meta in inputs], "one shape")


def check_weights(label: str, weights: Sequence[float], count: int) -> None:
    """Raises MappingError ``op-value`` where there are weights, but not one a tensor."""
    if weights and len(weights) != count:
        raise MappingError(
            "op-value",
            f"{label}: the number of weights differs from the number of tensors",
            found=f"{len(weights)} weights for {count} tensors",
            expected=f"{count} weights",
        )


@dataclass(frozen=True, slots=True)
class Linear(Arithmetic):
    """``sum(w_i * x_i)``, summed from the first input to the last.

    Attributes
    ----------
    weights
        One an input, or none: then all are 1 over the number of inputs (the average) in ``linear``, and 1 in ``add``.
    word
        ``linear``, ``add`` or ``scale``: how the plan calls it.
    """

    weights: tuple[float, ...] = ()
    word: str = "linear"

    @property
    def label(self) -> str:
        """``linear [0.5, 0.5]``, ``linear mean``, ``add``, ``scale [2.0]``."""
        return f"{self.word} {list(self.weights)}" if self.weights else {"linear": "linear mean"}.get(self.word, "add")

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns float32 or float64, and the one shape."""
        check_weights(self.label, self.weights, len(inputs))
        return infer_floats(self.label, inputs)

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of a part and its masks."""
        return weighted_sum_bytes(inputs, count)

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from tiles as long as it."""
        each = 1.0 if self.word == "add" else 1.0 / len(tiles)
        return weighted_sum(self.weights or (each,) * len(tiles), tiles, out)


@dataclass(frozen=True, slots=True)
class AssertEqual(Arithmetic):
    """The first input, once all others were seen to have its values. NaN equals NaN, and -0 equals 0."""

    @property
    def label(self) -> str:
        """``assert equal``."""
        return "assert equal"

    def words(self, inputs: Sequence[Typed]) -> str:
        """``4 copies compared``."""
        return f"{len(inputs)} copies compared"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the first input's type and shape; floats may differ in type, all others may not."""
        check_shapes(self.label, inputs)
        if len({meta.dtype for meta in inputs}) > 1:
            check_floats(self.label, inputs)
        return inputs[0]

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of two widened parts and three masks."""
        wide = 2 * max(result_dtype(inputs).itemsize, 4) if len({meta.dtype for meta in inputs}) > 1 else 0
        return min(count, PART) * (wide + 3) + CALL_BYTES

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Copies the first tile.

        Raises
        ------
        CheckpointError
            ``not-equal``: with the index (row-major) of the first element of the tile that differs, and both values.
        """
        del state
        first = tiles[0]
        places = [(place, number) for number, tile in enumerate(tiles[1:], 1) if (place := _differs(first, tile)) >= 0]
        if places:
            place, number = min(places)
            raise CheckpointError(
                "not-equal",
                f"tensors that must be equal differ at element {start + place:,}",
                found=f"{tiles[number][place]} in tensor {number + 1}",
                expected=f"{first[place]}, as in tensor 1",
                hint="average them with `op: linear`, or take one of them, if they may differ",
            )
        np.copyto(out, first)
        return 0


def _differs(left: Array, right: Array) -> int:
    """Returns the index of the first element that differs, or -1."""
    places = ((part.start, _place(left[part], right[part])) for part in parts(len(left)))
    return next((start + place for start, place in places if place >= 0), -1)


def _place(left: Array, right: Array) -> int:
    if left.dtype != right.dtype:
        wide = np.float64 if 8 in (left.itemsize, right.itemsize) else np.float32
        left, right = left.astype(wide, copy=False), right.astype(wide, copy=False)
    with np.errstate(invalid="ignore"):
        other = left != right
        if not other.any():
            return -1
        # Only NaN differs from itself.
        other &= (left == left) | (right == right)  # noqa: PLR0124
    return int(np.argmax(other)) if other.any() else -1


@dataclass(frozen=True, slots=True)
class AddTopLeft(Arithmetic):
    """The second input with the first added to its top-left block, which may be all of it.

    LLaVA's delta weights: embeddings and ``lm_head`` have more rows than those of the base
    (``param.data[:b.shape[0], :b.shape[1]] += b`` in ``llava/model/apply_delta.py``).
    """

    @property
    def label(self) -> str:
        """``add to top left``."""
        return "add to top left"

    def infer(self, inputs: Sequence[Meta]) -> Meta:
        """Returns the delta's shape in float32 or float64; the base has as many axes (1 or 2), none longer."""
        check_floats(self.label, inputs)
        base, delta = (meta.shape for meta in inputs)
        fits = len(base) == len(delta) in (1, 2) and all(b <= d for b, d in zip(base, delta, strict=True))
        if not fits:
            what = f"{self.label}: the base does not fit into the delta"
            raise odd_shape(what, f"{list(base)} into {list(delta)}", "1 or 2 axes, none longer in the base")
        return Meta(result_dtype(inputs), delta)

    def unit(self, inputs: Sequence[Meta]) -> int:
        """Returns a row of the delta where that of the base is shorter."""
        base, delta = (_matrix(meta.shape) for meta in inputs)
        return 1 if base[1] == delta[1] else delta[1]

    def ranges(self, inputs: Sequence[Meta], start: int, count: int) -> tuple[tuple[int, int], ...]:
        """Returns the same rows of both, as far as the base has them."""
        (rows, width), (_, wide) = (_matrix(meta.shape) for meta in inputs)
        if width == wide:
            low, high = min(start, rows * width), min(start + count, rows * width)
        else:
            low, high = (min(bound // wide, rows) * width for bound in (start, start + count))
        return ((low if high > low else 0, high - low), (start, count))

    def peak(self, inputs: Sequence[Meta], count: int) -> int:
        """Returns the bytes of the masks of ``count_overflows``, twice."""
        return count * 2 * OVERFLOW_BYTES + CALL_BYTES

    def prepare(self, inputs: Sequence[Stream]) -> State:
        """Returns how long the rows of base and delta are: tiles do not say. Reads nothing."""
        base, delta = (_matrix(stream.meta.shape) for stream in inputs)
        return base[1], delta[1]

    def apply(self, state: State, tiles: Sequence[Array], start: int, out: Array) -> int:
        """Fills ``out`` from rows of the base and rows of the delta."""
        del start
        assert isinstance(state, tuple)
        width, wide = state
        base, delta = tiles
        rows = (len(base), 1) if width == wide else (len(base) // max(width, 1), width)
        with np.errstate(all="ignore"):
            np.copyto(out, delta, casting="unsafe")
            if not len(base):
                return 0
            step = 1 if width == wide else wide
            block = out[: rows[0] * step].reshape(rows[0], step)[:, : rows[1]]
            np.add(block, base.reshape(rows), out=block, dtype=out.dtype, casting="unsafe")  # widened in numpy's buffer
            near = delta[: rows[0] * step].reshape(rows[0], step)[:, : rows[1]]
            return count_overflows(block, [near, base.reshape(rows)])


def _matrix(shape: Shape) -> tuple[int, int]:
    """Returns rows and columns; a vector is one row that may be cut anywhere, so its elements are rows of one."""
    return (shape[0], 1) if len(shape) == 1 else (shape[0], prod(shape[1:]))


# --- parameters ---


def number(values: Mapping[str, ParamValue], key: str) -> float:
    """Returns a parameter that is a finite number.

    Raises
    ------
    MappingError
        ``op-value``: infinite, or not a number.
    """
    value = values[key]
    assert isinstance(value, (int, float))  # the reader of the mapping made sure
    if not isfinite(value):
        raise MappingError("op-value", f"`{key}` is {value}", expected="a finite number")
    return float(value)


def numbers(values: Mapping[str, ParamValue], key: str) -> tuple[float, ...]:
    """Returns a parameter that is a list of finite numbers, empty where it is absent."""
    value = values.get(key, ())
    assert isinstance(value, tuple)
    return tuple(number({key: item}, key) for item in value)


def _linear(word: str) -> Callable[[Mapping[str, ParamValue]], Linear]:
    return lambda values: Linear(numbers(values, "weights"), word)


def _normalized(values: Mapping[str, ParamValue]) -> Linear:
    weights = numbers(values, "weights")
    total = fsum(weights)
    if not values["normalize"] or not weights:
        return Linear(weights, "linear")
    if not total:
        what = "weights that add up to 0 cannot be divided by their sum"
        raise MappingError("op-value", what, found=str(list(weights)), expected="a sum that is not 0")
    return Linear(tuple(weight / total for weight in weights), "linear")


KINDS = (
    OpKind(
        name="linear",
        about="Computes a weighted sum of tensors, in float32. With `normalize`, the weights are divided by their sum. "
        "Without `weights`, the result is the average (Wortsman et al., *Model soups*, 2022).",
        example='x.weight: {op: linear, of: ["src:a.weight", "src:b.weight"], weights: [0.25, 0.75]}',
        params=(
            Param("weights", "numbers", "One per tensor. Default: 1/n each.", optional=True),
            Param("normalize", "flag", "Whether the weights are divided by their sum.", default=False),
        ),
        build=_normalized,
        many=True,
        lossy="the parts of a sum are not known",
    ),
    OpKind(
        name="add",
        about="Adds tensors, in float32.",
        example='x.weight: {op: add, of: ["src:base.weight", "src:delta.weight"]}',
        params=(),
        build=_linear("add"),
        many=True,
        lossy="the parts of a sum are not known",
    ),
    OpKind(
        name="scale",
        about="Multiplies a tensor by a number, in float32.",
        example='x.weight: {op: scale, of: "src:x.weight", factor: 0.5}',
        params=(Param("factor", "number", "The number."),),
        build=lambda values: Linear((number(values, "factor"),), "scale"),
        lossy="a product is rounded",
    ),
    OpKind(
        name="assert_equal",
        about="Takes the first of several tensors that must have equal values, such as a norm's replicas on "
        "tensor-parallel ranks. Float types may differ; NaN equals NaN. A difference stops the run.",
        example='norm.weight: {op: assert_equal, of: "src:rank{r*}.norm.weight"}',
        params=(),
        build=lambda _: AssertEqual(),
        many=True,
        lossy="how many tensors there were is not known",
    ),
    OpKind(
        name="add_top_left",
        about="Adds a base to delta weights, such as LLaVA's. If the delta is larger (new vocabulary rows), the base "
        "is added to its top-left block. One or two axes.",
        example='lm_head.weight: {op: add_top_left, base: "src:base.lm_head.weight", of: "src:delta.lm_head.weight"}',
        params=(),
        build=lambda _: AddTopLeft(),
        terms=("base",),
        lossy="the parts of a sum are not known",
    ),
)
