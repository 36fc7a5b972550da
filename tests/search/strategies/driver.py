"""What the tests of strategies share: small spaces, and an engine in a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from archfront.search.strategy import Ask, Problem, Proposals, Results, Strategy
from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Genotype, Layer, Population

Objective = Callable[[Population, int], npt.NDArray[np.float64]]


class ToySpace(ProductSpace):
    """A product space that builds nothing."""

    name = "toy"

    def build(self, genotype: Genotype) -> nn.Module:
        raise NotImplementedError

    def describe(self, genotype: Genotype) -> list[Layer]:
        return []


class FoldedSpace(ToySpace):
    """A toy space where the second decision means nothing while the first one is 0."""

    def canonical(self, population: Population) -> Population:
        folded = population.copy()
        folded[folded[:, 0] == 0, 1] = 0
        return folded


def columns(*sizes: int, ordered: bool | None = None) -> list[Column]:
    """Columns of these sizes: ordered ones and others in turn, or all alike."""
    return [
        Column(f"c{i}", tuple(range(n)), ordered=i % 2 == 0 if ordered is None else ordered)
        for i, n in enumerate(sizes)
    ]


def bumpy(objectives: int) -> Objective:
    """Deterministic objectives on any product space, with ties; a higher fidelity shifts them."""

    def evaluate(population: Population, fidelity: int) -> npt.NDArray[np.float64]:
        rows = population.astype(np.float64)
        first = ((rows - 1.3) ** 2).sum(axis=1) + 0.1 * fidelity
        second = np.abs(rows - rows.shape[1] + 1).sum(axis=1) - 0.2 * fidelity
        return np.stack([first, second, rows[:, 0] * 3 % 5], axis=1)[:, :objectives]

    return evaluate


@dataclass
class Row:
    """One ask as the ledger keeps it: what was told before it, and its answer."""

    told: Results | None
    ask: Ask
    proposals: Proposals
    foreign: bool = False


@dataclass
class Engine:
    """Asks a strategy, evaluates, and tells the results in another order than that of asking.

    Every 7th evaluation fails and every 5th is infeasible, by its number. All choices come from ``seed``, so a
    replay meets the same circumstances.

    Attributes:
        workers: most evaluations in flight.
        seeds: ask number -> foreign proposals that are stored instead of an answer of the strategy.
    """

    strategy: Strategy
    problem: Problem
    objective: Objective
    workers: int = 6
    seed: int = 0
    flawed: bool = True
    seeds: Mapping[int, Proposals] = field(default_factory=dict)
    log: list[Row] = field(default_factory=list)
    in_flight: dict[int, tuple[Population, int]] = field(default_factory=dict)
    evaluated: int = 0

    def run(self, asks: int) -> list[Row]:
        """Go on until ``asks`` asks are stored, or nothing is left to do."""
        while len(self.log) < asks and self.step():
            pass
        return self.log

    def step(self) -> bool:
        number = len(self.log)
        rng = np.random.default_rng([self.seed, number])
        told = self.finished(rng) if number else None
        if told is not None:
            self.strategy.tell(told)
        free = self.workers - len(self.in_flight)
        ask = Ask(number=number, count=int(rng.integers(1, free + 1)), first=self.evaluated, seed=self.problem.seed)
        foreign = number in self.seeds
        proposals = self.seeds[number] if foreign else self.strategy.ask(ask)
        self.store(Row(told, ask, stored(proposals), foreign))
        return bool(len(proposals) or self.in_flight)

    def resume(self, log: list[Row]) -> None:
        """Replay the rows of an earlier engine, and stand where it stood."""
        for row in log:
            if row.told is not None:
                self.strategy.tell(row.told)
                for number in row.told.numbers.tolist():
                    del self.in_flight[number]
            self.store(row)

    def store(self, row: Row) -> None:
        self.strategy.asked(row.ask, row.proposals)
        for i in range(len(row.proposals)):
            self.in_flight[row.ask.first + i] = (
                row.proposals.population[i : i + 1],
                int(row.proposals.fidelities[i]),
            )
        self.evaluated += len(row.proposals)
        self.log.append(row)

    def finished(self, rng: np.random.Generator) -> Results | None:
        """Some of what is in flight, in any order; at least one when no worker is free."""
        waiting = rng.permutation(np.array(list(self.in_flight), dtype=np.int64))
        least = 1 if len(waiting) == self.workers else 0
        chosen = waiting[: rng.integers(least, len(waiting) + 1)]
        if not len(chosen):
            return None
        objectives, violations, fidelities = [], [], []
        for number in chosen.tolist():
            row, fidelity = self.in_flight.pop(number)
            failed = self.flawed and number % 7 == 6
            values = self.objective(row, fidelity)[0]
            objectives.append(np.full_like(values, np.nan) if failed else values)
            violations.append(np.inf if failed else 0.5 * (self.flawed and number % 5 == 4))
            fidelities.append(fidelity)
        return Results(
            numbers=chosen,
            fidelities=np.array(fidelities, dtype=np.int64),
            objectives=np.stack(objectives),
            violations=np.array(violations, dtype=np.float64),
        )


def stored(proposals: Proposals) -> Proposals:
    """An answer as it comes back from the ledger; a database may order the keys of its JSON in its own way."""
    memory: Any = json.loads(json.dumps(proposals.memory, sort_keys=True, allow_nan=False))
    return Proposals(population=proposals.population, fidelities=proposals.fidelities, memory=memory)


def same(first: Proposals, second: Proposals) -> bool:
    return (
        np.array_equal(first.population, second.population)
        and np.array_equal(first.fidelities, second.fidelities)
        and first.memory == second.memory
    )
