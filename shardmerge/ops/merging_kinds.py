"""Merges of deltas as mapping.yaml calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardmerge.errors import MappingError
from shardmerge.ops.contract import Op, OpKind, Param, ParamValue
from shardmerge.ops.merging import Breadcrumbs, Dare, Della, TaskArithmetic, Ties
from shardmerge.ops.params import integer
from shardmerge.ops.pointwise import number, numbers

_Values = Mapping[str, ParamValue]

_WEIGHTS = Param("weights", "numbers", "One a model of `of`. 1 each where absent.", optional=True)
_SCALE = Param("scale", "number", "What the merged delta is multiplied with; `lambda` in mergekit.", 1)
_SEED = Param("seed", "int", "Another seed gives other random numbers.", 0)
_KEPT = "The part of each delta that is kept, from 0 to 1; one number, or one a model."
_LOSSY = "the models of a merge are not known"
_EXAMPLE = 'x.weight: {{op: {}, base: "src:base.weight", of: ["src:a.weight", "src:b.weight"], {}}}'


def _normalize(*, default: bool, what: str = "the sum of the weights") -> Param:
    return Param("normalize", "flag", f"Whether the sum is divided by {what}.", default=default)


def _signs(*, default: bool, name: str) -> Param:
    return Param("sign_consensus", "flag", f"Whether signs are elected as in TIES{name}.", default=default)


def _rescale(default: str, *more: str) -> Param:
    density = " `density`: a kept element is divided by the density." if "density" in more else ""
    about = f"`l1`: a trimmed delta is given the L1 norm it had, mergekit's `rescale`.{density} `none`: nothing."
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
        "Adds what several models learned to their base: `base + sum(w * (model - base))`, in float32 (Ilharco "
        "et al., 2023). The weights are not normalised unless that is asked for.",
        (_WEIGHTS, _SCALE, _normalize(default=False)),
        _task_arithmetic,
        "weights: [0.5, 0.5]",
    ),
    _kind(
        "ties",
        "TIES merging (Yadav et al., 2023): keeps the largest part of every delta, elects a sign for every "
        "element, and averages the deltas of that sign. As in mergekit, weights are normalised per element. The "
        "number kept is exact; among equal magnitudes the lowest index is kept.",
        (
            Param("density", "numbers", _KEPT), _WEIGHTS, _SCALE,
            _normalize(default=True, what="the sum of the weights of those that agree"), _rescale("none"),
        ),
        _ties,
    ),
    _kind(
        "breadcrumbs",
        "Model Breadcrumbs (Davari and Belilovsky, 2023): leaves out the smallest changes of every delta, and the "
        "largest, which are outliers. With `sign_consensus` only deltas of the elected sign are added (mergekit's "
        "`breadcrumbs_ties`).",
        (
            Param("density", "numbers", _KEPT),
            Param("gamma", "numbers", "The part of each delta that goes as outliers; one, or one a model.", 0.01),
            _WEIGHTS, _SCALE, _signs(default=False, name=""), _normalize(default=False), _rescale("none"),
        ),
        _breadcrumbs,
        "density: 0.5, gamma: 0.25",
    ),
    _kind(
        "dare",
        "DARE merging (Yu et al., 2024): keeps a random part of every delta and divides it by `density`. The "
        "numbers depend on `seed`, the target's name and the place in the tensor, and on nothing else. With "
        "`sign_consensus` only deltas of the elected sign are added (mergekit's `dare_ties`).",
        (
            Param("density", "numbers", "The probability that an element is kept, above 0; one, or one a model."),
            _WEIGHTS, _SCALE, _SEED, _signs(default=False, name=""), _normalize(default=False),
            _rescale("density", "density"),
        ),
        _dare,
    ),
    _kind(
        "della",
        "DELLA merging (Deep et al., 2024): as `dare`, but large changes of a row are kept with a higher probability "
        "than small ones, from `density - epsilon` to `density + epsilon` in the order of their magnitudes. Signs are "
        "elected and weights normalised, as in mergekit's `della`; with `sign_consensus: false` and `normalize: false` "
        "it is `della_linear`.",
        (
            Param("density", "numbers", "The mean probability that an element is kept; one number, or one a model."),
            Param("epsilon", "numbers", "Half the range of probabilities; one number, or one a model.", 0.15),
            _WEIGHTS, _SCALE, _SEED, _signs(default=True, name=""),
            _normalize(default=True, what="the sum of the weights of those that agree"), _rescale("l1"),
        ),
        _della,
    ),
)  # fmt: skip
