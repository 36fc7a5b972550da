"""What every allocator promises, tried on each one in the table."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.registry import ALLOCATORS

from .problems import best_of_all, problem, quality_of, random_problem

SETTINGS: dict[str, dict[str, Any]] = {
    "bisection": {"tolerance": 1.0},
    "search": {"evaluations": 60},
    "dp": {"steps": 1000},
    "differentiable": {"steps": 60},
    "two-pool": {"splits": 5},
}

FACTORS = {"greedy": 1.3, "search": 1.05, "dp": 1.15, "differentiable": 2.0, "threshold": 2.0, "two-pool": 2.0}
"""How many times the least damage an allocator may do on the random problems; any other one may do this often:"""

FACTOR = 4.0


class Refused(Exception):
    """An allocator cannot serve a problem, and says so."""


def made(name: str) -> Allocator:
    return ALLOCATORS.build({"name": name, **SETTINGS.get(name, {})}, "allocator")


def solved(name: str, given: Problem, evaluate: Callable[[Sequence[int]], float] | None = None) -> Allocation:
    """By an allocator with what it needs.

    Raises:
        Refused: the allocator says that it does not serve several budgets.
    """
    try:
        return made(name).allocate(given, evaluate)
    except InputError as error:
        if error.field == "evaluate" and evaluate is None:
            return made(name).allocate(given, quality_of(given))
        if error.field == "budgets" and len(given.budgets) > 1 and "serves one" in error.problem:
            raise Refused from error
        raise


def every_allocator(test: Callable[..., None]) -> Any:
    """A test of each allocator in the table; one that refuses a problem by name has passed it."""

    @functools.wraps(test)
    def run(name: str, **options: Any) -> None:
        with contextlib.suppress(Refused):
            test(name, **options)

    return pytest.mark.parametrize("name", ALLOCATORS.names())(run)


@every_allocator
def test_near_the_best_of_all_policies_and_never_better(name: str) -> None:
    for seed in range(25):
        given = random_problem(seed)
        found = solved(name, given)
        best, _ = best_of_all(given)
        assert given.is_feasible(found.choices)
        assert found.damage == pytest.approx(given.total_damage(found.choices))
        assert found.damage >= best - 1e-9 * abs(best)
        if made(name).is_exact or found.gap == 0:
            assert found.damage == pytest.approx(best, rel=1e-9)
        else:
            assert found.damage <= FACTORS.get(name, FACTOR) * best
        if found.gap is not None:
            assert found.damage - best <= found.gap * abs(best) * (1 + 1e-6) + 1e-9


@every_allocator
@pytest.mark.parametrize("budgets", [0, 1, 2, 3])
def test_damage_and_costs_of_any_kind(name: str, budgets: int) -> None:
    for seed in range(5):
        given = random_problem(seed, sites=7, budgets=max(budgets, 1), wild=True)
        given = given if budgets else replace(given, budgets={})
        for evaluate in (None, quality_of(given)):
            found = solved(name, given, evaluate)
            best, _ = best_of_all(given)
            assert given.is_feasible(found.choices)
            assert found.costs == given.total_costs(found.choices)
            assert found.damage >= best - 1e-9
            if made(name).is_exact:
                assert found.damage == pytest.approx(best, abs=1e-9)


@every_allocator
def test_costs_below_zero_and_a_least_cost(name: str) -> None:
    # Mean bits of at least and at most so much, as MixDQ wants them: the second cost is the negative of the first.
    bits = [[2.0, 4.0, 8.0]] * 5
    damage = [[9.0, 3.0, 1.0], [5.0, 2.0, 1.0], [8.0, 1.5, 1.0], [4.0, 3.0, 1.0], [2.0, 1.2, 1.0]]
    both = {"most": tuple(map(np.array, bits)), "least": tuple(-np.array(row) for row in bits)}
    given = replace(problem(damage, bits, 40.0), costs=both, budgets={"most": 22.0, "least": -20.0})
    found = solved(name, given)
    assert given.is_feasible(found.choices)
    assert 20 <= found.costs["most"] <= 22


@every_allocator
def test_the_same_again(name: str) -> None:
    equals = problem([[1.0, 0.0]] * 12, [[1.0, 2.0]] * 12, 18.0)
    for given in (random_problem(3), random_problem(4), equals):
        noisy = functools.partial(lambda given, choices: float(np.sin(1e3 * given.total_damage(choices))), given)
        assert solved(name, given) == solved(name, given)
        assert solved(name, given, noisy) == solved(name, given, noisy)


@every_allocator
def test_identity_where_the_budgets_allow_everything(name: str) -> None:
    damage = [[9.0, 3.0, 0.0], [4.0, 0.0], [5.0, 2.0, 1.0, 0.0]]
    costs = [[1.0, 2.0, 3.0], [2.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    for budget in (11.0, 1e9):
        found = solved(name, problem(damage, costs, budget))
        assert found.choices == (2, 1, 3)
        assert found.damage == 0.0
        assert found.gap in (0, None)


@every_allocator
def test_the_only_policy_that_fits(name: str) -> None:
    damage = [[9.0, 3.0, 0.0], [4.0, 0.0], [5.0, 2.0, 1.0, 0.0]]
    costs = [[1.0, 2.0, 3.0], [2.0, 4.0], [0.1, 2.0, 3.0, 4.0]]
    assert solved(name, problem(damage, costs, 1.0 + 2.0 + 0.1)).choices == (0, 0, 0)


@every_allocator
def test_ties(name: str) -> None:
    # Alone, the first site would be low and the second one high.
    damage = [[1.0, 0.0], [9.0, 0.0], [5.0, 0.0], [6.0, 0.0]]
    costs = [[1.0, 2.0]] * 4
    found = solved(name, problem(damage, costs, 6.0, ties=((0, 1),)))
    assert found.choices[0] == found.choices[1]
    assert found.damage in (10.0, 11.0)
    if made(name).is_exact:
        assert found.choices == (0, 0, 1, 1)


@every_allocator
def test_budget_below_the_least_names_it(name: str) -> None:
    with pytest.raises(InputError, match=r"budget\.size: 3\.0 is below 4\.5, the least"):
        solved(name, problem([[1, 0], [1, 0]], [[2.0, 4.0], [2.5, 4.0]], 3.0))


@every_allocator
def test_budgets_that_cannot_be_met_together_name_the_least(name: str) -> None:
    given = replace(
        problem([[1, 0], [1, 0]], [[1.0, 2.0], [1.0, 2.0]], 3.0),
        costs={
            "size": (np.array([1.0, 2.0]), np.array([1.0, 2.0])),
            "time": (np.array([8.0, 5.0]), np.array([9.0, 5.0])),
        },
        budgets={"size": 3.0, "time": 12.0},
    )
    with pytest.raises(InputError, match=r"size 4 or more; time 13 or more"):
        solved(name, given)


@every_allocator
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_damage_that_is_not_finite(name: str, number: float) -> None:
    with pytest.raises(InputError, match="is not finite"):
        solved(name, problem([[number, 0], [1, 0]], [[2.0, 4.0], [2.5, 4.0]], 7.0))


@every_allocator
def test_true_quality_that_fails_now_and_then(name: str) -> None:
    given = random_problem(5)
    quality = quality_of(given)
    top = given.spread([int(np.argmin(row)) for row in given.untied().damage])

    def evaluate(choices: Sequence[int]) -> float:
        failed = tuple(choices) != top and sum(choices) % 3 == 0
        return float("nan") if failed else quality(choices)

    assert given.is_feasible(solved(name, given, evaluate).choices)


@every_allocator
def test_evaluations_are_counted(name: str) -> None:
    given = random_problem(6)
    seen: list[tuple[int, ...]] = []
    quality = quality_of(given)

    def evaluate(choices: Sequence[int]) -> float:
        seen.append(tuple(choices))
        return quality(choices)

    assert solved(name, given, evaluate).evaluations == len(seen) == len(set(seen))


def test_random_problems_are_no_trivial_ones() -> None:
    spread = []
    for seed in range(25):
        best, damages = best_of_all(random_problem(seed))
        spread.append(float(np.median(damages)) / best)
    assert np.median(spread) > 1.5
