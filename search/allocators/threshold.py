"""One threshold over all sites, with floors: on damage saved per cost, or on the scores of single units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError, suggestion
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered, raised
from archfront.search.allocators.problem import Problem, Vector
from archfront.search.allocators.tables import Ints, Tables

STOP = 1e-9
"""How far the rescaling may stay below the sparsity that it approaches."""


class GlobalThreshold(Allocator):
    """Every site rises along its convex lower hull while a rise saves more damage per cost than one threshold.

    The threshold is the lowest one whose policy fits. Rises of equal worth are taken in the order of the sites, so the
    policy is the largest one that fits and not only the largest before a group of equals.

    Args:
        floors: what a site has to cost at the least, for all sites or by name; a site that can never cost as much takes
            its dearest choice.
        cost: which cost the floors are about; the budget's, if there is one budget.
        fill: whether to go on, once the threshold is found, with later rises that fit in what is left.
    """

    name = "threshold"

    def __init__(
        self, floors: float | Mapping[str, float] | None = None, cost: str | None = None, fill: bool = True
    ) -> None:
        self.floors = floors
        self.cost = cost
        self.fill = fill

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = self._tables(problem)
        choices = tables.bottom()
        choices = _risen(tables, choices) if tables.fits(choices) else lowered(tables, choices)
        if self.fill:
            choices = raised(tables, choices)
        return with_bound(tables, choices.tolist())

    def _tables(self, problem: Problem) -> Tables:
        if self.floors is None:
            return Tables.of(problem)
        cost = self.cost
        if cost is None:
            if len(problem.budgets) != 1:
                known = ", ".join(sorted(problem.costs))
                raise InputError("cost", None, "does not say what the floors are about", f"Give one of: {known}.")
            cost = next(iter(problem.budgets))
        if cost not in problem.costs:
            raise InputError("cost", cost, "is not a cost of the problem", suggestion(cost, problem.costs))
        if isinstance(self.floors, Mapping):
            for name, floor in self.floors.items():
                if name not in problem.sites:
                    raise InputError(f"floors.{name}", floor, "is for an unknown site", suggestion(name, problem.sites))
            least = [float(self.floors.get(site, -math.inf)) for site in problem.sites]
        else:
            least = [float(self.floors)] * len(problem.sites)
        return Tables.of(problem, least, cost)


def _risen(tables: Tables, choices: Ints) -> Ints:
    """The longest beginning of all rises in the order of their worth that fits."""
    rises = []
    for group in range(len(tables)):
        damage, pressure = tables.damage[group], tables.pressure[group]
        hull = lower_hull(pressure, damage)
        for low, high in itertools.pairwise(hull):
            worth = (damage[low] - damage[high]) / (pressure[high] - pressure[low])
            rises.append((-worth, group, high))
    choices = choices.copy()
    # Along a hull the worth only falls, so a stable order never takes a group's second rise first.
    for _, group, high in sorted(rises, key=lambda rise: rise[0]):
        before = choices[group]
        choices[group] = high
        if not tables.fits(choices):
            choices[group] = before
            break
    return choices


def lower_hull(cost: Vector, damage: Vector) -> list[int]:
    """Choices on the convex lower hull, from the cheapest to the least damage; what is not finite is left out."""
    hull: list[int] = []
    for i in np.lexsort((damage, cost)):
        if not np.isfinite(cost[i]) or (hull and damage[i] >= damage[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (damage[a] - damage[b]) * (cost[i] - cost[b]) > (damage[b] - damage[i]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def keep_counts(scores: Sequence[npt.ArrayLike], sparsity: float, floor: int | None = None) -> list[int]:
    """Units to keep of each layer under one sparsity of the network: global magnitude with a minimum (MT).

    Pruned are the units of the lowest scores over all layers; then the sparsities of the layers are scaled until,
    clamped so that each layer keeps ``floor`` units, they reach the sparsity again. Layers of fewer units are left
    whole. What rounding, or a layer without a pruned unit, leaves to prune goes to the lowest scores once more.

    Args:
        scores: of each unit, layer after layer; more is more important.
        sparsity: share of all units that is pruned, at least.
        floor: units that each layer keeps; 0.05 % of all units if not set, 0 for plain global magnitude.

    Raises:
        InputError: scores that are not finite, a sparsity outside of [0, 1], or floors that keep too many units.
    """
    layers = [np.asarray(layer, dtype=np.float64).ravel() for layer in scores]
    if not layers or any(len(layer) == 0 for layer in layers):
        raise InputError("scores", [len(layer) for layer in layers], "have a layer without units", "Leave it out.")
    for number, layer in enumerate(layers):
        if not np.isfinite(layer).all():
            raise InputError(f"scores.{number}", layer.tolist(), "is not finite", "Look at what was measured there.")
    if not 0 <= sparsity <= 1:
        raise InputError("sparsity", sparsity, "is no share", "Give a number from 0 to 1.")
    sizes = np.array([len(layer) for layer in layers])
    total = int(sizes.sum())
    minimum = int(0.0005 * total) if floor is None else floor
    target = math.ceil(sparsity * total - 1e-9)
    most = np.where(sizes < minimum, 0, sizes - minimum)
    if target > most.sum():
        possible = float(most.sum()) / total
        text = f"keeps {total - int(most.sum())} of {total} units, and a sparsity of {sparsity:.6g} leaves fewer"
        raise InputError("floor", minimum, text, f"Give a lower floor, or a sparsity of {possible:.6g} at most.")
    owners = np.repeat(np.arange(len(layers)), sizes)
    order = np.argsort(np.concatenate(layers), kind="stable")
    pruned = np.bincount(owners[order[:target]], minlength=len(layers))
    shares, _ = rescaled(pruned / sizes, sizes, minimum)
    # The guard is for a share that was made from a whole count and lost its last digit.
    pruned = np.minimum(np.floor(shares * sizes + 1e-6).astype(np.int64), most)
    position = np.zeros(len(layers), dtype=np.int64)
    missing = target - int(pruned.sum())
    for owner in owners[order]:
        if missing <= 0:
            break
        # The lowest units of a layer are the ones that are pruned already.
        if position[owner] >= pruned[owner] and pruned[owner] < most[owner]:
            pruned[owner] += 1
            missing -= 1
        position[owner] += 1
    return [int(n) for n in sizes - pruned]


def rescaled(shares: Vector, sizes: Ints, minimum: int) -> tuple[Vector, int]:
    """Sparsities of layers scaled and clamped in turn until they prune as much as before, and the rounds it took.

    It ends ``STOP`` below, or where the layers that can still be scaled are not enough.
    """
    most = np.where(sizes < minimum, 0.0, 1.0 - minimum / sizes)
    total = float(sizes.sum())
    target = float((shares * sizes).sum()) / total
    found = np.minimum(shares, most)
    reached = float((found * sizes).sum()) / total
    rounds = 0
    while 0 < reached < target * (1 - STOP):
        found = np.minimum(found * (target / reached), most)
        before, reached = reached, float((found * sizes).sum()) / total
        rounds += 1
        if reached <= before:
            break
    return found, rounds
