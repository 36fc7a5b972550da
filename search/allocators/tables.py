"""A problem as arrays: one row for each group of tied sites, costs as shares of what the budgets leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.search.allocators.problem import TOLERANCE, Problem, Vector, rounded_up

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What allocators compute on. Choices are one index for each group here.

    Attributes:
        problem: what it was made of.
        budgets: names of the budgets, the order of the first axis of ``extra``.
        allowed: ``(groups, choices)``, False where a group has no such choice or may not take it.
        damage: ``(groups, choices)``, inf where not allowed.
        extra: ``(budgets, groups, choices)``, cost above the cheapest allowed choice of the group; inf where not
            allowed.
        floor: ``(budgets,)`` cost when every group is cheapest, what is fixed included.
        room: ``(budgets,)`` that all groups together may cost above ``floor``.
    """

    problem: Problem
    budgets: tuple[str, ...]
    allowed: Mask
    damage: Vector
    extra: Vector
    floor: Vector
    room: Vector

    @classmethod
    def of(cls, problem: Problem, least: Sequence[float] | None = None, cost: str | None = None) -> Tables:
        """All choices of a problem, or those that a floor leaves.

        Args:
            least: of each site, what it has to cost; a site that costs less at most has to cost that.
            cost: which cost ``least`` is about.

        Raises:
            InputError: the floors contradict ties or a budget.
        """
        groups = problem.groups
        joined = problem.untied()
        width = max(len(row) for row in joined.damage)
        allowed = np.zeros((len(groups), width), dtype=bool)
        for row, damage in zip(allowed, joined.damage, strict=True):
            row[: len(damage)] = True
        if least is not None and cost is not None:
            _apply_floors(allowed, problem, least, cost)
        damage = _padded(joined.damage, allowed)
        budgets = tuple(problem.budgets)
        costs = np.array([_padded(joined.costs[name], allowed) for name in budgets])
        costs = costs.reshape(len(budgets), len(groups), width)
        cheapest = costs.min(axis=2)
        fixed = np.array([problem.fixed.get(name, 0.0) for name in budgets])
        limits = np.array([problem.budgets[name] for name in budgets])
        floor = fixed + cheapest.sum(axis=1)
        # Half of the problem's own tolerance: the other half is for sums in another order.
        slack = TOLERANCE * np.maximum(np.abs(limits), 1.0)
        for name, limit, low, spare in zip(budgets, limits, floor, slack, strict=True):
            if least is not None and low > limit + spare:
                text = (
                    f"are above budget.{name} {limit:.6g}: with them all sites together cost {rounded_up(low)} or more"
                )
                raise InputError(
                    "floors", list(least), text, f"Give lower floors, or a budget of {rounded_up(low)} or more."
                )
        room = np.maximum(limits - floor + 0.5 * slack, 1e-3 * slack)
        return cls(
            problem=problem,
            budgets=budgets,
            allowed=allowed,
            damage=damage,
            extra=costs - cheapest[:, :, None],
            floor=floor,
            room=room,
        )

    def __len__(self) -> int:
        return len(self.damage)

    @cached_property
    def load(self) -> Vector:
        """``(budgets, groups, choices)``: share of the room of each budget that a choice takes; all may sum to 1."""
        return np.asarray(self.extra / self.room[:, None, None])

    @cached_property
    def pressure(self) -> Vector:
        """``(groups, choices)``: the loads of all budgets in one number, so that a tight budget counts for more.

        Without budgets, all costs as shares of what they can be.
        """
        if self.budgets:
            return np.where(self.allowed, self.load.sum(axis=0), np.inf)
        found = np.zeros(self.damage.shape)
        for table in self.problem.untied().costs.values():
            costs = _padded(table, self.allowed)
            extra = np.where(self.allowed, costs - costs.min(axis=1, keepdims=True), 0.0)
            found += extra / (float(extra.max(axis=1).sum()) or 1.0)
        return np.where(self.allowed, found, np.inf)

    def loads(self, choices: Ints) -> Vector:
        """``(budgets,)`` of a policy; feasible where none is above 1."""
        return np.asarray(self.load[:, np.arange(len(self)), choices].sum(axis=1))

    def fits(self, choices: Ints) -> bool:
        return bool((self.loads(choices) <= 1.0).all())

    def cost(self, budget: int, choices: Ints) -> float:
        """In the unit of the budget of this number, what is fixed included."""
        return float(self.floor[budget] + self.extra[budget, np.arange(len(self)), choices].sum())

    def top(self) -> Ints:
        """The least damage of each group, the last among equals: the identity, where that one harms least."""
        width = self.damage.shape[1]
        return np.asarray(width - 1 - np.argmin(self.damage[:, ::-1], axis=1), dtype=np.int64)

    def bottom(self) -> Ints:
        """The least pressure of each group, the least damage among equals. One budget is met, several may not be."""
        equal = self.pressure == self.pressure.min(axis=1, keepdims=True)
        return np.asarray(np.argmin(np.where(equal, self.damage, np.inf), axis=1), dtype=np.int64)

    def ladder(self, group: int) -> list[int]:
        """Choices from the top down: each next one is cheaper, and nothing as cheap harms less."""
        damage, pressure = self.damage[group], self.pressure[group]
        rungs: list[int] = []
        top = int(self.top()[group])
        for choice in np.lexsort((damage, pressure)):
            if not self.allowed[group, choice] or pressure[choice] >= pressure[top]:
                break
            if not rungs or damage[choice] < damage[rungs[-1]]:
                rungs.append(int(choice))
        return [top, *reversed(rungs)]


def _padded(table: Sequence[Vector], allowed: Mask) -> Vector:
    padded = np.full(allowed.shape, np.inf)
    for row, values in zip(padded, table, strict=True):
        row[: len(values)] = values
    return np.where(allowed, padded, np.inf)


def _apply_floors(allowed: Mask, problem: Problem, least: Sequence[float], cost: str) -> None:
    for group, row in zip(problem.groups, allowed, strict=True):
        for i in group:
            costs = problem.costs[cost][i]
            row[: len(costs)] &= costs >= min(least[i], float(np.max(costs)))
        if not row.any():
            names = [problem.sites[i] for i in group]
            raise InputError("floors", [least[i] for i in group], f"leave no choice to {names}", "Give lower ones.")
