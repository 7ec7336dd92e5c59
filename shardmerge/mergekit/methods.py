"""The methods of mergekit 0.1.5 as ops: which parameters each has, their names here, and what they are by default.

From the ``MergeMethodSpec`` of each method (``mergekit/merge_methods/``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# Where the base goes: it is needed as one, may be one, is the first input, or is a model as the others.
BasePlace = Literal["needed", "optional", "first", "model"]


@dataclass(frozen=True, slots=True)
class Method:
    """A method.

    Attributes
    ----------
    op
        What it is called here; ``""`` for a tensor as it is.
    each, shared
        Our name of a parameter that every model has, or that there is once.
    usual
        Values of parameters that nobody states, by mergekit's names; without one a parameter that is not stated is
        left out, and those of ``needed`` must be stated.
    fixed
        Parameters of ours that the method stands for.
    models
        How many there may be beside a base, at most.
    idle
        Parameters that change nothing in the result.
    """

    op: str
    base: BasePlace = "needed"
    each: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    models: int = 1000
    idle: tuple[str, ...] = ()


def _tasks(op: str, *, normalize: str, rescale: str, each: Mapping[str, str] | None = None, **fixed: str) -> Method:
    """Returns a method of ``generalized_task_arithmetic.py``."""
    rescales = {"rescale": "rescale"} if op != "task_arithmetic" else {}
    return Method(
        op,
        each={"weight": "weights", **({"density": "density"} if rescales else {}), **(each or {})},
        shared={"normalize": "normalize", "lambda": "scale", **rescales},
        usual={"density": "1.0", "gamma": "0.01", "epsilon": "0.15", "normalize": normalize, "rescale": rescale},
        needed=("weight",),
        fixed=fixed,
        idle=("int8_mask", *(() if rescales else ("density", "rescale"))),
    )


METHODS: dict[str, Method] = {
    "linear": Method(
        "linear", "model", {"weight": "weights"}, {"normalize": "normalize"}, {"normalize": "true"}, ("weight",)
    ),
    "slerp": Method("slerp", "first", shared={"t": "t"}, needed=("t",), models=1),
    "nuslerp": Method(
        "nuslerp", "optional", {"weight": "weights"},
        {"nuslerp_flatten": "nuslerp_flatten", "nuslerp_row_wise": "nuslerp_row_wise"}, needed=("weight",), models=2,
    ),
    "multislerp": Method(
        "multislerp", "optional", {"weight": "weights"}, {"normalize_weights": "normalize"}, needed=("weight",)
    ),
    "karcher": Method("karcher", "model", shared={"max_iter": "max_iter", "tol": "tol"}),
    "task_arithmetic": _tasks("task_arithmetic", normalize="false", rescale="false"),
    "ties": _tasks("ties", normalize="true", rescale="false"),
    "dare_linear": _tasks("dare", normalize="false", rescale="true"),
    "dare_ties": _tasks("dare", normalize="false", rescale="true", sign_consensus="true"),
    "breadcrumbs": _tasks("breadcrumbs", normalize="false", rescale="false", each={"gamma": "gamma"}),
    "breadcrumbs_ties": _tasks(
        "breadcrumbs", normalize="false", rescale="false", each={"gamma": "gamma"}, sign_consensus="true"
    ),
    "della": _tasks("della", normalize="true", rescale="true", each={"epsilon": "epsilon"}),
    "della_linear": _tasks(
        "della", normalize="false", rescale="true", each={"epsilon": "epsilon"}, sign_consensus="false"
    ),
    "sce": Method("sce", shared={"select_topk": "select_topk"}, idle=("int8_mask",)),
    "ram": Method("ram", shared={"epsilon": "epsilon"}),
    "ramplus_tl": Method("ram", shared={"r": "r", "alpha": "alpha", "epsilon": "epsilon"}, usual={"r": "0.1"}),
    "model_stock": Method("model_stock", shared={"filter_wise": "filter_wise"}),
    "nearswap": Method("nearswap", shared={"t": "t"}, needed=("t",), models=1),
    "arcee_fusion": Method("arcee_fusion", models=1),
    "passthrough": Method("", "model", each={"scale": "factor"}, models=1),
}  # fmt: skip

# Parameters whose value is true or false.
FLAGS = {
    "normalize", "rescale", "int8_mask", "normalize_weights", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise",
}  # fmt: skip
# All that any method has; one of another method has no effect, as in mergekit.
KNOWN = {name for method in METHODS.values() for name in (*method.each, *method.shared, *method.idle)} | {"eps"}
