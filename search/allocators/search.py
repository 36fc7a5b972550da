"""Evolution over whole policies, with the summed damage or the true quality as its objective."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import Trials, lowered, lowering, raised
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Ints, Tables


class SearchAllocator(Allocator):
    """A steady-state evolution over feasible policies: the best of a random pair is changed at a few sites, the child
    is brought back within the budgets at other sites, and replaces the worst member if it is better.

    It begins with the greedy policy, so it never ends with a worse one. With ``evaluate`` the true quality decides,
    which knows of interactions between sites; without, the summed damage does.

    Args:
        evaluations: policies to look at, in all.
        population: size of the population.
        seed: of all random choices.
    """

    name = "search"

    def __init__(
        self,
        evaluations: Annotated[int, Field(ge=1)] = 500,
        population: Annotated[int, Field(ge=2)] = 20,
        seed: int = 0,
    ) -> None:
        self.evaluations = evaluations
        self.population = population
        self.seed = seed

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        rows = np.arange(len(tables))
        trials = None if evaluate is None else Trials(problem, evaluate, self.name)

        def loss(choices: Ints) -> float:
            return float(tables.damage[rows, choices].sum()) if trials is None else -trials.quality(choices)

        rng = np.random.default_rng(self.seed)
        start = raised(tables, lowered(tables, tables.top()))
        members = [(loss(start), start)]
        seen = {start.tobytes()}
        idle = 0
        # A small problem is exhausted before the evaluations are: then all children are known ones.
        while len(seen) < self.evaluations and idle < 50 + 10 * self.population:
            child = self._child(tables, rng, members)
            if child is None or child.tobytes() in seen:
                idle += 1
                continue
            idle = 0
            seen.add(child.tobytes())
            members.append((loss(child), child))
            if len(members) > self.population:
                del members[int(np.argmax([value for value, _ in members]))]
        best = min(members, key=lambda member: member[0])[1]
        return with_bound(tables, best.tolist(), 0 if trials is None else trials.count)

    def _child(self, tables: Tables, rng: np.random.Generator, members: list[tuple[float, Ints]]) -> Ints | None:
        pair = rng.integers(len(members), size=2)
        parent = min((members[i] for i in pair), key=lambda member: member[0])[1]
        changed = rng.permutation(len(tables))[: 1 + rng.geometric(0.6)]
        mutant = parent.copy()
        for group in changed:
            mutant[group] = rng.choice(np.flatnonzero(tables.allowed[group]))
        child = _repaired(tables, rng, mutant, changed)
        return raised(tables, child) if child is not None and rng.random() < 0.5 else child


def _repaired(tables: Tables, rng: np.random.Generator, choices: Ints, kept: Ints) -> Ints | None:
    """Within the budgets by changes at random groups, those of ``kept`` last; None where no such change helps."""
    others = np.setdiff1d(np.arange(len(tables)), kept)
    for group in [*rng.permutation(others), *kept]:
        if tables.fits(choices):
            break
        ratio = lowering(tables, choices)[0][group]
        if np.isfinite(ratio).any():
            choices[group] = ratio.argmin()
    return choices if tables.fits(choices) else None
