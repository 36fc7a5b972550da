"""Shares in proportion to scores, above floors and under caps (ECoFLaP, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered, raised
from archfront.search.allocators.problem import Problem, Vector
from archfront.search.allocators.tables import Tables


class Proportional(Allocator):
    """What a budget leaves above all floors is dealt out in proportion to the sensitivities of the sites.

    A site takes the least damaging choice that its part pays for; what choices leave over goes to the rises that save
    most for it. Sensitivity is the damage that the highest choice of a site saves over its lowest one.

    Args:
        floor: share of its dearest choice that every site has to cost at the least; ECoFLaP takes 0.1 less than the
            share that is kept of all, 0.4 for a sparsity of 0.5.
    """

    name = "proportional"

    def __init__(self, floor: Annotated[float, Field(ge=0, le=1)] = 0.0) -> None:
        self.floor = floor

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = self._tables(problem)
        bottom = tables.bottom()
        rows = np.arange(len(tables))
        scores = tables.damage[rows, bottom] - tables.damage[rows, tables.top()]
        parts = np.zeros((len(tables.budgets), len(tables)))
        for number, load in enumerate(tables.load):
            caps = np.where(tables.allowed, load, 0.0).max(axis=1)
            parts[number] = dealt(scores, caps, min(1.0, float(caps.sum())))
        # A part that is dealt in full equals the load that it pays for up to rounding.
        paid = (tables.load <= parts[:, :, None] * (1 + 1e-12)).all(axis=0) & tables.allowed
        best = np.where(paid, tables.damage, np.inf)
        choices = np.where(paid.any(axis=1), best.argmin(axis=1), bottom).astype(np.int64)
        return with_bound(tables, raised(tables, lowered(tables, choices)).tolist())

    def _tables(self, problem: Problem) -> Tables:
        if self.floor == 0.0:
            return Tables.of(problem)
        if len(problem.budgets) != 1:
            text = "needs one budget, whose cost it is a share of"
            raise InputError("floor", self.floor, text, "Leave it out, or give one budget.")
        cost = next(iter(problem.budgets))
        return Tables.of(problem, [self.floor * float(np.max(row)) for row in problem.costs[cost]], cost)


def proportional_counts(
    scores: Sequence[float], capacities: Sequence[int], total: int, floors: Sequence[int] | None = None
) -> list[int]:
    """Counts that sum to ``total``: a floor each, and above it in proportion to the scores up to the capacity.

    What a full site cannot take goes to the others in proportion, to sites of score 0 only when all others are full.
    Fractions are rounded to the largest remainders, the earlier site first among equals.

    Raises:
        InputError: lengths that differ, a negative or not finite score, a floor above its capacity, or a total that
            floors and capacities do not allow.
    """
    caps = np.asarray(capacities, dtype=np.int64)
    low = np.zeros_like(caps) if floors is None else np.asarray(floors, dtype=np.int64)
    worth = np.asarray(scores, dtype=np.float64)
    if not len(caps) == len(low) == len(worth):
        lengths = [len(worth), len(caps), len(low)]
        raise InputError("scores", lengths, "differ in length from capacities or floors", "Give one for each site.")
    if not (np.isfinite(worth).all() and (worth >= 0).all()):
        raise InputError("scores", worth.tolist(), "are not all finite and at least 0", "Look at what was measured.")
    if (low < 0).any() or (low > caps).any():
        raise InputError("floors", low.tolist(), f"are not all from 0 to {caps.tolist()}", "Give lower ones.")
    if not low.sum() <= total <= caps.sum():
        text = f"is not from {low.sum()} to {caps.sum()}, what floors and capacities allow"
        raise InputError("total", total, text, "Change it, the floors or the capacities.")
    room = caps - low
    parts = np.minimum(dealt(worth, room.astype(np.float64), float(total - low.sum())), room)
    counts = np.floor(parts + 1e-9).astype(np.int64)
    missing = int(total - low.sum() - counts.sum())
    order = np.lexsort((np.arange(len(caps)), -(parts - counts)))
    while missing > 0:
        for i in order:
            if missing > 0 and counts[i] < room[i]:
                counts[i] += 1
                missing -= 1
    # The guard above can round up to a unit too much when thousands of parts are just below whole numbers.
    for i in order[::-1]:
        if missing < 0 and counts[i] > 0:
            counts[i] -= 1
            missing += 1
    return [int(n) for n in low + counts]


def dealt(scores: Vector, caps: Vector, total: float) -> Vector:
    """Parts of a total in proportion to the scores, none above its cap."""
    parts = np.zeros(len(scores))
    shares = scores / (float(scores.max(initial=0.0)) or 1.0)
    # Sites without a score take part when the others are full, in proportion to their caps.
    for weights in (shares, np.where(shares > 0, 0.0, caps)):
        active = weights > 0
        while active.any() and total > 0:
            # Shares first: a rate per unit of the smallest scores would overflow.
            offered = np.zeros(len(parts))
            offered[active] = total * (weights[active] / float(weights[active].sum()))
            full = active & (offered >= caps)
            if not full.any():
                return parts + offered
            parts[full] = caps[full]
            total -= float(caps[full].sum())
            active &= ~full
    return parts
