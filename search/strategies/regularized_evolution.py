"""Regularised evolution (Real et al., "Regularized Evolution for Image Classifier Architecture Search", 2019)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from archfront.errors import InputError
from archfront.search.strategies.selection import Floats, Ints, Members, bred_or_sampled, standing
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

    einspace's RE(Mix) is this with the job's ``seeds`` and ``random: 0``; its RM has ``update: false`` as well.

    Args:
        population: size of the population.
        random: number of random candidates to begin with; as many as ``population`` if not set. With 0 the job's seeds
            or warm start are all there is to breed from.
        sample: size of the tournament, drawn with replacement.
        winner: who of a tournament is mutated: ``rank``, the best; or ``front``, a random one of those that no other
            one beats (EvoNorm's choice for several objectives).
        update: whether mutants enter the population; if not, all are bred from what the search began with.
        mutation: probability of each decision to change beyond the one that always does; 0, as in the paper,
            changes exactly one.
    """

    name = "regularized-evolution"

    def __init__(
        self,
        _problem: Problem,
        population: Annotated[int, Field(ge=1)] = 30,
        random: Annotated[int | None, Field(ge=0)] = None,
        sample: Annotated[int, Field(ge=1)] = 10,
        winner: Literal["rank", "front"] = "rank",
        update: bool = True,
        mutation: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        super().__init__(_problem)
        if sample > population:
            remedy = f"Give at most {population}, or a larger strategy.population."
            raise InputError("strategy.sample", sample, "is larger than the population", remedy)
        self.population = population
        self.random = population if random is None else random
        self.sample = sample
        self.winner = winner
        self.update = update
        self.mutation = mutation
        self._started = 0
        self._members: deque[_Member] = deque()
        self._entered: set[bytes] = set()
        self._bred: set[bytes] = set()

    def ask(self, ask: Ask) -> Proposals:
        rng = ask.rng()
        draws = min(max(self.random - self._started, 0), ask.count)
        if not self.random and not self._members and self._asked:
            return self.proposals(self.space.sample(rng, 0))  # until there is someone to breed from
        if draws and not self.update:
            # An ask is of founders alone or of mutants alone, so that a result tells which it is.
            return self.proposals(self.fresh(draws, lambda n: self.space.sample(rng, n)))
        pool = self._pool() if self._members else None

        def generate(count: int) -> Population:
            drawn = self.space.sample(rng, count if pool is None else min(draws, count))
            if pool is None or len(drawn) >= count:
                return drawn
            parents = pool.population[self._winners(rng, pool, count - len(drawn))]
            return np.concatenate([drawn, self.space.mutate(rng, parents, self.mutation)])

        population = self.fresh(ask.count, bred_or_sampled(self.space, rng, generate))
        return self.proposals(population, memory=None if self.update else {"bred": pool is not None})

    def _pool(self) -> Members:
        """The population, the best first."""
        members = list(self._members)
        return Members(
            population=np.concatenate([m.row for m in members]),
            keys=[m.key for m in members],
            fidelities=np.array([m.fidelity for m in members], dtype=np.int64),
            objectives=np.stack([m.objectives for m in members]),
            violations=np.array([m.violation for m in members]),
        ).best(len(members))

    def _winners(self, rng: np.random.Generator, pool: Members, count: int) -> Ints:
        """``(count,)`` indices of the pool, each the winner of a tournament."""
        entrants = rng.integers(len(pool), size=(count, self.sample))
        if self.winner == "rank":
            return np.asarray(
                entrants.min(axis=1), dtype=np.int64
            )  # the pool is sorted: the lowest index of a tournament is its best
        winners = []
        for row in entrants:
            ranks, _ = standing(pool.objectives[row], pool.violations[row], pool.fidelities[row])
            winners.append(rng.choice(row[ranks == 0]))
        return np.array(winners, dtype=np.int64)

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        self._started += int(np.sum(proposals.fidelities == self.problem.fidelities[0]))
        if proposals.memory is not None and proposals.memory["bred"]:
            self._bred.update(self.space.keys(proposals.population))

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
            elif not failed and key not in self._entered and key not in self._bred:
                self._entered.add(key)
                self._members.append(
                    _Member(population[i : i + 1], key, fidelity, results.objectives[i], float(results.violations[i]))
                )
                if len(self._members) > self.population:
                    self._members.popleft()
