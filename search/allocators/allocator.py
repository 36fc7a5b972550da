"""The contract of an allocator, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from archfront.search.allocators.problem import Problem

Evaluate = Callable[[Sequence[int]], float]
"""True quality of a policy, higher is better, e.g. accuracy on validation data: index of the choice of each site in."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A policy, and how good it is known to be.

    Attributes:
        choices: index of the choice of each site.
        damage: summed, as the problem prices it.
        costs: by name, what is fixed included.
        gap: how far the damage may be from the least possible, relative to it; 0 is proven optimal, None unknown.
        evaluations: how many policies were really evaluated for it.
    """

    choices: tuple[int, ...]
    damage: float
    costs: dict[str, float]
    gap: float | None = None
    evaluations: int = 0

    @classmethod
    def of(
        cls, problem: Problem, choices: Sequence[int], *, gap: float | None = None, evaluations: int = 0
    ) -> Allocation:
        """Of choices for all sites of a problem."""
        return cls(
            choices=tuple(int(choice) for choice in choices),
            damage=problem.total_damage(choices),
            costs=problem.total_costs(choices),
            gap=gap,
            evaluations=evaluations,
        )


class Allocator(ABC):
    """Shares a budget out. Deterministic: the same problem and seed give the same choices."""

    name: ClassVar[str]

    is_exact: ClassVar[bool] = False
    """Whether ``allocate`` finds the least damage there is."""

    @abstractmethod
    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        """Choices that meet every budget and tie.

        Args:
            evaluate: true quality of a policy, for allocators that look at it; others leave it alone.

        Raises:
            InputError: the allocator needs ``evaluate`` and has none, or cannot serve such a problem.
        """
