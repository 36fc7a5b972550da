"""What an allocator solves: sites with choices, what each choice damages and costs, and what it may cost in all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion

Vector = npt.NDArray[np.float64]

TOLERANCE = 1e-9
"""Share of a budget by which sums in another order may go beyond it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Choose one choice of each site so that the summed damage is least and no budget is exceeded.

    Attributes:
        sites: their names.
        damage: of each site ``(choices,)``, additive; less is better.
        costs: name of a cost -> of each site ``(choices,)``, additive.
        budgets: name of a cost -> the most that all sites together may cost.
        ties: groups of indices of sites that take the choice of the same index.
        fixed: costs of what no site can change, by name: part of what the budgets are for.
    """

    sites: tuple[str, ...]
    damage: tuple[Vector, ...]
    costs: Mapping[str, tuple[Vector, ...]]
    budgets: Mapping[str, float]
    ties: tuple[tuple[int, ...], ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that it can be solved.

        Raises:
            InputError: nothing to choose, shapes that do not agree, damages or costs that are not finite, an unknown
                cost, ties of sites with different numbers of choices or in two groups, or a budget below the least
                that all sites can cost, which the message names.
        """
        if not self.sites:
            raise InputError("sites", (), "has nothing to choose", "Give at least one site.")
        for name, table in {"damage": self.damage, **self.costs}.items():
            if [len(row) for row in table] != [len(row) for row in self.damage] or len(table) != len(self.sites):
                problem = "does not have one number for each choice of each site"
                raise InputError(name, [len(row) for row in table], problem, "Measure every choice of every site.")
            for site, row in zip(self.sites, table, strict=True):
                if not np.isfinite(row).all():
                    remedy = "Leave the site out, or look at what was measured there."
                    raise InputError(f"{name}.{site}", np.asarray(row).tolist(), "is not finite", remedy)
        tied = [i for group in self.ties for i in group]
        if len(set(tied)) < len(tied):
            raise InputError("ties", self.ties, "name a site twice", "Join the groups that share a site.")
        for group in self.ties:
            if len({len(self.damage[i]) for i in group}) > 1:
                names = [self.sites[i] for i in group]
                raise InputError("ties", names, "have different numbers of choices", "Give them one domain.")
        for name, budget in self.budgets.items():
            if name not in self.costs:
                raise InputError(f"budget.{name}", budget, "is for an unknown cost", suggestion(name, self.costs))
            floor = self.floor(name)
            if not floor <= budget * (1 + TOLERANCE) + TOLERANCE:
                problem = f"is below {rounded_up(floor)}, the least that all sites together can cost"
                raise InputError(
                    f"budget.{name}", budget, problem, f"Give {rounded_up(floor)} or more, or lower choices."
                )

    def floor(self, cost: str) -> float:
        """The least of a cost, ties respected. With several budgets each may be met and not all at once."""
        grouped = [sum(self.costs[cost][i] for i in group) for group in self.groups]
        return float(self.fixed.get(cost, 0.0) + sum(np.min(row) for row in grouped))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All sites in groups, those that nothing ties alone, in the order of their first ones."""
        tied = {i for group in self.ties for i in group}
        alone = [(i,) for i in range(len(self.sites)) if i not in tied]
        return tuple(sorted([*map(tuple, self.ties), *alone]))

    def untied(self) -> Problem:
        """The same with one site for each group."""
        groups = self.groups
        return replace(
            self,
            sites=tuple("+".join(self.sites[i] for i in group) for group in groups),
            damage=tuple(_summed(self.damage, group) for group in groups),
            costs={name: tuple(_summed(table, group) for group in groups) for name, table in self.costs.items()},
            ties=(),
        )

    def spread(self, choices: Sequence[int]) -> tuple[int, ...]:
        """Choices of ``untied()`` as choices of all sites."""
        found = [0] * len(self.sites)
        for group, choice in zip(self.groups, choices, strict=True):
            for i in group:
                found[i] = int(choice)
        return tuple(found)

    def total_damage(self, choices: Sequence[int]) -> float:
        return math.fsum(row[choice] for row, choice in zip(self.damage, choices, strict=True))

    def total_costs(self, choices: Sequence[int]) -> dict[str, float]:
        """Of every cost, what is fixed included."""
        return {
            name: math.fsum(row[choice] for row, choice in zip(table, choices, strict=True)) + self.fixed.get(name, 0.0)
            for name, table in self.costs.items()
        }

    def is_feasible(self, choices: Sequence[int]) -> bool:
        """Whether all budgets and ties are met."""
        if any(len({choices[i] for i in group}) > 1 for group in self.ties):
            return False
        found = self.total_costs(choices)
        return all(found[name] <= budget + TOLERANCE * max(abs(budget), 1.0) for name, budget in self.budgets.items())


def rounded_up(value: float) -> str:
    """Six digits or a few more, never less than the value: what a message names must do when it is given."""
    for digits in range(6, 17):
        text = f"{value:.{digits}g}"
        if float(text) >= value:
            return text
    return repr(value)


def _summed(table: Sequence[Vector], group: Sequence[int]) -> Vector:
    return np.asarray(np.sum([np.asarray(table[i], dtype=np.float64) for i in group], axis=0))
