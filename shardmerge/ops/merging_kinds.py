"""Merges of deltas as mapping.yaml calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardmerge.errors import MappingError
from shardmerge.ops.contract import Op, OpKind, Param, ParamValue
from shardmerge.ops.merging import Breadcrumbs, Dare, Della, TaskArithmetic, Ties
from shardmerge.ops.params import integer
from shardmerge.ops.pointwise import number, numbers

_Values = Mapping[str, ParamValue]

_WEIGHTS = Param("weights", "numbers", "One number per model in `of`. Default: 1 each.", optional=True)
_SCALE = Param("scale", "number", "The factor of the merged delta; `lambda` in mergekit.", 1)
_SEED = Param("seed", "int", "Another seed gives other random numbers.", 0)
_KEPT = "The fraction of each delta to keep, from 0 to 1; one number, or one per model."
_LOSSY = "the models of a merge are not known"
_EXAMPLE = 'x.weight: {{op: {}, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], {}}}'


def _normalize(*, default: bool, what: str = "the sum of the weights") -> Param:
    return Param("normalize", "flag", f"Whether the sum is divided by {what}.", default=default)


def _signs(*, default: bool, name: str) -> Param:
    return Param("sign_consensus", "flag", f"Whether signs are elected as in TIES{name}.", default=default)


def _rescale(default: str, *more: str) -> Param:
    density = " `density`: kept elements are divided by the density." if "density" in more else ""
    about = f"`l1`: restores the L1 norm of a trimmed delta, mergekit's `rescale`.{density} `none`: no rescaling."
    return Param("rescale", "text", about, default, choices=("none", "l1", *more))


def _shared(values: _Values) -> dict[str, object]:
    return {
        "given": numbers(values, "weights"),
        "scale": number(values, "scale"),
        "normalize": bool(values["normalize"]),
        "rescale": str(values.get("rescale", "none")),
    }


def _between(values: _Values, key: str, *, open_end: bool = False) -> tuple[float, ...]:
    """Returns numbers from 0 to 1; with ``open_end`` 0 is not among them."""
    given = values[key]
    found = numbers(values, key) if isinstance(given, tuple) else (number(values, key),)
    for value in found:
        if not 0 <= value <= 1 or (open_end and value == 0):
            expected = f"{'above 0, ' if open_end else ''}from 0 to 1"
            raise MappingError("op-value", f"`{key}` is {value}", expected=expected)
    return found


def _task_arithmetic(values: _Values) -> Op:
    return TaskArithmetic(**_shared(values))  # type: ignore[arg-type]


def _ties(values: _Values) -> Op:
    return Ties(density=_between(values, "density"), sign_consensus=True, **_shared(values))  # type: ignore[arg-type]


def _breadcrumbs(values: _Values) -> Op:
    return Breadcrumbs(
        density=_between(values, "density"),
        gamma=_between(values, "gamma"),
        sign_consensus=bool(values["sign_consensus"]),
        **_shared(values),  # type: ignore[arg-type]
    )


def _dare(values: _Values) -> Op:
    return Dare(
        density=_between(values, "density", open_end=True),
        seed=integer(values, "seed"),
        salt=str(values["salt"]),
        sign_consensus=bool(values["sign_consensus"]),
        **_shared(values),  # type: ignore[arg-type]
    )


def _della(values: _Values) -> Op:
    density, epsilon = _between(values, "density"), _between(values, "epsilon")
    for index in range(max(len(density), len(epsilon))):
        one, width = density[index % len(density)], epsilon[index % len(epsilon)]
        if 0 < one < 1 and not (one - width > 0 and one + width < 1):
            raise MappingError(
                "op-value",
                f"`epsilon` is {width} for a `density` of {one}: probabilities would leave the range from 0 to 1",
                expected=f"an epsilon below {min(one, 1 - one):g}",
            )
    return Della(
        density=density,
        epsilon=epsilon,
        seed=integer(values, "seed"),
        salt=str(values["salt"]),
        sign_consensus=bool(values["sign_consensus"]),
        **_shared(values),  # type: ignore[arg-type]
    )


def _kind(
    name: str, about: str, params: tuple[Param, ...], build: Callable[[_Values], Op], example: str = "density: 0.5"
) -> OpKind:
    return OpKind(
        name=name, about=about, example=_EXAMPLE.format(name, example), params=params, build=build, terms=("base",),
        many=True, lossy=_LOSSY,
    )  # fmt: skip


KINDS = (
    _kind(
        "task_arithmetic",
        "Adds the differences of several models to their base: `base + sum(w * (model - base))`, in float32 "
        "(Ilharco et al., 2023). The weights are not normalized by default.",
        (_WEIGHTS, _SCALE, _normalize(default=False)),
        _task_arithmetic,
        "weights: [0.5, 0.5]",
    ),
    _kind(
        "ties",
        "TIES merging (Yadav et al., 2023): keeps the largest elements of every delta, elects a sign for every "
        "element, and averages the deltas with that sign. As in mergekit, weights are normalized per element. The "
        "number of kept elements is exact; among equal magnitudes the lowest index is kept.",
        (
            Param("density", "numbers", _KEPT), _WEIGHTS, _SCALE,
            _normalize(default=True, what="the sum of the weights of those that agree"), _rescale("none"),
        ),
        _ties,
    ),
    _kind(
        "breadcrumbs",
        "Model Breadcrumbs (Davari and Belilovsky, 2023): omits the smallest changes of every delta, and the "
        "largest ones as outliers. With `sign_consensus` only deltas with the elected sign are added (mergekit's "
        "`breadcrumbs_ties`).",
        (
            Param("density", "numbers", _KEPT),
            Param("gamma", "numbers", "The fraction to omit as outliers; one number, or one per model.", 0.01),
            _WEIGHTS, _SCALE, _signs(default=False, name=""), _normalize(default=False), _rescale("none"),
        ),
        _breadcrumbs,
        "density: 0.5, gamma: 0.25",
    ),
    _kind(
        "dare",
        "DARE merging (Yu et al., 2024): keeps random elements of every delta and divides them by `density`. The "
        "random numbers depend only on `seed`, the target name and the position in the tensor. With "
        "`sign_consensus` only deltas with the elected sign are added (mergekit's `dare_ties`).",
        (
            Param("density", "numbers", "The probability to keep an element, above 0; one number, or one per model."),
            _WEIGHTS, _SCALE, _SEED, _signs(default=False, name=""), _normalize(default=False),
            _rescale("density", "density"),
        ),
        _dare,
    ),
    _kind(
        "della",
        "DELLA merging (Deep et al., 2024): as `dare`, but large changes in a row are kept with a higher probability "
        "than small ones, from `density - epsilon` to `density + epsilon` in the order of their magnitudes. Signs are "
        "elected and weights normalized, as in mergekit's `della`; with `sign_consensus: false` and `normalize: false` "
        "this is `della_linear`.",
        (
            Param("density", "numbers", "The mean probability to keep an element; one number, or one per model."),
            Param("epsilon", "numbers", "Half the range of probabilities; one number, or one per model.", 0.15),
            _WEIGHTS, _SCALE, _SEED, _signs(default=True, name=""),
            _normalize(default=True, what="the sum of the weights of those that agree"), _rescale("l1"),
        ),
        _della,
    ),
)  # fmt: skip
