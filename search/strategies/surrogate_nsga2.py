"""NSGA-II that searches a surrogate between evaluations, in the line of LINAS (Cummings et al., "A Hardware-Aware
Framework for Accelerating Neural Architecture Search Across Modalities", 2022) and DyNAS-T."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

import numpy as np
from pydantic import Field
from threadpoolctl import threadpool_limits

from archfront.search.strategies.additive import Decisions, supported
from archfront.search.strategies.nsga2 import NSGA2
from archfront.search.strategies.selection import Floats, Members, ranking
from archfront.search.strategies.surrogate import Choice, Rows, Surrogate
from archfront.search.strategy import Ask, Problem, Proposals, Results
from archfront.spaces.product import ColumnSpace
from archfront.spaces.space import Population

_FEWEST = 20
_MOST = 1200
"""Evaluations that a surrogate is fitted to: what it costs grows with their third power."""

_ROUNDING = 1e-9
"""A violation below it is what sums of several leave."""

_DRAWS = 8
"""Of prices, where objectives are sums over decisions."""

_MOST_PRICES = 1500
"""Choices of all decisions up to which they are priced: what that costs grows with their third power."""

_REMEMBERED = 8
"""Choices of earlier asks, for they are a function of what they were made from."""

_GROWTH, _ENOUGH = 1.3, 400
"""Kernels are chosen anew whenever there are so many times more evaluations, until there are enough."""


@dataclass(frozen=True)
class _Foresight:
    """Surrogates of all objectives, and of what the limits of objectives leave of the violation, where anything."""

    problem: Problem
    objectives: list[Surrogate]
    violation: Surrogate | None
    smallest: float

    def members(self, keys: list[bytes], population: Population, rows: Rows) -> Members:
        """Candidates as if they had been evaluated."""
        foreseen = [surrogate.predict(rows) for surrogate in self.objectives]
        values = [surrogate.values(column) for surrogate, column in zip(self.objectives, foreseen, strict=True)]
        violations = self.problem.excess(np.stack(values, axis=1))
        if self.violation is not None:
            allowed = self.violation.standard(self.smallest / 2)
            violations += np.maximum(self.violation.predict(rows) - allowed, 0.0)
        return Members(
            population=population,
            keys=keys,
            fidelities=np.zeros(len(keys), dtype=np.int64),
            objectives=np.stack(foreseen, axis=1),
            violations=violations,
        )


class SurrogateNSGA2(NSGA2):
    """NSGA-II whose generations are mostly bred on Gaussian processes, and only their last one is evaluated.

    After the first population each ask fits a surrogate of every objective to what is known, breeds ``generations``
    generations on their predictions, and proposes the best of the last that the job has not had. A fifth of the
    proposals is bred as NSGA-II would, so that no error of the surrogates lasts. For evaluations that take longer than
    an ask does: two seconds at a thousand evaluations.

    Surrogates know the features that ``Space.encode`` gives, in spaces of columns also what adds up over decisions
    (``additive``), and results of the highest fidelity at which twenty are known.

    Args:
        population, crossover, mutation: as of ``nsga2``.
        generations: bred on surrogates for each ask.
    """

    name = "surrogate-nsga2"

    def __init__(
        self,
        _problem: Problem,
        population: Annotated[int, Field(ge=2)] = 50,
        crossover: Annotated[float, Field(ge=0, le=1)] = 0.9,
        mutation: Annotated[float, Field(ge=0, le=1)] = 0.0,
        generations: Annotated[int, Field(ge=1)] = 20,
    ) -> None:
        super().__init__(_problem, population, crossover, mutation)
        self.generations = generations
        self._known: list[Members] = []
        self._foresight: _Foresight | None = None
        self._choices: dict[bytes, Choice] = {}
        self._decisions: Decisions | None = None
        columns = self.space.columns if isinstance(self.space, ColumnSpace) else ()
        if 0 < sum(len(column.choices) for column in columns) <= _MOST_PRICES:
            self._decisions = Decisions(
                kinds=tuple((column.choices, column.ordered) for column in columns),
                counts=tuple(len(column.choices) for column in columns),
            )

    def learn(self, population: Population, results: Results) -> None:
        super().learn(population, results)
        self._known.append(Members.of(self.space, population, results))
        self._foresight = None
        if sum(map(len, self._known)) > 2 * _MOST:
            self._known = [_best_and_newest(Members.join(self._known))]

    def ask(self, ask: Ask) -> Proposals:
        foresight = self._foreseen() if self._started >= self.population else None
        if foresight is None:
            return super().ask(ask)
        rng = ask.rng()
        wanted = ask.count - int(rng.binomial(ask.count, 0.2))
        population = self._best_foreseen(rng, foresight, wanted)
        rest = super().ask(ask).population
        rest = rest[~np.isin(self.space.keys(rest), self.space.keys(population))] if len(population) else rest
        return self.proposals(np.concatenate([population, rest])[: ask.count])

    def _best_foreseen(self, rng: np.random.Generator, foresight: _Foresight, count: int) -> Population:
        """New candidates, bred on what is foreseen from the best that are known."""
        fidelity = self.problem.fidelities[0]
        parents = self._selected()
        assert parents is not None
        size = max(4 * count, self.population)
        begun = parents.population
        sums = [surrogate.summed for surrogate in foresight.objectives]
        if len(sums) > 1 and all(sums):
            # Some by other prices than the most probable ones, so that what is tried tells which are right.
            draws = [None, *[rng] * _DRAWS]
            tables = [[one.table(draw) for one in sums if one is not None] for draw in draws]
            sizes = [size, *[size // _DRAWS] * _DRAWS]
            drawn = np.concatenate([supported(one, rng, n) for one, n in zip(tables, sizes, strict=True)])
            begun = np.concatenate([begun, self.space.canonical(np.unique(drawn, axis=0).astype(begun.dtype))])
        alive = self._foretold(foresight, begun)
        for _ in range(self.generations):
            children = self.space.canonical(self._bred(rng, alive, size))
            alive = Members.join([alive, self._foretold(foresight, children)]).best(size)
        order = ranking(alive.objectives, alive.violations, alive.fidelities)
        ranked = alive.population[order]
        return ranked[self.is_new(ranked, fidelity)][:count]

    def _foretold(self, foresight: _Foresight, population: Population) -> Members:
        return foresight.members(self.space.keys(population), population, self._rows(population))

    def _rows(self, population: Population) -> Rows:
        features = np.asarray(self.space.encode(population), dtype=np.float64)
        return Rows(features, None if self._decisions is None else population.astype(np.int64))

    def _foreseen(self) -> _Foresight | None:
        """The surrogates, a memo of what was told; None while too little is known."""
        if self._foresight is None and self._known:
            known = Members.join(self._known)
            whole = np.isfinite(known.objectives).all(axis=1) & np.isfinite(known.violations)
            for fidelity in np.unique(known.fidelities)[::-1]:
                rows = np.flatnonzero(whole & (known.fidelities == fidelity))
                if len(rows) >= _FEWEST:
                    # Its matrices are small: a second thread costs more than it computes, the more so beside workers.
                    with threadpool_limits(1):
                        self._foresight = self._fitted(_best_and_newest(known.take(rows)))
                    break
        return self._foresight

    def _fitted(self, known: Members) -> _Foresight:
        rows = self._rows(known.population)
        # On a part that grows by steps, so that every ask between two steps chooses alike.
        steps = int(np.log(min(len(known), _ENOUGH) / _FEWEST) / np.log(_GROWTH))
        first = int(_FEWEST * _GROWTH**steps)

        def surrogate(values: Floats, *, plain: bool = False) -> Surrogate:
            some = rows.first(first)
            key = sha256(some.features.tobytes() + values[:first].tobytes() + bytes([plain])).digest()
            if key not in self._choices:
                made = Surrogate(some, values[:first], plain=plain, decisions=self._decisions)
                self._choices = {**dict(list(self._choices.items())[-_REMEMBERED:]), key: made.choice}
            return Surrogate(rows, values, self._choices[key], plain=plain, decisions=self._decisions)

        rest = known.violations - self.problem.excess(known.objectives)
        rest[rest < _ROUNDING] = 0.0
        positive = rest[rest > 0]
        return _Foresight(
            problem=self.problem,
            objectives=[surrogate(column) for column in known.objectives.T],
            violation=surrogate(rest, plain=True) if len(positive) else None,
            smallest=float(positive.min(initial=0.0)) if len(positive) else 0.0,
        )


def _best_and_newest(known: Members) -> Members:
    """As many as a surrogate is fitted to, in their order: half of them the best, the others the newest."""
    if len(known) <= _MOST:
        return known
    kept = np.zeros(len(known), dtype=bool)
    kept[ranking(known.objectives, known.violations, known.fidelities)[: _MOST // 2]] = True
    others = np.flatnonzero(~kept)
    kept[others[len(others) - (_MOST - int(kept.sum())) :]] = True
    return known.take(np.flatnonzero(kept))
