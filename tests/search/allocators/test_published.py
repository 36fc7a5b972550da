"""Allocations that papers' code ships, and published formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from archfront.search.allocators.dynamic_programme import DynamicProgramme, prefix_programme
from archfront.search.allocators.linear_programme import Milp
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.two_pool import TwoPool, two_group_split

from .problems import best_of_all, problem

# HAWQ-V3, ResNet-18 (github.com/Zhen-Dong/HAWQ, ILP.ipynb and bit_config.py, MIT), without first convolution and
# classifier. The traces are divided by the numbers of parameters already.
TRACE = np.array(
    [
        *(0.06857826, 0.03162379, 0.03298575, 0.01205663, 0.02222431, 0.00596336, 0.06931772, 0.00807129, 0.00372905),
        *(0.00530698, 0.00209011, 0.00737569, 0.00210454, 0.00151197, 0.00158041, 0.00078146, 0.00451841, 0.00098745),
        0.00072944,
    ]
)
ERROR_8 = np.array(
    [
        *(0.0235, 0.0125, 0.0102, 0.0082, 0.0145, 0.0344, 0.0023, 0.0287, 0.0148, 0.0333, 0.0682, 0.0027, 0.0448),
        *(0.0336, 0.0576, 0.113, 0.0102, 0.0947, 0.0532),
    ]
)
ERROR_4 = np.array(
    [
        *(6.743, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, 0.6827, 9.0942, 4.8857, 10.7599, 21.7546, 0.8603, 14.5324),
        *(10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016),
    ]
)
PARAMS_MI = np.array(
    [
        *(0.03515625, 0.03515625, 0.03515625, 0.03515625, 0.0703125, 0.140625, 0.0078125, 0.140625, 0.140625, 0.28125),
        *(0.5625, 0.03125, 0.5625, 0.5625, 1.125, 2.25, 0.125, 2.25, 2.25),
    ]
)
BOPS = np.array([115.605504] * 4 + [57.802752] + [115.605504, 6.422528, 115.605504, 115.605504, 57.802752])
BOPS = np.concatenate([BOPS, [115.605504, 6.422528, 115.605504, 115.605504, 57.802752]])
BOPS = np.concatenate([BOPS, [115.605504, 6.422528, 115.605504, 115.605504]])
LATENCY_4 = np.array(
    [
        *(0.21094404, 0.21092674, 0.21104113, 0.21086851, 0.13642465, 0.19167506, 0.02532183, 0.19148203, 0.19142914),
        *(0.11395316, 0.20556011, 0.01917474, 0.20566918, 0.20566509, 0.13185102, 0.22287786, 0.01790088, 0.22304611),
        0.22286099,
    ]
)
LATENCY_8 = np.array(
    [
        *(0.36189111, 0.36211718, 0.31141909, 0.30454471, 0.19184896, 0.38948934, 0.0334169, 0.38904905, 0.3892859),
        *(0.19134735, 0.34307431, 0.02802354, 0.34313329, 0.34310756, 0.21117103, 0.37376585, 0.02896843, 0.37398187),
        0.37405185,
    ]
)
# Layers of a residual sum: a down-sampling convolution and the one whose output it is added to.
TIES = ((4, 6), (9, 11), (14, 16))
SHIPPED = {0.75: "8888888888888488884", 0.5: "8888888888888884844", 0.25: "8888888888888844444"}


def hawq(*costs: str, share: float, ties: tuple[tuple[int, ...], ...] = TIES) -> Problem:
    """Choices 0 and 1 are 4 and 8 bits; each budget lies this share of the way from all 4 to all 8 bits."""
    tables = {
        "size": (PARAMS_MI * 4 / 8, PARAMS_MI * 8 / 8),
        "bops": (BOPS / 64, BOPS / 16),
        "latency": (LATENCY_4, LATENCY_8),
    }
    return Problem(
        sites=tuple(f"layer{i}" for i in range(19)),
        damage=tuple(np.stack([TRACE * ERROR_4, TRACE * ERROR_8], axis=1)),
        costs={name: tuple(np.stack(tables[name], axis=1)) for name in costs},
        budgets={
            name: float(tables[name][0].sum() + share * (tables[name][1].sum() - tables[name][0].sum()))
            for name in costs
        },
        ties=ties,
    )


@pytest.mark.parametrize("share", SHIPPED)
@pytest.mark.parametrize("allocator", [Milp(), DynamicProgramme()], ids=["milp", "dp"])
def test_hawq_v3_sizes(allocator: Any, share: float) -> None:
    found = allocator.allocate(hawq("size", share=share))
    assert "".join("48"[choice] for choice in found.choices) == SHIPPED[share]
    assert found.gap == 0.0


def test_hawq_v3_needs_its_ties() -> None:
    # Otherwise the strings above would say nothing about ties.
    given = hawq("bops", share=0.25)
    free = Milp().allocate(replace(given, ties=()))
    assert any(free.choices[a] != free.choices[b] for a, b in TIES)
    tied = Milp().allocate(given)
    assert all(tied.choices[a] == tied.choices[b] for a, b in TIES)
    assert tied.damage > free.damage


@pytest.mark.parametrize("costs", [("bops",), ("latency",), ("size", "bops", "latency")], ids="+".join)
@pytest.mark.parametrize("share", SHIPPED)
def test_hawq_v3_other_costs_against_all_policies(costs: tuple[str, ...], share: float) -> None:
    given = hawq(*costs, share=share)
    found = Milp().allocate(given)
    assert given.is_feasible(found.choices)
    assert found.damage == pytest.approx(best_of_all(given)[0], rel=1e-12)


def test_greentrainer() -> None:
    own, passing, importance = [5, 1, 7, 3, 1], [0, 2, 1, 4, 0], [1, 3, 10, 5, 3]
    found = prefix_programme(importance, own, passing, 0.6)
    assert found.mask.tolist() == [False, True, True, False, False]
    assert found.value == 13
    assert found.cost == 11 <= int(0.6 * 24)


@pytest.mark.parametrize("whole", [True, False])
def test_greentrainer_against_all_selections(whole: bool) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        count = int(rng.integers(1, 10))
        own, passing = rng.uniform(0, 9, (2, count))
        if whole:
            own, passing = np.round(own), np.round(passing)
        importance, share = rng.normal(1, 1, count), float(rng.uniform(0, 1))
        found = prefix_programme(importance.tolist(), own.tolist(), passing.tolist(), share)
        limit = share * (own.sum() + passing.sum())
        best = 0.0
        for mask in itertools.product([False, True], repeat=count):
            if any(mask):
                last = max(i for i in range(count) if mask[i])
                if own[list(mask)].sum() + passing[: last + 1].sum() <= limit * (1 + 1e-12):
                    best = max(best, float(importance[list(mask)].sum()))
        assert found.cost <= limit * (1 + 1e-9)
        assert found.value == pytest.approx(float(importance[found.mask].sum()))
        # Real costs are rounded up to a hundred-thousandth of the limit, which no policy here is so close to.
        assert found.value == pytest.approx(best)


def test_mixdq_split() -> None:
    quality, content = two_group_split(4.0, 0.5, 3.0)
    assert (quality, content) == pytest.approx((6.4, 3.2))
    for budget, ratio, sizes in itertools.product([3.0, 8.0], [0.46, 1.0, 1.36], [0.2, 4.0]):
        quality, content = two_group_split(budget, ratio, sizes)
        assert content == pytest.approx(ratio * quality)
        assert (quality + sizes * content) / (1 + sizes) == pytest.approx(budget)


def pools() -> Problem:
    """Two content and two quality layers of one size with 2, 4 or 8 bits, 16 bits for all four."""
    damage = [[4.0, 1.0, 0.0], [5.0, 2.0, 0.0], [90.0, 30.0, 0.0], [80.0, 20.0, 0.0]]
    given = problem(damage, [[2.0, 4.0, 8.0]] * 4, 16.0)
    return replace(given, sites=("up.ffn", "down.ffn", "up.conv", "down.conv"))


def test_mixdq_ratio_splits_the_budget() -> None:
    # k = 1: 8 bits each, so each pool has two layers of 4; k = 1/3: 4 and 12 bits.
    even = TwoPool(pool=["*.ffn"], ratios=[1.0]).allocate(pools())
    assert even.choices == (1, 1, 1, 1)
    third = TwoPool(pool=["*.ffn"], ratios=[1 / 3]).allocate(pools())
    assert third.choices == (0, 0, 2, 1)
    assert TwoPool(pool=["*.ffn"], ratios=[1.0, 1 / 3]).allocate(pools()).choices == third.choices


def test_two_pools_by_true_quality() -> None:
    # The damages say that the second pool matters more; the truth is that only the first one does.
    def evaluate(choices: Any) -> float:
        return float(choices[0] + choices[1])

    found = TwoPool(pool=["*.ffn"]).allocate(pools(), evaluate)
    assert found.costs["size"] <= 16
    assert found.choices == (1, 2, 0, 0)  # the first pool by itself goes by its damages
    assert 1 < found.evaluations <= 21
