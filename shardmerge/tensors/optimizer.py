"""What an optimizer of the Adam family keeps beside its moments: how often it stepped, and its settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

# A value that a trainer sets: a learning rate, a pair of betas, a switch.
Setting: TypeAlias = "None | bool | int | float | str | tuple[Setting, ...] | list[Setting]"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Weights that are stepped with the same settings.

    Attributes
    ----------
    names
        Of the weights, in the optimizer's order.
    settings
        By the names that the optimizer has for them: ``lr``, ``betas``, ``weight_decay``, ...
    """

    names: tuple[str, ...]
    settings: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer keeps beside tensors of the weights' shapes.

    Attributes
    ----------
    steps
        How often each weight was stepped, by its name.
    groups
        In the optimizer's order.
    """

    steps: Mapping[str, float] = field(default_factory=dict)
    groups: tuple[ParameterGroup, ...] = ()

    def renamed(self, names: Mapping[str, str]) -> OptimizerState:
        """Returns it with the weights called as ``names`` says, without those that it does not name."""
        return OptimizerState(
            {names[name]: step for name, step in self.steps.items() if name in names},
            tuple(
                ParameterGroup(tuple(names[name] for name in group.names if name in names), group.settings)
                for group in self.groups
            ),
        )

    def of(self, names: Collection[str]) -> OptimizerState:
        """Returns it without all other weights."""
        return self.renamed({name: name for name in names})
