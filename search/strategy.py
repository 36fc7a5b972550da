"""The contract of a search strategy: what to try next, as a pure function of what the ledger holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from archfront.search.seen import Seen
from archfront.spaces.space import Population, Space


@dataclass(frozen=True)
class Limit:
    """A constraint on an objective.

    Attributes:
        objective: its index.
        bound: oriented as the objective.
        upper: whether values beyond the bound are too large.
    """

    objective: int
    bound: float
    upper: bool

    def excess(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How far values are outside, relative to the bound; 0 inside."""
        beyond = values - self.bound if self.upper else self.bound - values
        return np.asarray(np.maximum(beyond, 0.0) / max(abs(self.bound), 1e-12))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a strategy needs to know of its job.

    Attributes:
        space: where to search.
        objectives: number of objectives; results hold them oriented so that less is better.
        limits: the constraints that are a function of the objectives; others are known by ``Results.violations`` alone.
        fidelities: in rising order; ``(0,)`` where the job has none.
        seed: the job's.
    """

    space: Space
    objectives: int
    fidelities: tuple[int, ...] = (0,)
    seed: int = 0
    limits: tuple[Limit, ...] = ()

    def excess(self, objectives: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``(n,)``: the part of the violation that the limits are, of ``(n, objectives)``."""
        found = np.zeros(len(objectives))
        for limit in self.limits:
            found += limit.excess(objectives[:, limit.objective])
        return found


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to a strategy.

    Attributes:
        number: counts the asks of the job from 0; all randomness is a function of (seed, number).
        count: how many proposals are wanted; fewer are allowed, none means "wait for results" or "nothing left".
        first: the number of the evaluation that the first proposal becomes; the others follow.
    """

    number: int
    count: int
    first: int
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number])


@dataclass(kw_only=True)
class Proposals:
    """Answer to an ask.

    Attributes:
        population: canonical genotypes, one row a proposal.
        fidelities: one a proposal, ``(n,)``.
        memory: JSON that the strategy wants back when the ask is replayed, or None.
    """

    population: Population
    fidelities: npt.NDArray[np.int64]
    memory: Any = None

    def __len__(self) -> int:
        return len(self.fidelities)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Finished evaluations, in the order in which the ledger committed them.

    Attributes:
        numbers: ``(n,)`` evaluation numbers.
        fidelities: ``(n,)``.
        objectives: ``(n, objectives)``, oriented so that less is better; NaN rows for failed evaluations.
        violations: ``(n,)`` summed relative violation of the constraints, 0 where feasible, inf where failed.
    """

    numbers: npt.NDArray[np.int64]
    fidelities: npt.NDArray[np.int64]
    objectives: npt.NDArray[np.float64]
    violations: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.numbers)


class Strategy(ABC):
    """Proposes genotypes and learns from evaluations.

    The engine calls, for every ask in turn: ``tell`` with all results committed since the last ask (if any), then
    ``ask``, then ``asked`` with the answer as it was stored. To resume a job it makes the same calls from the ledger's
    rows, leaving ``ask`` out. Hence the rule that makes every strategy resumable: **only ``tell`` and ``asked`` may
    change state**; ``ask`` reads it and draws from ``ask.rng()`` alone.

    A subclass implements ``ask`` and ``learn``; the keyword arguments of its ``__init__`` (after ``problem``) are
    what a job file may set.
    """

    name: ClassVar[str]

    replayable: ClassVar[bool] = True
    """False for a strategy whose state is not a function of the ledger; a job that wants exact resume refuses it."""

    batch: int | None = None
    """The most proposals that one ask may want without hurting the search (a generation, say); None: any number."""

    def __init__(self, _problem: Problem) -> None:
        self.problem = _problem
        self.space = _problem.space
        self._seen = Seen()
        self._asked: dict[int, tuple[Population, int]] = {}

    @classmethod
    def check(cls, problem: Problem) -> None:
        """Called when a job is validated.

        Raises:
            InputError: this strategy cannot serve the space or the number of objectives; names those that can.
        """

    @abstractmethod
    def ask(self, ask: Ask) -> Proposals:
        """At most ``ask.count`` proposals that the job has not had yet."""

    @abstractmethod
    def learn(self, population: Population, results: Results) -> None:
        """Take in results; ``population[i]`` is the genotype of ``results`` row i."""

    def remember(self, ask: Ask, proposals: Proposals) -> None:
        """Take note of an ask's answer, beyond what the base class keeps. ``proposals`` may come from elsewhere
        (seeds, a warm start)."""

    def asked(self, ask: Ask, proposals: Proposals) -> None:
        """An answer was stored; called live and on replay alike."""
        keys = self.space.keys(proposals.population)
        fidelities = proposals.fidelities.tolist()
        self._seen.add(keys, proposals.fidelities)
        for offset in range(len(proposals)):
            self._asked[ask.first + offset] = (proposals.population[offset : offset + 1], fidelities[offset])
        self.remember(ask, proposals)

    def tell(self, results: Results) -> None:
        """Results were committed; called live and on replay with the same cuts."""
        if len(results):
            rows = [self._asked.pop(number)[0] for number in results.numbers.tolist()]
            self.learn(np.concatenate(rows), results)

    def is_new(self, population: Population, fidelity: int) -> npt.NDArray[np.bool_]:
        """Which rows the job has not asked for at this fidelity, repeats within the population left out."""
        return self._seen.new(self.space.keys(population), fidelity)

    def fresh(self, count: int, generate: Callable[[int], Population], tries: int = 20) -> Population:
        """Up to ``count`` canonical genotypes from ``generate(n)`` that the job has not asked for yet.

        Fewer come back when ``tries`` rounds gave too few new ones: a small space is nearly exhausted.
        """
        fidelity = self.problem.fidelities[0]
        found = self.space.canonical(generate(count))
        found = found[self.is_new(found, fidelity)]
        for _ in range(tries - 1):
            if len(found) >= count:
                break
            more = self.space.canonical(generate(max(2 * (count - len(found)), 8)))
            found = np.concatenate([found, more])
            found = found[self.is_new(found, fidelity)]
        return found[:count]

    def proposals(self, population: Population, memory: Any = None) -> Proposals:
        """Proposals at the lowest fidelity."""
        fidelities = np.full(len(population), self.problem.fidelities[0], dtype=np.int64)
        return Proposals(population=population, fidelities=fidelities, memory=memory)


def orient(values: Sequence[float], directions: Sequence[str]) -> list[float]:
    """Objective values oriented so that less is better."""
    return [-v if d == "max" else v for v, d in zip(values, directions, strict=True)]
