"""Quota sort: the most sensitive sites get the higher choices (Layer-Wise Quantization, 2024)."""

from __future__ import annotations

import numpy as np

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Tables


class QuotaSort(Allocator):
    """Site after site, the most sensitive first, takes the least damaging choice that the budgets still allow.

    Sensitivity is the damage that the highest choice of a site saves over its lowest one. Sites that follow are at
    their lowest meanwhile, so with two choices of equal costs everywhere this is the top k of the sites. Among equally
    sensitive sites the earlier one comes first.
    """

    name = "quota"

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        choices = lowered(tables, tables.bottom())
        rows = np.arange(len(tables))
        sensitivity = tables.damage[rows, choices] - tables.damage[rows, tables.top()]
        for group in np.argsort(-sensitivity, kind="stable"):
            for choice in np.lexsort((tables.pressure[group], tables.damage[group])):
                if tables.damage[group, choice] >= tables.damage[group, choices[group]]:
                    break
                changed = choices.copy()
                changed[group] = choice
                if tables.fits(changed):
                    choices = changed
                    break
        return with_bound(tables, choices.tolist())
