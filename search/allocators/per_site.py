"""Every site on its own: the best choice if it is good enough, the identity if none is (Sparse-vDiT, 2025)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered
from archfront.search.allocators.problem import Problem, Vector
from archfront.search.allocators.tables import Ints, Tables


class PerSite(Allocator):
    """Each site takes its choice of least damage plus weighted cost, and its identity where that is above a tolerance.

    Cost is here the share of the site's dearest choice, the mean over the budgets' costs (over all costs without
    budgets). Budgets that are not met by this are met by a higher tolerance; where even all sites without their
    identities cost too much, they go lower by the damage that it adds for what it saves.

    The identity is the least damaging choice of each site, the last one among equals.

    Args:
        weight: damage that a site's whole cost is worth.
        tolerance: damage plus weighted cost up to which a choice is good enough.
    """

    name = "per-site"

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 0.0, tolerance: float = 0.0) -> None:
        self.weight = weight
        self.tolerance = tolerance

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        share = _shares(tables)
        choices = argmin_or_keep(tables.damage + self.weight * share, self.tolerance, tables.top())
        if not tables.fits(choices):
            choices = self._tolerant(tables, share, choices)
        return with_bound(tables, lowered(tables, choices).tolist())

    def _tolerant(self, tables: Tables, share: Vector, choices: Ints) -> Ints:
        """With the least tolerance that meets the budgets, or with any."""
        objective = tables.damage + self.weight * share
        lower = argmin_or_keep(objective, np.inf, tables.top())
        for group in np.argsort(objective[np.arange(len(tables)), lower], kind="stable"):
            choices[group] = lower[group]
            if tables.fits(choices):
                break
        return choices


def argmin_or_keep(objective: Vector, tolerance: float, keep: Ints) -> Ints:
    """The least of each row apart from ``keep``, or ``keep`` where all others are above the tolerance.

    Args:
        objective: ``(sites, choices)``, inf where there is no such choice.
        keep: ``(sites,)``, the choice that changes nothing.
    """
    rows = np.arange(len(objective))
    others = objective.copy()
    others[rows, keep] = np.inf
    best = others.argmin(axis=1)
    good = np.isfinite(others[rows, best]) & (others[rows, best] <= tolerance)
    return np.where(good, best, keep).astype(np.int64)


def _shares(tables: Tables) -> Vector:
    """``(groups, choices)`` costs as shares of the group's dearest choice, 0 where there is no choice."""
    joined = tables.problem.untied()
    names = list(tables.budgets) or list(joined.costs)
    share = np.zeros(tables.damage.shape)
    for name in names:
        for row, costs in zip(share, joined.costs[name], strict=True):
            dearest = float(np.abs(costs).max())
            row[: len(costs)] += costs / dearest / len(names) if dearest else 0.0
    return share
