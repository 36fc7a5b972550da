"""Bisection: how many of the least sensitive sites go lower while the quality holds, or one threshold on mass."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import Trials, lowered
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Ints, Tables

_log = logging.getLogger(__name__)


class Bisection(Allocator):
    """The least sensitive sites go one precision lower, as many as the true quality bears, precision after precision.

    From the identity, for each lower step: the sites that took the step before are ordered by the damage that this one
    adds per cost saved, and bisection finds how many of the first of them can take it (augmented Hessians' allocator).
    That takes at most ceil(log2(sites)) + 1 evaluations a step. Budgets that are still not met afterwards are met by
    lowering on, by damage and cost alone.

    The identity is the least damaging choice of each site, the last one among equals.

    Args:
        tolerance: share of the identity's quality that has to be kept. Of a negative quality, a loss for instance, the
            same share may be lost in addition.
    """

    name = "bisection"

    def __init__(self, tolerance: Annotated[float, Field(gt=0, le=1)] = 0.99) -> None:
        self.tolerance = tolerance

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        """See the base.

        Raises:
            InputError: no ``evaluate``, or it fails on the identity.
        """
        trials = Trials(problem, evaluate, self.name)
        tables = Tables.of(problem)
        choices = tables.top()
        reference = trials.quality(choices)
        if not np.isfinite(reference):
            raise InputError("evaluate", reference, "is not finite for the identity", "Look at the evaluation.")
        wanted = reference - (1 - self.tolerance) * abs(reference)
        ladders = [tables.ladder(group) for group in range(len(tables))]
        for rung in range(1, max(map(len, ladders))):
            order = _next_in_order(tables, ladders, choices, rung)
            count = self._most(trials, choices, order, wanted, rung)
            choices = _with(choices, order[:count])
        if not tables.fits(choices):
            choices = lowered(tables, choices)
        return with_bound(tables, choices.tolist(), trials.count)

    def _most(self, trials: Trials, choices: Ints, order: list[tuple[int, int]], wanted: float, rung: int) -> int:
        """How many of the steps in ``order`` can be taken together."""
        seen = {0: trials.quality(choices)}
        low, high = 0, len(order) + 1
        while high - low > 1:
            middle = (low + high) // 2
            seen[middle] = trials.quality(_with(choices, order[:middle]))
            low, high = (middle, high) if seen[middle] >= wanted else (low, middle)
        qualities = [seen[count] for count in sorted(seen)]
        if any(after > before for before, after in itertools.pairwise(qualities)):
            _log.warning(
                "step %d: quality is not monotone in how many sites go lower, bisection may have missed the most: %s",
                rung,
                ", ".join(f"{count} of {len(order)}: {seen[count]:.6g}" for count in sorted(seen)),
            )
        return low


def _next_in_order(tables: Tables, ladders: list[list[int]], choices: Ints, rung: int) -> list[tuple[int, int]]:
    """``(group, choice)`` of this rung for all that stand on the one above it, the least harmful per cost first."""
    found = []
    for group, ladder in enumerate(ladders):
        if rung < len(ladder) and choices[group] == ladder[rung - 1]:
            above, below = ladder[rung - 1], ladder[rung]
            harm = tables.damage[group, below] - tables.damage[group, above]
            saved = tables.pressure[group, above] - tables.pressure[group, below]
            found.append((float(harm / saved), group, below))
    return [(group, below) for _, group, below in sorted(found)]


def _with(choices: Ints, steps: Sequence[tuple[int, int]]) -> Ints:
    changed = choices.copy()
    for group, choice in steps:
        changed[group] = choice
    return changed


def mass_threshold(scores: Sequence[npt.ArrayLike], total: int, floor: int = 0) -> list[int]:
    """Units to keep of each layer so that every layer keeps one share of its mass, ``total`` units in all (PrefixKV).

    A layer keeps its highest scores until their sum reaches a share of the layer's. The share where the counts sum to
    ``total``, which PrefixKV bisects for, is found by order here: a unit is kept where the share before it, of all
    higher ones of its layer, is below the threshold. Of equal shares those of earlier layers are kept.

    Args:
        scores: of each unit, layer after layer, at least 0.
        total: units to keep.
        floor: units that each layer keeps, or all that it has.

    Raises:
        InputError: scores that are negative, not finite or all zero in a layer, or a total that floors or sizes do not
            allow.
    """
    before = []
    for number, layer in enumerate(scores):
        ordered = -np.sort(-np.asarray(layer, dtype=np.float64).ravel())
        mass = float(ordered.sum())
        if not (np.isfinite(mass) and mass > 0 and ordered[-1] >= 0):
            raise InputError(f"scores.{number}", ordered.tolist(), "are no mass", "Give finite numbers of at least 0.")
        shares = np.concatenate([[0.0], np.cumsum(ordered)[:-1] / mass])
        shares[:floor] = -1.0
        before.append(shares)
    sizes = [len(shares) for shares in before]
    least = sum(min(size, floor) for size in sizes)
    if not least <= total <= sum(sizes):
        text = f"is not from {least} to {sum(sizes)}, what the floor and the layers allow"
        raise InputError("total", total, text, "Change it or the floor.")
    owners = np.repeat(np.arange(len(sizes)), sizes)
    kept = owners[np.argsort(np.concatenate(before), kind="stable")[:total]]
    return [int(n) for n in np.bincount(kept, minlength=len(sizes))]
