"""The order of candidates, and the rungs of successive halving."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from archfront.db.dominance import crowding_distance, nondominated_ranks
from archfront.errors import InputError
from archfront.search.strategies.halving import Halving, with_halving
from archfront.search.strategies.nsga2 import NSGA2
from archfront.search.strategies.random import RandomSearch
from archfront.search.strategies.regularized_evolution import RegularizedEvolution
from archfront.search.strategies.selection import Floats, crowding_within, ranking, standing
from archfront.search.strategy import Ask, Problem, Proposals, Results

from .driver import ToySpace, columns

POINTS = st.tuples(st.integers(0, 30), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(0, 6).map(float))
)


@given(POINTS)
@settings(max_examples=150, deadline=None)
def test_crowding_of_all_fronts_is_that_of_each(points: Floats) -> None:
    fronts = nondominated_ranks(points)
    expected = np.zeros(len(points))
    for front in set(fronts.tolist()):
        expected[fronts == front] = crowding_distance(points[fronts == front])
    assert crowding_within(points, fronts) == pytest.approx(expected)


def test_order_of_feasible_infeasible_and_failed() -> None:
    objectives = np.array([[1.0, 1], [5, 5], [0, 0], [0, 0], [np.nan, np.nan], [2, 2], [1, 1]])
    violations = np.array([0.0, 0, 2, 1, np.inf, 0, 1])
    fidelities = np.array([1, 3, 9, 9, 9, 1, 1])
    # The higher fidelity first although its values are worse; then (1, 1) before (2, 2); then by violation.
    assert ranking(objectives, violations, fidelities).tolist() == [1, 0, 5, 3, 6, 2, 4]
    assert standing(objectives, violations, fidelities)[0].tolist() == [1, 0, 4, 3, 5, 2, 3]


def results(first: int, fidelity: int, values: list[float], violations: list[float] | None = None) -> Results:
    count = len(values)
    return Results(
        numbers=np.arange(first, first + count),
        fidelities=np.full(count, fidelity),
        objectives=np.array(values, dtype=np.float64).reshape(count, 1),
        violations=np.zeros(count) if violations is None else np.array(violations),
    )


def halved(eta: float = 3) -> tuple[Halving, Problem]:
    problem = Problem(space=ToySpace(columns(9, 9, 9)), objectives=1, fidelities=(1, 3, 9), seed=1)
    strategy = with_halving(RandomSearch(problem), problem, eta)
    assert isinstance(strategy, Halving)
    return strategy, problem


def ask_and_store(strategy: Halving, number: int, count: int, first: int) -> Proposals:
    ask = Ask(number=number, count=count, first=first, seed=1)
    proposals = strategy.ask(ask)
    strategy.asked(ask, proposals)
    return proposals


def test_halving_promotes_the_best_third_once() -> None:
    strategy, _ = halved()
    first = ask_and_store(strategy, 0, 9, 0)
    assert first.fidelities.tolist() == [1] * 9
    strategy.tell(results(0, 1, [5, 1, 9, 3, 2, 8, 7, 6, 4]))
    second = ask_and_store(strategy, 1, 5, 9)
    assert second.fidelities.tolist() == [3, 3, 3, 1, 1]
    assert np.array_equal(second.population[:3], first.population[[1, 4, 3]])
    # Those three are in flight: nothing else is promotable until results come.
    assert ask_and_store(strategy, 2, 1, 14).fidelities.tolist() == [1]
    strategy.tell(results(9, 3, [3, 1, 2]))
    third = ask_and_store(strategy, 3, 2, 15)
    assert third.fidelities.tolist() == [9, 1]
    assert np.array_equal(third.population[:1], first.population[[4]])


def test_the_highest_rung_is_promoted_first() -> None:
    strategy, _ = halved()
    first = ask_and_store(strategy, 0, 12, 0)
    strategy.tell(results(0, 1, [float(i) for i in range(12)]))
    upper = Proposals(population=first.population[:3], fidelities=np.full(3, 3))
    strategy.asked(Ask(number=1, count=3, first=12, seed=1), upper)
    strategy.tell(results(12, 3, [3, 2, 1]))
    third = ask_and_store(strategy, 2, 3, 15)
    assert third.fidelities.tolist() == [9, 3, 1]
    assert np.array_equal(third.population[:2], first.population[[2, 3]])


def test_the_less_crowded_comes_first() -> None:
    objectives = np.array([[0.0, 9], [4, 4], [4.5, 3.5], [5, 3], [9, 0]])
    assert set(ranking(objectives, np.zeros(5), np.zeros(5, dtype=np.int64)).tolist()[:2]) == {0, 4}


def test_failed_candidates_are_not_promoted_and_infeasible_ones_come_last() -> None:
    strategy, _ = halved()
    first = ask_and_store(strategy, 0, 6, 0)
    nan, inf = np.nan, np.inf
    strategy.tell(results(0, 1, [nan, nan, nan, nan, nan, 7], [inf, inf, inf, inf, inf, 0.5]))
    second = ask_and_store(strategy, 1, 3, 6)
    assert second.fidelities.tolist() == [3, 1, 1]
    assert np.array_equal(second.population[:1], first.population[[5]])


def test_halving_refuses_an_eta_below_two() -> None:
    with pytest.raises(InputError, match="eta"):
        halved(1.5)


def test_evolution_drops_the_oldest() -> None:
    problem = Problem(space=ToySpace(columns(9, 9, 9)), objectives=1, seed=1)
    strategy = RegularizedEvolution(problem, population=3, sample=3)
    seeds = problem.space.sample(np.random.default_rng(0), 4)
    strategy.asked(Ask(number=0, count=4, first=0, seed=1), strategy.proposals(seeds))
    # The best one is the oldest: after a fourth result nothing descends from it.
    strategy.tell(results(0, 0, [0, 5, 3, 4]))
    children = strategy.ask(Ask(number=1, count=40, first=4, seed=1)).population
    changes = (children[:, None] != seeds[None]).sum(axis=2)
    assert (changes[:, 1:].min(axis=1) == 1).all()
    # Most tournaments of three find the best of the three that are left.
    assert (changes[:, 2] == 1).mean() > 0.5


def test_evolution_refuses_a_tournament_larger_than_the_population() -> None:
    problem = Problem(space=ToySpace(columns(9)), objectives=1)
    with pytest.raises(InputError, match=r"strategy\.sample"):
        RegularizedEvolution(problem, population=5, sample=6)


@pytest.mark.parametrize("cls", [NSGA2, RegularizedEvolution])
def test_a_higher_fidelity_is_preferred(cls: type[NSGA2] | type[RegularizedEvolution]) -> None:
    problem = Problem(space=ToySpace(columns(9, 9, 9, 9)), objectives=1, fidelities=(1, 3), seed=1)
    strategy = (
        NSGA2(problem, population=2, crossover=0)
        if cls is NSGA2
        else RegularizedEvolution(problem, population=2, sample=2)
    )
    seeds = problem.space.sample(np.random.default_rng(0), 2)
    strategy.asked(Ask(number=0, count=2, first=0, seed=1), strategy.proposals(seeds))
    strategy.tell(results(0, 1, [1, 2]))
    strategy.asked(Ask(number=1, count=1, first=2, seed=1), Proposals(population=seeds[1:], fidelities=np.array([3])))
    # Worse than the first one's value, which was won at a lower fidelity.
    strategy.tell(results(2, 3, [3]))
    children = strategy.ask(Ask(number=2, count=16, first=3, seed=1)).population
    near = (children[:, None] != seeds[None]).sum(axis=2)
    assert (near[:, 1] <= near[:, 0]).mean() > 0.6


def test_asks_and_tells_are_quick() -> None:
    """50 proposals on 22 columns take about a millisecond; the bound leaves room for a busy machine."""
    problem = Problem(space=ToySpace(columns(*[9] * 22)), objectives=2, seed=1)
    strategy = NSGA2(problem, population=250)
    rng = np.random.default_rng(0)
    spent = []
    for number in range(40):
        started = time.process_time()
        ask = Ask(number=number, count=50, first=50 * number, seed=1)
        proposals = strategy.ask(ask)
        asked = time.process_time()
        strategy.asked(ask, proposals)
        told = Results(
            numbers=np.arange(50 * number, 50 * number + 50),
            fidelities=proposals.fidelities,
            objectives=rng.random((50, 2)),
            violations=np.zeros(50),
        )
        strategy.tell(told)
        spent.append((asked - started, time.process_time() - asked))
    assert np.median(spent, axis=0).max() < 0.006


def test_a_long_job_is_replayed_in_seconds() -> None:
    problem = Problem(space=ToySpace(columns(*[9] * 22)), objectives=2, fidelities=(1, 3), seed=1)
    strategy = with_halving(NSGA2(problem), problem)
    rng = np.random.default_rng(0)
    population = problem.space.sample(rng, 20_000)
    objectives = rng.random((20_000, 2))
    started = time.process_time()
    for number in range(2000):
        at = slice(10 * number, 10 * number + 10)
        ask = Ask(number=number, count=10, first=10 * number, seed=1)
        strategy.asked(ask, Proposals(population=population[at], fidelities=np.ones(10, dtype=np.int64)))
        strategy.tell(
            Results(
                numbers=np.arange(20_000)[at],
                fidelities=np.ones(10, dtype=np.int64),
                objectives=objectives[at],
                violations=np.zeros(10),
            )
        )
    assert time.process_time() - started < 6
    answer = strategy.ask(Ask(number=2000, count=10, first=20_000, seed=1))
    assert answer.fidelities.tolist() == [3] * 10
