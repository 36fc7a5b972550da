"""Who is better: constraint domination, fidelities, non-dominated rank and crowding in one order.

The order that every strategy of ours uses, from the best to the worst:

1. feasible candidates; among them those that reached a higher fidelity first, because two fidelities are not
   comparable and a candidate was promoted for being good at the lower one; within a fidelity by non-dominated rank,
   within a rank by crowding distance (Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II",
   2002, sections III and VI);
2. infeasible ones by their violation, the smallest first;
3. failed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archfront.db.dominance import nondominated_ranks
from archfront.search.strategy import Results
from archfront.spaces.space import Population, Space

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BRED_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Members:
    """Evaluated candidates.

    Attributes:
        population: ``(n, ...)`` canonical genotypes.
        keys: ``n`` canonical keys.
        fidelities: ``(n,)`` at which the results were won.
        objectives: ``(n, objectives)``, less is better; NaN rows for failed evaluations.
        violations: ``(n,)``, 0 where feasible, inf where failed.
    """

    population: Population
    keys: list[bytes]
    fidelities: Ints
    objectives: Floats
    violations: Floats

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, space: Space, population: Population, results: Results) -> Members:
        return cls(
            population=population,
            keys=space.keys(population),
            fidelities=results.fidelities,
            objectives=results.objectives,
            violations=results.violations,
        )

    def take(self, indices: Ints) -> Members:
        return Members(
            population=self.population[indices],
            keys=[self.keys[i] for i in indices.tolist()],
            fidelities=self.fidelities[indices],
            objectives=self.objectives[indices],
            violations=self.violations[indices],
        )

    @classmethod
    def join(cls, parts: Sequence[Members]) -> Members:
        """All members, a candidate once: with its result at the highest fidelity, the last one where there are two."""
        if len(parts) == 1:
            return parts[0]
        joined = cls(
            population=np.concatenate([part.population for part in parts]),
            keys=[key for part in parts for key in part.keys],
            fidelities=np.concatenate([part.fidelities for part in parts]),
            objectives=np.concatenate([part.objectives for part in parts]),
            violations=np.concatenate([part.violations for part in parts]),
        )
        kept: dict[bytes, int] = {}
        for i, key in enumerate(joined.keys):
            if key not in kept or joined.fidelities[i] >= joined.fidelities[kept[key]]:
                kept[key] = i
        if len(kept) == len(joined):
            return joined
        return joined.take(np.sort(np.fromiter(kept.values(), dtype=np.int64)))

    def best(self, count: int) -> Members:
        """The ``count`` best, the best first."""
        return self.take(ranking(self.objectives, self.violations, self.fidelities)[:count])


def standing(objectives: Floats, violations: Floats, fidelities: Ints) -> tuple[Ints, Floats]:
    """Rank (0 for the best; equal ones share it) and crowding distance within the rank of each evaluation.

    Args:
        objectives: ``(n, m)``, less is better.
        violations: ``(n,)``.
        fidelities: ``(n,)``.
    """
    count = len(violations)
    ranks = np.zeros(count, dtype=np.int64)
    crowding = np.zeros(count)
    failed = ~np.isfinite(violations) | ~np.isfinite(objectives).all(axis=1)
    feasible = ~failed & (violations <= 0)
    offset = 0
    for fidelity in np.unique(fidelities[feasible])[::-1]:
        rows = np.flatnonzero(feasible & (fidelities == fidelity))
        fronts = nondominated_ranks(objectives[rows])
        ranks[rows] = offset + fronts
        crowding[rows] = crowding_within(objectives[rows], fronts)
        offset += int(fronts.max()) + 1
    infeasible = np.flatnonzero(~failed & ~feasible)
    steps = np.unique(violations[infeasible], return_inverse=True)[1]
    ranks[infeasible] = offset + steps
    ranks[failed] = offset + (int(steps.max()) + 1 if len(steps) else 0)
    return ranks, crowding


def ranking(objectives: Floats, violations: Floats, fidelities: Ints) -> Ints:
    """Indices from the best to the worst; among equals the older (lower index) first."""
    ranks, crowding = standing(objectives, violations, fidelities)
    return np.lexsort((-crowding, ranks)).astype(np.int64)


def crowding_within(points: Floats, fronts: Ints) -> Floats:
    """Crowding distance of each row of ``(n, m)`` within its own front, all fronts at once."""
    count, objectives = points.shape
    distance = np.zeros(count)
    if not count:
        return distance
    for m in range(objectives):
        order = np.lexsort((points[:, m], fronts))
        column, front = points[order, m], fronts[order]
        starts = np.flatnonzero(np.r_[True, front[1:] != front[:-1]])
        ends = np.r_[starts[1:], count] - 1
        extents = np.repeat(column[ends] - column[starts], ends - starts + 1)
        gaps = np.zeros(count)
        inner = np.ones(count, dtype=bool)
        inner[starts] = inner[ends] = False
        at = np.flatnonzero(inner & (extents > 0))
        gaps[at] = (column[at + 1] - column[at - 1]) / extents[at]
        gaps[~inner] = np.inf
        distance[order] += gaps
    # A front of two has no inside; of one, neither: all of them are ends, as they should be.
    return distance


def bred_or_sampled(
    space: Space, rng: np.random.Generator, breed: Callable[[int], Population]
) -> Callable[[int], Population]:
    """A generator for ``Strategy.fresh``: breeds, and samples the space once ten rounds of breeding were not enough.

    A converged population breeds only what has been tried; without the change of source a search would stop long
    before its space is exhausted.
    """
    rounds = 0

    def generate(count: int) -> Population:
        nonlocal rounds
        rounds += 1
        return breed(count) if rounds <= _BRED_ROUNDS else space.sample(rng, count)

    return generate
