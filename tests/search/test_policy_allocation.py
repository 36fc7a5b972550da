"""From scores to genotypes: budgets are those of the network as it is stored, ties hold, floors are named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.support.small_models import VIT

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import Milp
from archfront.search.allocators.problem import Problem
from archfront.search.policy_allocation import allocate, policy_problem
from archfront.spaces.policies.bits import Bits

RESNET18 = {"name": "timm", "model": "resnet18"}


def damages(space: Bits, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.random(len(site.domain)))[::-1] for site in space.sites]


@pytest.mark.parametrize("budget", ["size_bytes", "model_mb", "gbops"])
def test_the_problem_costs_what_the_genotype_costs(budget: str) -> None:
    space = Bits(model=RESNET18, weights=[2, 4, 8], keep={"conv1": 8, "fc": 8})
    everything = space.bit_costs(space.from_json([[8] * len(space.columns)]))[budget][0]
    least = space.bit_costs(space.from_json([[2] * len(space.columns)]))[budget][0]
    for share in (0.2, 0.6, 1.0):
        limit = least + share * (everything - least)
        genotype, found = allocate(space, damages(space), {budget: limit}, Milp())
        stored = space.bit_costs(space.from_json([genotype]))[budget][0]
        assert found.costs[budget] == pytest.approx(stored, rel=1e-9)
        assert stored <= limit * (1 + 1e-9)
        assert (genotype == [8] * len(space.columns)) == (share == 1.0)
    with pytest.raises(InputError, match=rf"budget\.{budget}.*is below.*Give") as refused:
        policy_problem(space, damages(space), {budget: 0.9 * least})
    named = float(refused.value.remedy.split()[1])
    assert named == pytest.approx(least, rel=1e-5)
    assert allocate(space, damages(space), {budget: named}, Milp())[0] == [2] * len(space.columns)


def test_the_best_of_all_genotypes_is_found() -> None:
    model = {**VIT, "depth": 1}
    keep = dict.fromkeys(["patch_embed.proj", "head"], 8)
    space = Bits(model=model, weights=[2, 4, 8], keep=keep)
    damage = damages(space, 1)
    every = [list(g) for g in itertools.product([2, 4, 8], repeat=len(space.columns))]
    sizes = space.bit_costs(space.from_json(every))["size_bytes"]
    limit = float(np.quantile(sizes, 0.4))
    totals = np.array([sum(row[space.weight_bits.index(b)] for row, b in zip(damage, g, strict=True)) for g in every])
    genotype, found = allocate(space, damage, {"size_bytes": limit}, Milp())
    assert found.damage == pytest.approx(totals[sizes <= limit].min())
    assert genotype in every


def test_what_is_no_sum_over_sites_is_refused() -> None:
    space = Bits(model=dict(VIT), activations=[4, 8])
    with pytest.raises(InputError, match="product of two decisions"):
        policy_problem(space, damages(space), {"gbops": 1.0})
    with pytest.raises(InputError, match=r"budget\.mb.*no cost of policies"):
        policy_problem(space, damages(space), {"mb": 1.0})


def test_an_allocator_that_breaks_the_budget_is_named() -> None:
    class Greedy(Allocator):
        name = "too-greedy"

        def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
            return Allocation.of(problem, [len(row) - 1 for row in problem.damage])

    space = Bits(model=dict(VIT), weights=[2, 8])
    with pytest.raises(InputError, match=r"too-greedy.*costs"):
        allocate(space, damages(space), {"model_mb": 0.01}, Greedy())
