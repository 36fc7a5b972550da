"""Dynamic programmes over quantised costs: one budget for independent sites, and prefix costs (GreenTrainer, 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import raised
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Ints, Tables


class DynamicProgramme(Allocator):
    """The multiple-choice knapsack on costs in whole steps of one budget.

    Where all costs are multiples of one unit and the budget is few enough units, the steps are these units and the
    answer is the least damage there is (gap 0). Otherwise costs are rounded up to steps, so that the budget holds, and
    what the rounding left is filled up.

    Args:
        steps: how many steps the budget has at most, above what all sites cost at least.
    """

    name = "dp"

    def __init__(self, steps: Annotated[int, Field(ge=1)] = 10_000) -> None:
        self.steps = steps

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        """See the base.

        Raises:
            InputError: there are several budgets.
        """
        tables = Tables.of(problem)
        if len(tables.budgets) > 1:
            remedy = "Keep one, or choose the allocator milp."
            raise InputError("budgets", dict(problem.budgets), "are several, and dp serves one", remedy)
        if not tables.budgets:
            return Allocation.of(problem, problem.spread(tables.top().tolist()), gap=0.0)
        extra = tables.extra[0]
        whole = in_steps(extra[tables.allowed].tolist(), float(tables.room[0]), self.steps)
        amounts = np.full(extra.shape, whole.limit + 1, dtype=np.int64)
        amounts[tables.allowed] = whole.amounts
        choices = _knapsack(tables, amounts, whole.limit)
        if whole.exact:
            return Allocation.of(problem, problem.spread(choices.tolist()), gap=0.0)
        return with_bound(tables, raised(tables, choices).tolist())


def _knapsack(tables: Tables, amounts: Ints, limit: int) -> Ints:
    """The least damage whose amounts sum to ``limit`` at most."""
    taken = np.zeros((len(tables), limit + 1), dtype=np.int16)
    best = np.zeros(limit + 1)
    for group, damage in enumerate(tables.damage):
        found = np.full(limit + 1, np.inf)
        for choice in np.flatnonzero(tables.allowed[group] & (amounts[group] <= limit)):
            amount = amounts[group, choice]
            sums = best[: limit + 1 - amount] + damage[choice]
            better = sums < found[amount:]
            found[amount:][better] = sums[better]
            taken[group, amount:][better] = choice
        best = found
    choices = np.zeros(len(tables), dtype=np.int64)
    left = limit
    for group in reversed(range(len(tables))):
        choices[group] = taken[group, left]
        left -= amounts[group, choices[group]]
    return choices


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Amounts in whole steps.

    Attributes:
        amounts: rounded up; one more than ``limit`` for what is above it.
        limit: the most that a sum may have.
        exact: whether nothing was rounded.
    """

    amounts: Ints
    limit: int
    exact: bool


def in_steps(amounts: Sequence[float], limit: float, steps: int) -> Steps:
    """Amounts of at least 0 in units that divide all of them if the limit is ``steps`` units at most, else in steps.

    The limit is never more than the sum of all amounts.
    """
    unit = _common_unit(amounts)
    total = sum(map(Fraction, amounts))
    if not total:
        return Steps(amounts=np.zeros(len(amounts), dtype=np.int64), limit=0, exact=True)
    ceiling = min(math.floor(Fraction(limit) / unit), int(total / unit))
    if ceiling <= steps:
        whole = [min(int(Fraction(amount) / unit), ceiling + 1) for amount in amounts]
        return Steps(amounts=np.array(whole, dtype=np.int64), limit=ceiling, exact=True)
    step = min(limit, float(total)) / steps
    rounded = np.minimum(np.ceil(np.asarray(amounts) / step - 1e-9), steps + 1)
    return Steps(amounts=rounded.astype(np.int64), limit=steps, exact=False)


def _common_unit(amounts: Iterable[float]) -> Fraction:
    """The greatest number that all are multiples of, 1 for zeros only. Floats are fractions of powers of two."""
    parts = [Fraction(amount) for amount in amounts if amount]
    denominator = max((part.denominator for part in parts), default=1)
    return Fraction(math.gcd(*(int(part * denominator) for part in parts)) or 1, denominator)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Items that a prefix programme selected.

    Attributes:
        mask: ``(items,)``.
        value: summed importance of the selected ones.
        cost: their own costs, and the passing costs of all items down to the last of them.
    """

    mask: npt.NDArray[np.bool_]
    value: float
    cost: float


def prefix_programme(
    importance: Sequence[float],
    own_costs: Sequence[float],
    passing_costs: Sequence[float],
    share: float,
    steps: int = 100_000,
) -> Selection:
    """The items of greatest summed importance for a share of the cost of all: which tensors GreenTrainer trains.

    Item 0 is nearest to the loss. A selected item costs its own (the gradient of its weights), and the deepest selected
    one makes every item down to it pass the gradient on.

    Args:
        importance: of each item.
        own_costs: t_dw, at least 0.
        passing_costs: t_dy, at least 0.
        share: rho, of the sum of all costs.
        steps: as which the limit is counted at most; costs that do not come out even are rounded up.

    Raises:
        InputError: lengths that differ, costs that are negative or not finite, or a share outside of [0, 1].
    """
    worth, own, passing = (np.asarray(x, dtype=np.float64) for x in (importance, own_costs, passing_costs))
    if not len(worth) == len(own) == len(passing):
        lengths = [len(worth), len(own), len(passing)]
        raise InputError("importance", lengths, "differs in length from the costs", "Give one number for each item.")
    costs = np.concatenate([own, passing])
    if not (np.isfinite(worth).all() and np.isfinite(costs).all() and (costs >= 0).all()):
        raise InputError("costs", costs.tolist(), "are negative or not finite", "Look at what was measured.")
    if not 0 <= share <= 1:
        raise InputError("share", share, "is no share", "Give a number from 0 to 1.")
    # A share that comes out even in decimals (0.6 of 25) may lie below it in floats.
    limit = share * float(costs.sum()) * (1 + 1e-12)
    whole = in_steps(costs.tolist(), limit, steps)
    amounts, reach = whole.amounts[: len(own)], np.cumsum(whole.amounts[len(own) :])
    best = np.zeros(whole.limit + 1)
    taken = np.zeros((len(own), whole.limit + 1), dtype=bool)
    value, last, room = 0.0, -1, 0
    for i, amount in enumerate(amounts):
        left = int(whole.limit - reach[i] - amount)
        # Item i is the deepest one here: the best of those before it, in what it leaves.
        if left >= 0 and worth[i] + best[left] > value:
            value, last, room = float(worth[i] + best[left]), i, left
        if amount <= whole.limit:
            sums = best[: whole.limit + 1 - amount] + worth[i]
            better = sums > best[amount:]
            taken[i, amount:] = better
            best = np.concatenate([best[:amount], np.where(better, sums, best[amount:])])
    mask = np.zeros(len(own), dtype=bool)
    if last >= 0:
        mask[last] = True
        for i in reversed(range(last)):
            if taken[i, room]:
                mask[i] = True
                room -= int(amounts[i])
    cost = float(own[mask].sum() + passing[: last + 1].sum())
    return Selection(mask=mask, value=float(worth[mask].sum()), cost=cost)
