"""Regularised evolution (Real et al., "Regularized Evolution for Image Classifier Architecture Search", 2019)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.errors import InputError
from archfront.search.strategies.selection import Floats, bred_or_sampled, ranking
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy
from archfront.spaces.space import Population


@dataclass
class _Member:
    """One candidate of the population with its result at the highest fidelity that it reached."""

    row: Population
    key: bytes
    fidelity: int
    objectives: Floats
    violation: float


class RegularizedEvolution(Strategy):
    """Ageing evolution: the best of a random sample of the population is mutated, and the oldest member leaves.

    Age counts in the order in which results were committed, so workers of different speed need no barrier. The
    tournament compares by constraint domination, non-dominated rank and crowding within the whole population
    (``selection``); with one objective this is the paper's comparison. Failed evaluations do not enter.

    Results at several fidelities: a candidate that is in the population when a higher result of it comes takes that
    result and keeps its age; one that has left does not come back. In a tournament feasible candidates of a higher
    fidelity beat those of a lower one, and objectives are compared within a fidelity only.

    Args:
        population: size of the population, and number of random candidates to begin with.
        sample: size of the tournament, drawn with replacement.
        mutation: probability of each decision to change beyond the one that always does; 0, as in the paper,
            changes exactly one.
    """

    name = "regularized-evolution"

    def __init__(
        self,
        _problem: Problem,
        population: Annotated[int, Field(ge=1)] = 30,
        sample: Annotated[int, Field(ge=1)] = 10,
        mutation: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        super().__init__(_problem)
        if sample > population:
            remedy = f"Give at most {population}, or a larger strategy.population."
            raise InputError("strategy.sample", sample, "is larger than the population", remedy)
        self.population = population
        self.sample = sample
        self.mutation = mutation
        self._started = 0
        self._members: deque[_Member] = deque()
        self._entered: set[bytes] = set()

    def ask(self, ask: Ask) -> Proposals:
        rng = ask.rng()
        members = list(self._members)
        draws = min(max(self.population - self._started, 0), ask.count)
        if members:
            rows = np.concatenate([m.row for m in members])
            order = ranking(
                np.stack([m.objectives for m in members]),
                np.array([m.violation for m in members]),
                np.array([m.fidelity for m in members], dtype=np.int64),
            )
            ranked = rows[order]

        def generate(count: int) -> Population:
            drawn = self.space.sample(rng, min(draws, count) if members else count)
            if len(drawn) >= count:
                return drawn
            # The rows are sorted, so the lowest position of a sample is its best.
            winners = rng.integers(len(ranked), size=(count - len(drawn), self.sample)).min(axis=1)
            return np.concatenate([drawn, self.space.mutate(rng, ranked[winners], self.mutation)])

        return self.proposals(self.fresh(ask.count, bred_or_sampled(self.space, rng, generate)))

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        self._started += int(np.sum(proposals.fidelities == self.problem.fidelities[0]))

    def learn(self, population: Population, results: Results) -> None:
        for i, key in enumerate(self.space.keys(population)):
            fidelity = int(results.fidelities[i])
            failed = not np.isfinite(results.violations[i])
            present = None
            if len(self.problem.fidelities) > 1:
                present = next((m for m in self._members if m.key == key), None)
            if present is not None:
                if fidelity >= present.fidelity:
                    present.fidelity = fidelity
                    present.objectives, present.violation = results.objectives[i], float(results.violations[i])
            elif not failed and key not in self._entered:
                self._entered.add(key)
                self._members.append(
                    _Member(population[i : i + 1], key, fidelity, results.objectives[i], float(results.violations[i]))
                )
                if len(self._members) > self.population:
                    self._members.popleft()
