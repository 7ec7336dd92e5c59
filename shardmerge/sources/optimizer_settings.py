"""The settings of an optimizer as ``state_dict()`` of torch's own has them: a dict for each group of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shardmerge.shown import shown
from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.sources.pickle_values import PickleValue, kind
from shardmerge.tensors.optimizer import ParameterGroup, Setting

# What a group calls its parameters; everything else in it is a setting.
PARAMS = "params"


def numbered_groups(
    where: str, groups: Sequence[Mapping[object, PickleValue]], named: Sequence[Collection[str]]
) -> tuple[ParameterGroup, ...]:
    """Returns the groups of an optimizer that numbers its parameters.

    Parameters
    ----------
    where
        The file, for messages.
    groups
        ``param_groups``.
    named
        The weights in each numbered parameter, by its number: one, or those of a flat group.

    Raises
    ------
    CheckpointError
        ``no-moments``: the groups do not hold every number once, or a setting is no plain value.
    """
    numbers = [_numbers(group.get(PARAMS)) for group in groups]
    if sorted(number for mine in numbers for number in mine) != list(range(len(named))):
        raise no_moments(
            where,
            f"its parameter groups number {shown([number for mine in numbers for number in mine])}",
            f"each of {len(named)} flat groups once",
        )
    return tuple(
        ParameterGroup(tuple(name for number in mine for name in named[number]), settings_of(where, n, group))
        for n, (mine, group) in enumerate(zip(numbers, groups, strict=True))
    )


def _numbers(value: PickleValue) -> list[int]:
    return [one for one in value if isinstance(one, int)] if isinstance(value, list) else []


def settings_of(where: str, number: int, group: Mapping[object, PickleValue]) -> dict[str, Setting]:
    """Returns the settings of a group; raises ``no-moments`` of one that is no plain value."""
    return {
        str(key): plain_setting(where, f"{str(key)[:80]} of parameter group {number}", value)
        for key, value in group.items()
        if key != PARAMS
    }


def plain_setting(where: str, what: str, value: PickleValue) -> Setting:
    """Returns a setting; raises ``no-moments`` where it is no plain value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return tuple(plain_setting(where, what, one) for one in value)
    if isinstance(value, list):
        return [plain_setting(where, what, one) for one in value]
    raise no_moments(where, f"the setting {what} is a {kind(value)}", "a number, a text or a switch")
