"""Quota sort: the most sensitive sites get the higher choices (Layer-Wise Quantization, 2024)."""

from __future__ import annotations

import numpy as np

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Tables


class QuotaSort(Allocator):
    """All sites begin at their lowest choice. Site after site, the most sensitive first, rises by one, as far as the
    budgets allow; then all again, until none can.

    With two choices of equal costs everywhere this is the top k of the sites; with more, it is the top k between two
    neighbouring ones, not the extremes. Sensitivity is the damage that the highest choice of a site saves over its
    lowest one; among equally sensitive sites the earlier one comes first.
    """

    name = "quota"

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        choices = lowered(tables, tables.bottom())
        rows = np.arange(len(tables))
        sensitivity = tables.damage[rows, choices] - tables.damage[rows, tables.top()]
        order = np.argsort(-sensitivity, kind="stable").tolist()
        # What is above each site's choice, from below.
        above = [
            [
                c
                for c in reversed(tables.ladder(group))
                if tables.damage[group, c] < tables.damage[group, choices[group]]
            ]
            for group in range(len(tables))
        ]
        risen = True
        while risen:
            risen = False
            for group in order:
                if not above[group]:
                    continue
                changed = choices.copy()
                changed[group] = above[group][0]
                if tables.fits(changed):
                    choices, risen = changed, True
                    del above[group][0]
        return with_bound(tables, choices.tolist())
