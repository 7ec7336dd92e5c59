"""One tensor of a merge of mergekit as a term of a mapping: its op, its models, its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardmerge.errors import MappingError
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.settings import interpolated
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.mergekit.config import (
    MergeConfig,
    MergeInput,
    MergeSlice,
    Parameter,
    ParameterCase,
    Parameters,
    flag_of,
    not_sayable,
)
from shardmerge.mergekit.methods import FLAGS, KNOWN, METHODS, Method
from shardmerge.ops.registry import OPS

# Text behind a key, a list of terms, or a term: what a mapping says, before it is written.
Written: TypeAlias = "str | list[Written] | dict[str, Written]"
Refer: TypeAlias = Callable[[str], Written]


@dataclass(frozen=True, slots=True)
class Moment:
    """For which tensors a term is.

    Attributes
    ----------
    name
        One tensor, or ``""`` for all of a rule.
    place
        Its place among the layers, from 0 to 1; None where the mapping is to find it.
    names
        Those of the rule, among which a filter has to find one; empty for not known.
    """

    name: str = ""
    place: float | None = None
    names: tuple[str, ...] = ()


def method_of(config: MergeConfig) -> Method:
    """Returns the method; raises ``not-sayable`` for one that is not known."""
    if config.method not in METHODS:
        hint = did_you_mean(config.method, METHODS) or f"there are {', '.join(METHODS)}"
        raise not_sayable(f"the method `{config.method}`", config.method_mark, hint)
    return METHODS[config.method]


def term(config: MergeConfig, part: MergeSlice, refer: Refer, moment: Moment) -> Written:
    """Returns what a tensor of a merge is made of.

    Parameters
    ----------
    config, part
        The merge, and which of its slices.
    refer
        Returns the reference for a model as it is written.
    moment
        For which tensors.

    Raises
    ------
    MappingError
        ``not-sayable``: too many or too few models, a parameter without a value, or one that is not known.
    """
    method, base = method_of(config), part.base or config.base
    scopes = (part.parameters, config.parameters)
    inputs = _inputs(method, part, base)
    models = [one for one in inputs if one.model != base or method.base == "model"]
    _check(config, method, part, inputs, models, base)
    known = {*KNOWN}
    for parameters in (*scopes, *(one.parameters for one in inputs)):
        _check_names(parameters, known)
    fields: dict[str, Written] = {"op": method.op}
    if base and method.base in ("needed", "optional"):
        fields["base"] = refer(base)
    ordered = [*([_base(inputs, base)] if method.base == "first" else []), *models]
    fields["of"] = [refer(one.model) for one in ordered]
    for name, ours in method.each.items():
        values = [_setting(method, name, (one.parameters, *scopes), moment, part.mark) for one in ordered]
        _put_each(fields, ours, values)
    for name, ours in method.shared.items():
        value = _setting(method, name, scopes, moment, part.mark)
        if value is not None:
            fields[ours] = value
    fields |= method.fixed
    if not method.op:
        return _passed_on(fields)
    return _tidy(method.op, fields)


def _inputs(method: Method, part: MergeSlice, base: str) -> list[MergeInput]:
    """Returns the models of a slice, the base among them where all layers are merged."""
    inputs = list(part.inputs)
    if base and all(one.model != base for one in inputs) and all(one.layers is None for one in inputs):
        inputs.append(MergeInput(base, None, {}, part.mark))
    return inputs


def _base(inputs: Sequence[MergeInput], base: str) -> MergeInput:
    return next(one for one in inputs if one.model == base)


def _check(
    config: MergeConfig,
    method: Method,
    part: MergeSlice,
    inputs: Sequence[MergeInput],
    models: Sequence[MergeInput],
    base: str,
) -> None:
    twice = {one.model for one in inputs if sum(one.model == other.model for other in inputs) > 1}
    if twice:
        what = f"{', '.join(sorted(twice))} twice in one merge: mergekit takes the parameters of the first for both"
        raise not_sayable(what, part.mark, "add up its weights, and write it once")
    if method.base in ("needed", "first") and not base:
        raise not_sayable(f"`{config.method}` without a base", config.mark, "add `base_model: PATH`")
    if method.base in ("needed", "first") and all(one.model != base for one in inputs):
        raise not_sayable(f"a slice without its base {base}", part.mark, "add the layers of the base to its `sources`")
    least = (
        2 if config.method in ("nuslerp", "model_stock") else 0 if method.base == "needed" and method.models > 1 else 1
    )
    if not least <= len(models) <= method.models:
        beside = " beside the base" if method.base != "model" else ""
        what = f"`{config.method}` of {len(models)} models{beside}"
        raise not_sayable(what, part.mark, f"write {least if len(models) < least else method.models}")


def _check_names(parameters: Parameters, known: Iterable[str]) -> None:
    for name, parameter in parameters.items():
        if name not in known:
            raise not_sayable(f"the parameter `{name}`, which no method has", parameter.mark, did_you_mean(name, known))
        if name == "eps" and _constant(parameter) not in ("1e-8", "1e-08", "0.00000001"):
            raise not_sayable("another `eps` than 1e-8", parameter.mark, "remove it")


def _constant(parameter: Parameter) -> str:
    first = parameter.cases[0] if parameter.cases else None
    return first.points[0] if first is not None and len(parameter.cases) == len(first.points) == 1 else ""


def _put_each(fields: dict[str, Written], ours: str, values: list[Written | None]) -> None:
    """Puts a parameter that each model has: one number where all are equal and the op takes one for all.

    A gradient is never written once for all: a list of numbers is one a model.
    """
    found = [value for value in values if value is not None]
    same = bool(found) and isinstance(found[0], str) and all(value == found[0] for value in found)
    if found and (ours == "factor" or (same and ours != "weights")):
        fields[ours] = found[0]
    elif found:
        fields[ours] = found


def _setting(method: Method, name: str, scopes: Sequence[Parameters], moment: Moment, mark: Mark) -> Written | None:
    """Returns a parameter: the cases of the nearest scope, and of wider ones where its filters fit nothing."""
    stated = [scope[name] for scope in scopes if name in scope]
    cases = [case for parameter in stated for case in parameter.cases]
    if name in method.usual:
        cases.append(ParameterCase("", (method.usual[name],)))
    elif not method.op:
        cases.append(ParameterCase("", ("1.0",)))  # a tensor that no filter fits stays
    last = next((place for place, case in enumerate(cases) if not case.filter), len(cases))
    if not cases or (not stated and not method.op):
        if name in method.needed:
            raise not_sayable(f"`{name}` of a model that has none", mark, f"add `{name}: NUMBER` to its parameters")
        return None
    cases = _fitting(cases[: last + 1], moment)
    where = stated[0].mark if stated else mark
    if name in FLAGS:
        return _flag(name, cases, where)
    for point in (point for case in cases for point in case.points):
        _check_number(point, name, where)
    return _numbers(cases, moment)


def _fitting(cases: list[ParameterCase], moment: Moment) -> list[ParameterCase]:
    """Returns the cases that can decide for a tensor of the rule; the one that does, for a single tensor."""
    if moment.name:
        return [next((case for case in cases if case.filter in moment.name), ParameterCase("", ("0",)))]
    if not moment.names:
        return cases
    found, left = [], list(moment.names)
    for case in cases:
        if any(case.filter in name for name in left):
            found.append(case)
            left = [name for name in left if case.filter not in name]
    return found


def _flag(name: str, cases: Sequence[ParameterCase], mark: Mark) -> str:
    if len(cases) != 1 or cases[0].filter or len(cases[0].points) != 1:
        raise not_sayable(f"a `{name}` that differs from tensor to tensor", mark, f"write `{name}: true` or `false`")
    value = flag_of(cases[0].points[0])
    if value is None:
        raise MappingError("wrong-kind", f"`{name}` is true or false", where=str(mark), found=cases[0].points[0])
    return "true" if value else "false"


def _check_number(text: str, name: str, mark: Mark) -> None:
    try:
        float(text)
    except ValueError:
        raise MappingError("wrong-kind", f"`{name}` is a number", where=str(mark), found=text) from None


def _numbers(cases: Sequence[ParameterCase], moment: Moment) -> Written:
    """Returns one number, points, or cases."""
    values = [_points(case.points, moment) for case in cases]
    if len(cases) == 1 and not cases[0].filter:
        return values[0]
    return [
        {**({"filter": case.filter} if case.filter else {}), "value": value}
        for case, value in zip(cases, values, strict=True)
    ]


def _points(points: Sequence[str], moment: Moment) -> Written:
    if len(points) == 1:
        return points[0]
    if moment.place is None:
        return list(points)
    return repr(interpolated(tuple(map(float, points)), moment.place))


def _passed_on(fields: Mapping[str, Written]) -> Written:
    """Returns a model's tensor as it is, or scaled."""
    (only,) = fields["of"] if isinstance(fields["of"], list) else ("",)
    if "factor" not in fields or fields["factor"] in ("1", "1.0"):
        return only
    return {"op": "scale", "of": only, "factor": fields["factor"]}


def _tidy(op: str, fields: dict[str, Written]) -> Written:
    """Returns the fields in words of the op, without those that it has by itself."""
    if "rescale" in fields:
        fields["rescale"] = "l1" if fields["rescale"] == "true" else "none"
    flatten, by_row = (fields.pop(f"nuslerp_{word}", "") for word in ("flatten", "row_wise"))
    if flatten == "false":
        fields["along"] = "columns" if by_row == "true" else "rows"
    usual = {param.name: param.default for param in OPS[op].params}
    return {key: value for key, value in fields.items() if not _is_usual(value, usual.get(key))}


def _is_usual(value: Written, usual: object) -> bool:
    if not isinstance(value, str) or usual is None or isinstance(usual, tuple):
        return False
    if isinstance(usual, bool):
        return value == str(usual).lower()
    return value == usual if isinstance(usual, str) else float(value) == usual
