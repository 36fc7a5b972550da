"""NSGA-II (Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002), without generations."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from archfront.search.strategies.selection import Members, bred_or_sampled
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy
from archfront.spaces.space import Population


class NSGA2(Strategy):
    """Multi-objective evolution by non-dominated rank and crowding.

    The parents are the best ``population`` of all evaluations so far, chosen anew at each ask: asked for a whole
    population at a time it is the algorithm of the paper, asked for one candidate at a time its steady-state form,
    and nobody waits for a generation to end. Binary tournaments choose two parents, uniform crossover mixes them,
    every child is mutated. What the job has had is never proposed again.

    Results at several fidelities: a candidate counts with its highest one; feasible parents of a higher fidelity come
    first, and rank and crowding compare within a fidelity (``selection``). Infeasible candidates stand behind all
    feasible ones, by violation (section VI of the paper); failed ones are last.

    Args:
        population: number of parents, and of random candidates to begin with; for several objectives about half of
            these are drawn by the space's ``sample_spread``.
        crossover: probability that a child has two parents.
        mutation: probability of each decision to change beyond the one that always does; 0 changes exactly one, which
            was better than the usual 1/n on top on NAS-Bench-201 and on synthetic spaces of 22 decisions.
    """

    name = "nsga2"

    def __init__(
        self,
        _problem: Problem,
        population: Annotated[int, Field(ge=2)] = 50,
        crossover: Annotated[float, Field(ge=0, le=1)] = 0.9,
        mutation: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        super().__init__(_problem)
        self.population = population
        self.batch = population
        self.crossover = crossover
        self.mutation = mutation
        self._started = 0
        self._parts: list[Members] = []
        self._waiting = 0
        self._parents: Members | None = None

    def ask(self, ask: Ask) -> Proposals:
        rng = ask.rng()
        parents = self._selected()
        # The first population is drawn at random even where results of it are in: its diversity is the point.
        draws = min(max(self.population - self._started, 0), ask.count)

        def generate(count: int) -> Population:
            if parents is None:
                return self._drawn(rng, count)
            drawn = self._drawn(rng, min(draws, count))
            return np.concatenate([drawn, self._bred(rng, parents, count - len(drawn))])

        return self.proposals(self.fresh(ask.count, bred_or_sampled(self.space, rng, generate)))

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        self._started += int(np.sum(proposals.fidelities == self.problem.fidelities[0]))

    def learn(self, population: Population, results: Results) -> None:
        self._parts.append(Members.of(self.space, population, results))
        self._waiting += len(results)
        self._parents = None
        # Selecting once per population keeps a replay, which never asks, linear in memory and quick.
        if self._waiting >= self.population:
            self._parts = [Members.join(self._parts).best(self.population)]
            self._waiting = 0

    def _selected(self) -> Members | None:
        """The parents, the best first: a memo of what was told, so asking changes nothing."""
        if self._parents is None and self._parts:
            self._parents = Members.join(self._parts).best(self.population)
        return self._parents

    def _drawn(self, rng: np.random.Generator, count: int) -> Population:
        """Random candidates: about every other one from the spread distribution, for the ends of a front."""
        drawn = self.space.sample(rng, count)
        if self.problem.objectives > 1:
            spread = rng.random(count) < 0.5
            drawn[spread] = self.space.sample_spread(rng, int(spread.sum()))
        return drawn

    def _bred(self, rng: np.random.Generator, parents: Members, count: int) -> Population:
        # Parents are sorted, so the lower of two positions wins a tournament.
        winners = rng.integers(len(parents), size=(2, count, 2)).min(axis=2)
        first, second = parents.population[winners[0]], parents.population[winners[1]]
        mixed = self.space.crossover(rng, first, second)
        both = rng.random(count) < self.crossover
        children = np.where(both.reshape(-1, *[1] * (first.ndim - 1)), mixed, first)
        return self.space.mutate(rng, children, self.mutation)
