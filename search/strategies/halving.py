"""Asynchronous successive halving over a job's fidelities (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", 2020: ASHA), around any strategy and for any number of objectives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.search.strategies.selection import ranking
from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy
from archfront.spaces.space import Population

_EXACT_UP_TO = 64
"""A rung of no more results is put in order at each tell."""

_GROWTH = 32
"""A larger one when it has grown by one part in so many."""


class _Rung:
    """The finished evaluations of one fidelity, and who of them went on to the next."""

    def __init__(self, objectives: int) -> None:
        self.rows: list[Population] = []
        self.keys: list[bytes] = []
        self.promoted: set[bytes] = set()
        self._present: set[bytes] = set()
        self._objectives = np.empty((_EXACT_UP_TO, objectives))
        self._violations = np.empty(_EXACT_UP_TO)
        self._counted = 0
        self._order: list[int] | None = None

    def new(self, keys: list[bytes], here: npt.NDArray[np.bool_]) -> list[int]:
        """Where ``here`` holds and the candidate has no result yet: a seed may repeat one, and counts once."""
        found = []
        for i in np.flatnonzero(here).tolist():
            if keys[i] not in self._present:
                self._present.add(keys[i])
                found.append(i)
        return found

    def add(self, population: Population, keys: list[bytes], results: Results) -> None:
        start, end = len(self.keys), len(self.keys) + len(keys)
        if end > len(self._violations):
            size = max(end, 2 * len(self._violations))
            self._objectives = np.resize(self._objectives, (size, self._objectives.shape[1]))
            self._violations = np.resize(self._violations, size)
        self._objectives[start:end] = results.objectives
        self._violations[start:end] = results.violations
        self.rows.extend(population[i : i + 1] for i in range(len(keys)))
        self.keys.extend(keys)
        # Ordering 100 000 results costs tens of milliseconds, and a little growth hardly changes the order.
        if end <= _EXACT_UP_TO or end - self._counted >= end // _GROWTH:
            self._counted = end
            self._order = None

    def promotable(self, eta: float, count: int) -> list[int]:
        """At most ``count`` indices of the best 1/eta that have not gone on, the best first."""
        quota = int(self._counted / eta)
        # Who is among the best changes while the rung grows: without this bound far more than 1/eta would go on.
        count = min(count, quota - len(self.promoted))
        if count <= 0:
            return []
        if self._order is None:
            counted = slice(self._counted)
            violations = self._violations[counted]
            # Everything in a rung has the same fidelity.
            order = ranking(self._objectives[counted], violations, np.zeros(self._counted, dtype=np.int64))[:quota]
            self._order = order[np.isfinite(violations[order])].tolist()
        found: list[int] = []
        waiting = []
        for i in self._order:
            if self.keys[i] not in self.promoted:
                waiting.append(i)
                if len(found) < count:
                    found.append(i)
        # Promotions are never taken back, so those that went on need not be looked at again.
        self._order = waiting
        return found


class Halving(Strategy):
    """Promotes what did well at a low fidelity, and lets another strategy propose at the lowest one.

    Each ask first promotes, from the highest rung down: of the ``n`` finished candidates of a fidelity the best
    ``floor(n / eta)`` may go on to the next one, each once, and never more than so many in all (the paper's rule has
    no such bound, and promotes half of a short job's candidates at eta 3). The best are found by constraint domination,
    non-dominated rank and crowding (``selection``); infeasible ones can be among them, because a bound on a metric
    that grows with training would otherwise stop every candidate; failed ones count in ``n`` and never go on. What is
    left of the ask goes to the wrapped strategy, which is told every result at every fidelity.

    All is a function of the results told and the proposals stored. A rung of more than 64 results is put in order
    anew once it has grown by 1/32, so that a long job costs little; results since then wait for that.

    Args:
        base: the strategy that proposes new candidates.
        eta: one in ``eta`` goes on to the next fidelity.
    """

    name = "halving"

    def __init__(self, _base: Strategy, _problem: Problem, eta: float = 3) -> None:
        super().__init__(_problem)
        if not eta >= 2:
            raise InputError("strategy.halving.eta", eta, "is too small", "Give 2 or more; 3 is usual.")
        self.base = _base
        self.eta = eta
        self.batch = _base.batch
        self._rungs = {fidelity: _Rung(_problem.objectives) for fidelity in _problem.fidelities}
        self._next = dict(zip(_problem.fidelities, _problem.fidelities[1:], strict=False))
        self._below = {upper: lower for lower, upper in self._next.items()}

    def ask(self, ask: Ask) -> Proposals:
        rows: list[Population] = []
        fidelities: list[int] = []
        for lower, upper in sorted(self._next.items(), reverse=True):
            rung = self._rungs[lower]
            for i in rung.promotable(self.eta, ask.count - len(rows)):
                rows.append(rung.rows[i])
                fidelities.append(upper)
        inner = Ask(number=ask.number, count=ask.count - len(rows), first=ask.first + len(rows), seed=ask.seed)
        if not inner.count:
            return Proposals(population=np.concatenate(rows), fidelities=np.array(fidelities, dtype=np.int64))
        fresh = self.base.ask(inner)
        return Proposals(
            population=np.concatenate([*rows, fresh.population]),
            fidelities=np.concatenate([np.array(fidelities, dtype=np.int64), fresh.fidelities]),
            memory=fresh.memory,
        )

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        for key, fidelity in zip(self.space.keys(proposals.population), proposals.fidelities.tolist(), strict=True):
            if fidelity in self._below:
                self._rungs[self._below[fidelity]].promoted.add(key)
        # Promotions stand at higher fidelities than the base's own proposals, so the base can tell them apart.
        self.base.asked(ask, proposals)

    def learn(self, population: Population, results: Results) -> None:
        keys = self.space.keys(population)
        for fidelity in np.unique(results.fidelities).tolist():
            at = np.array(self._rungs[fidelity].new(keys, results.fidelities == fidelity), dtype=np.int64)
            part = Results(
                numbers=results.numbers[at],
                fidelities=results.fidelities[at],
                objectives=results.objectives[at],
                violations=results.violations[at],
            )
            self._rungs[fidelity].add(population[at], [keys[i] for i in at.tolist()], part)
        self.base.tell(results)


def with_halving(strategy: Strategy, problem: Problem, eta: float = 3) -> Strategy:
    """The strategy with successive halving over the problem's fidelities; itself where there is only one.

    Args:
        strategy: a fresh strategy for the same problem.
        problem: its fidelities are the rungs, in rising order.
        eta: one in ``eta`` goes on to the next fidelity; at least 2.

    Raises:
        InputError: ``eta`` is too small.
    """
    return strategy if len(problem.fidelities) == 1 else Halving(strategy, problem, eta)
