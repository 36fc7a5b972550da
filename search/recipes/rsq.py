"""RSQ (Sung et al., 2025): one width for all layers, of a rotated network, rounded for the tokens that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.perturbation import Perturbation
from archfront.search.allocators.allocator import Allocation
from archfront.search.allocators.linear_programme import Milp
from archfront.search.policy_allocation import policy_problem
from archfront.search.recipes.recipe import Budget, Recipe
from archfront.spaces.space import Genotype


class Rsq(Recipe):
    """The width with the least ``sum_i |Q_b(W_i) - W_i|^2`` that the budget lets all layers have: the largest.

    The paper has no allocation: what is published is the recovery, which serves decoders and vision transformers
    alone, and takes layers under ``keep`` at their own widths. An allocation's gap is the one to other single widths.
    """

    name = "rsq"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 3, 4], "activations": "float", "ranges": "mse"}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ({"name": "rsq"},)
    images = 1

    def score(self) -> Perturbation:
        return Perturbation()

    def allocator(self) -> Milp:
        return Milp()

    def policies(
        self, network: Compressible, budgets: Sequence[Budget], seed: int = 0
    ) -> list[tuple[Genotype, Allocation]]:
        space = network.space
        damage = self.score().checked(self.subject(network, seed))
        found = []
        for budget in budgets:
            problem = policy_problem(space, damage, budget)
            # One group of all sites: allocators then choose between single widths.
            allocation = self.allocator().allocate(replace(problem, ties=(tuple(range(len(problem.sites))),)))
            policy = {site.id: site.domain[c] for site, c in zip(space.sites, allocation.choices, strict=True)}
            found.append((space.genotype(policy), allocation))
        return found
