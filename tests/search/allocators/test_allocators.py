"""What single allocators promise beyond the contract of all."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.search.allocators.bisection import Bisection
from archfront.search.allocators.differentiable import Differentiable
from archfront.search.allocators.dynamic_programme import DynamicProgramme
from archfront.search.allocators.greedy import IterativeGreedy
from archfront.search.allocators.linear_programme import Milp
from archfront.search.allocators.per_site import PerSite, argmin_or_keep
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.proportional import Proportional
from archfront.search.allocators.quota import QuotaSort
from archfront.search.allocators.search import SearchAllocator
from archfront.search.allocators.tables import Tables
from archfront.search.allocators.threshold import GlobalThreshold

from .problems import best_of_all, problem, quality_of, random_problem


def alike(damage: Sequence[float], budget: float) -> Problem:
    """Sites of 4 or 8 bits; 4 bits do this damage."""
    return problem([[d, 0.0] for d in damage], [[4.0, 8.0]] * len(damage), budget)


def test_quota_is_the_top_k() -> None:
    damage = [3.0, 9.0, 1.0, 7.0, 5.0, 2.0]
    # Layer-Wise Quantization: k = L (mean - low) / (high - low) = 6 (6 - 4) / 4 = 3.
    assert QuotaSort().allocate(alike(damage, 6 * 6.0)).choices == (0, 1, 0, 1, 1, 0)
    assert QuotaSort().allocate(alike([5.0] * 6, 6 * 6.0)).choices == (1, 1, 1, 0, 0, 0)


def test_quota_sorts_by_damage_and_not_by_damage_per_cost() -> None:
    given = problem([[5.0, 0.0], [4.0, 0.0]], [[1.0, 11.0], [1.0, 2.0]], 12.0)
    assert QuotaSort().allocate(given).choices == (1, 0)
    assert GlobalThreshold(fill=False).allocate(given).choices == (0, 1)


def test_threshold_ends_at_the_largest_policy_that_fits() -> None:
    damage = [8.0, 4.0, 2.0, 1.0]
    for budget, high in [(16.0, 0), (19.9, 0), (20.0, 1), (24.0, 2), (28.5, 3), (32.0, 4)]:
        choices = GlobalThreshold(fill=False).allocate(alike(damage, budget)).choices
        assert choices == tuple(int(i < high) for i in range(4))
    # Equal worth, and room for two of four.
    assert GlobalThreshold(fill=False).allocate(alike([3.0] * 4, 24.0)).choices == (1, 1, 0, 0)


def test_threshold_goes_along_the_hull() -> None:
    # The middle choice is above the line from the first to the last one: no threshold chooses it.
    given = problem([[10.0, 9.5, 0.0], [10.0, 2.0, 0.0]], [[0.0, 1.0, 2.0]] * 2, 2.0)
    assert GlobalThreshold(fill=False).allocate(given).choices == (0, 1)
    assert GlobalThreshold().allocate(given).choices == (0, 2)


def test_threshold_floors() -> None:
    given = problem([[9.0, 1.0, 0.0], [0.3, 0.1, 0.0]], [[1.0, 2.0, 4.0]] * 2, 5.0)
    assert GlobalThreshold().allocate(given).choices == (2, 0)
    assert GlobalThreshold(floors=2.0).allocate(given).choices == (1, 1)
    assert GlobalThreshold(floors={"s1": 3.0}).allocate(given).choices == (0, 2)
    assert GlobalThreshold(floors={"s1": 99.0}).allocate(given).choices == (0, 2)
    with pytest.raises(InputError, match=r"floors.* budget\.size 5: with them all sites together cost 8 or more"):
        GlobalThreshold(floors=3.0).allocate(given)
    with pytest.raises(InputError, match=r"floors\.s7.*Known: s0, s1"):
        GlobalThreshold(floors={"s7": 3.0}).allocate(given)
    tied = replace(given, ties=((0, 1),), budgets={"size": 8.0})
    assert GlobalThreshold(floors={"s1": 3.0}).allocate(tied).choices == (2, 2)


def test_proportional_floor_and_shares() -> None:
    costs = [[float(c) for c in range(1, 11)]] * 2
    # Sensitivities 1 : 2 of 18 above the floor of 2: 3 + 6 of the 9 that the budget leaves.
    steep = [[9 * s - s * c for c in range(10)] for s in (1.0, 2.0)]
    assert Proportional().allocate(problem(steep, costs, 11.0)).choices == (3, 6)
    starved = [[9 * s - s * c for c in range(10)] for s in (0.001, 2.0)]
    assert Proportional().allocate(problem(starved, costs, 11.0)).choices == (0, 9)
    assert Proportional(floor=0.4).allocate(problem(starved, costs, 11.0)).choices == (3, 6)


def test_milp_with_tiny_differences() -> None:
    # SSIM: all the damages lie within 1e-3 of each other; a default gap of a solver would call any of them optimal.
    rng = np.random.default_rng(2)
    for _ in range(10):
        damage = 1 - rng.uniform(0.9990, 0.9999, (10, 3))
        given = problem((1e-6 * damage + 5.0).tolist(), rng.uniform(1e6, 9e6, (10, 3)).tolist(), 4e7)
        assert Milp().allocate(given).damage == pytest.approx(best_of_all(given)[0], rel=0, abs=1e-13)


def test_milp_holds_budgets_more_strictly_than_its_solver() -> None:
    # 10 + 20 is above the budget by 5e-12 of what lies between it and the least cost, which HiGHS takes for met.
    given = problem([[5.0, 0.0], [7.0, 0.0], [1.0, 0.0]], [[-1e6, 10.0], [-1e6, 20.0], [0.0, 0.0]], 30.0 - 1e-5)
    found = Milp().allocate(given)
    assert found.choices == (0, 1, 1)
    assert given.is_feasible(found.choices)


def test_milp_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # On these HiGHS 1.12 does, however silent it is told to be.
    for seed in range(40):
        Milp().allocate(random_problem(seed))
    print("mine")
    assert capfd.readouterr().out == "mine\n"


def test_milp_with_damages_of_all_sizes() -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        given = problem(rng.lognormal(0, 6, (9, 3)).tolist(), rng.lognormal(0, 2, (9, 3)).tolist(), 40.0)
        assert Milp().allocate(given).damage == pytest.approx(best_of_all(given)[0], rel=1e-9)


def test_dp_is_exact_on_whole_costs_and_says_so() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        given = problem(rng.normal(0, 1, (7, 4)).tolist(), (rng.integers(0, 40, (7, 4)) * 0.25).tolist(), 30.0)
        found = DynamicProgramme(steps=200).allocate(given)
        assert found.gap == 0.0
        assert found.damage == pytest.approx(best_of_all(given)[0])


def test_dp_rounds_up() -> None:
    # In tenths of the budget the two sites would come to exactly 10 if costs were rounded to the nearest.
    given = problem([[5.0, 0.0], [5.0, 0.0]], [[0.0, 0.5003], [0.0, 0.5001]], 1.0)
    found = DynamicProgramme(steps=10).allocate(given)
    assert given.is_feasible(found.choices)
    assert found.damage == 5.0


def test_dp_refuses_several_budgets() -> None:
    with pytest.raises(InputError, match="several, and dp serves one"):
        DynamicProgramme().allocate(random_problem(0, budgets=2))


def falling(order: Sequence[int], holds: int) -> Sequence[float]:
    """Damages by which the sites are in this order, and the first ones up to ``holds`` do next to none together."""
    damage = [0.0] * len(order)
    for place, site in enumerate(order):
        damage[site] = 1e-6 * (place + 1) if place < holds else 0.1 * (place + 1)
    return damage


@pytest.mark.parametrize("sites", [1, 2, 7, 16, 33])
def test_bisection_equals_the_linear_scan(sites: int) -> None:
    rng = np.random.default_rng(sites)
    for holds in {0, 1, sites // 2, sites - 1, sites}:
        order = rng.permutation(sites).tolist()
        given = replace(alike(falling(order, holds), 8.0 * sites), budgets={})
        found = Bisection(tolerance=0.999).allocate(given, lambda choices, p=given: 1.0 - p.total_damage(choices))
        assert {i for i, choice in enumerate(found.choices) if choice == 0} == set(order[:holds])
        # One of them is of the identity.
        assert found.evaluations <= math.ceil(math.log2(sites)) + 2


def test_bisection_lowers_again_what_took_the_step_before() -> None:
    damage = [[0.9, 1e-3, 0.0], [3e-3, 1e-3, 0.0], [0.9, 0.8, 0.0], [4e-3, 2e-3, 0.0]]
    given = replace(problem(damage, [[4.0, 8.0, 16.0]] * 4, 64.0), budgets={})
    found = Bisection(tolerance=0.98).allocate(given, quality_of(given))
    assert found.choices == (1, 0, 2, 0)


def test_bisection_leaves_alone_what_did_not_take_the_step_before() -> None:
    damage = [[0.02, 0.01, 0.0], [0.04, 0.03, 0.0]]
    given = replace(problem(damage, [[4.0, 8.0, 16.0]] * 2, 32.0), budgets={})
    found = Bisection().allocate(given, lambda choices: 0.0 if choices[1] == 1 else 1.0)
    assert found.choices == (0, 2)


def test_ladder_goes_down_in_cost_and_leaves_out_what_a_cheaper_choice_beats() -> None:
    given = problem([[0.0, 5.0, 9.0, 4.0, 8.0, 0.0]], [[10.0, 4.0, 1.0, 6.0, 5.0, 12.0]], 99.0)
    assert Tables.of(given).ladder(0) == [5, 0, 3, 1, 2]


def test_bisection_meets_budgets_that_quality_would_not() -> None:
    given = alike([0.5, 0.2, 0.4, 0.3], 24.0)
    found = Bisection(tolerance=0.999).allocate(given, lambda choices: 1.0 - given.total_damage(choices))
    assert found.choices == (1, 0, 1, 0)


def test_bisection_of_a_negative_quality() -> None:
    given = replace(alike([1e-3, 0.5], 99.0), budgets={})
    found = Bisection(tolerance=0.99).allocate(given, lambda choices: -2.0 - given.total_damage(choices))
    assert found.choices == (0, 1)


def test_bisection_says_when_quality_is_not_monotone(caplog: pytest.LogCaptureFixture) -> None:
    given = replace(alike([0.1, 0.2, 0.3, 0.4], 99.0), budgets={})

    def bumpy(choices: Sequence[int]) -> float:
        return {0: 1.0, 1: 0.9, 2: 0.95, 3: 0.99, 4: 0.8}[list(choices).count(0)]

    with caplog.at_level(logging.WARNING):
        Bisection(tolerance=0.94).allocate(given, bumpy)
    assert "step 1: quality is not monotone" in caplog.text
    caplog.clear()
    Bisection(tolerance=0.94).allocate(given, quality_of(given))
    assert not caplog.records


def test_bisection_needs_an_evaluation() -> None:
    with pytest.raises(InputError, match="evaluate: None is missing"):
        Bisection().allocate(alike([1.0], 8.0))
    with pytest.raises(InputError, match="not finite for the identity"):
        Bisection().allocate(alike([1.0], 8.0), lambda _: float("nan"))


def misled(choices: Sequence[int]) -> float:
    """A truth in which lowering both of the first two sites costs dearly, whatever their damages say."""
    low = [choice == 0 for choice in choices]
    return 1.0 - 0.01 * sum(low) - 0.8 * (low[0] and low[1]) - 0.1 * low[3]


@pytest.mark.parametrize("allocator", [IterativeGreedy(), SearchAllocator()], ids=["greedy", "search"])
def test_true_quality_knows_of_interactions(allocator: IterativeGreedy | SearchAllocator) -> None:
    given = alike([0.1, 0.1, 0.5, 0.6], 24.0)
    assert allocator.allocate(given).choices == (0, 0, 1, 1)
    found = allocator.allocate(given, misled)
    assert found.choices in {(0, 1, 0, 1), (1, 0, 0, 1)}
    assert found.evaluations > 3


def test_greedy_goes_by_damage_for_what_it_saves() -> None:
    # The second site saves in one step what the others save in two, of less damage each.
    given = problem([[2.0, 0.0], [3.0, 0.0], [2.0, 0.0]], [[0.0, 5.0], [0.0, 10.0], [0.0, 5.0]], 10.0)
    assert IterativeGreedy().allocate(given).choices == (1, 0, 1)
    # What a step saves beyond the need is worth nothing.
    given = problem([[2.0, 0.0], [3.0, 0.0]], [[0.0, 5.0], [0.0, 10.0]], 10.0)
    assert IterativeGreedy().allocate(given).choices == (0, 1)


def test_greedy_raises_with_what_is_left() -> None:
    # The last site to go lower frees room for the first one.
    given = problem([[1.0, 0.0], [10.0, 0.0]], [[0.0, 1.0], [0.0, 5.0]], 4.0)
    assert IterativeGreedy().allocate(given).choices == (1, 0)
    # Not where the raised policy fails.
    failing = IterativeGreedy().allocate(given, lambda choices: float("nan") if choices[0] else 1.0 - choices[1])
    assert failing.choices == (0, 0)


def test_search_finds_what_greedy_misses() -> None:
    better = 0
    for seed in range(14):
        given = random_problem(seed)
        greedy, found = IterativeGreedy().allocate(given), SearchAllocator(evaluations=100).allocate(given)
        assert found.damage <= greedy.damage + 1e-12
        better += found.damage < greedy.damage - 1e-9
    assert better >= 3


def test_search_keeps_to_its_evaluations() -> None:
    given = alike(np.linspace(1, 2, 20).tolist(), 120.0)
    found = SearchAllocator(evaluations=30).allocate(given, quality_of(given))
    assert found.evaluations == 30
    assert SearchAllocator(evaluations=30).allocate(given).evaluations == 0


@pytest.mark.parametrize("budgets", [1, 2])
def test_differentiable_learns_what_nearly_fits(budgets: int) -> None:
    # Before any repair, which would make a fair policy of noise too.
    given = random_problem(4, sites=150, budgets=budgets)
    tables = Tables.of(given)
    learned = Differentiable()._likeliest(tables)
    assert 0.9 < tables.loads(learned).max() < 1.1
    best = Milp().allocate(given).damage
    assert tables.damage[np.arange(len(tables)), learned].sum() == pytest.approx(best, rel=0.05)


def test_per_site_keeps_where_nothing_is_good_enough() -> None:
    # Sparse-vDiT: modes with MSE and kept share, the last one is full attention.
    errors, kept = np.array([[0.5, 0.02, 0.0], [0.7, 0.6, 0.0]]), np.array([0.1, 0.3, 1.0])
    full = np.array([2, 2])
    assert argmin_or_keep(errors + 0.1 * kept, 0.2, full).tolist() == [1, 2]
    assert argmin_or_keep(errors + 0.1 * kept, 0.66, full).tolist() == [1, 1]
    given = replace(problem(errors.tolist(), [kept.tolist()] * 2, 9.0), budgets={})
    assert PerSite(weight=0.1, tolerance=0.2).allocate(given).choices == (1, 2)
    assert PerSite(weight=1.0, tolerance=0.3).allocate(given).choices == (2, 2)
    assert PerSite(weight=0.0, tolerance=0.3).allocate(given).choices == (1, 2)


def test_per_site_weight_never_lowers_sparsity() -> None:
    rng = np.random.default_rng(8)
    errors = np.concatenate([rng.uniform(0, 1, (30, 4)), np.zeros((30, 1))], axis=1)
    kept = np.array([0.1, 0.25, 0.5, 0.75, 1.0])
    before = np.ones(30)
    for weight in (0.0, 0.1, 0.3, 1.0, 3.0):
        choices = argmin_or_keep(errors + weight * kept, np.inf, np.full(30, 4))
        assert (kept[choices] <= before).all()
        before = kept[choices]


def test_per_site_tolerance_rises_until_the_budget_holds() -> None:
    given = alike([0.5, 0.2, 0.4, 0.3], 24.0)
    assert PerSite().allocate(given).choices == (1, 0, 1, 0)
    assert PerSite(tolerance=0.45).allocate(given).choices == (1, 0, 0, 0)
    # One tolerance for all: what the second site needs is too much for the first one not to go lower too.
    given = problem([[1.0, 0.0], [2.0, 0.0]], [[1.9, 2.0], [1.0, 6.0]], 3.0)
    assert PerSite().allocate(given).choices == (0, 0)
    # The best choice of a site, not what saves most for its damage; the latter once tolerance is not enough.
    given = problem([[1.2, 1.0, 0.0], [50.0, 40.0, 0.0]], [[1.0, 2.0, 3.0]] * 2, 5.0)
    assert PerSite().allocate(given).choices == (1, 2)
    assert PerSite().allocate(replace(given, budgets={"size": 3.0})).choices == (0, 1)


def test_gap_bounds_what_is_lost() -> None:
    known = 0
    for seed in range(30):
        given = random_problem(seed)
        found, best = GlobalThreshold(fill=False).allocate(given), best_of_all(given)[0]
        assert found.gap is not None
        assert (found.damage - best) / best <= found.gap + 1e-9
        known += found.gap > 0
    assert known > 10
