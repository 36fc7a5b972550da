"""From scores of bits to a genotype within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from archfront.errors import InputError, suggestion
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.problem import Problem, Vector
from archfront.spaces.policies.bit_costs import NAMES
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.site import tied_groups
from archfront.spaces.space import Genotype


def bit_problem(space: Bits, damage: Sequence[Vector], budgets: Mapping[str, float]) -> Problem:
    """The sites of a space with what their choices damage and cost.

    Args:
        space: of bits.
        damage: of each site ``(choices,)``, as a score gives it.
        budgets: ``size_bytes``, ``weight_mb`` or ``gbops`` -> the most that the network may cost, kept layers included.

    Raises:
        InputError: an unknown cost, one that is no sum over sites, or what ``Problem`` refuses.
    """
    for name, budget in budgets.items():
        if name not in NAMES:
            raise InputError(f"budget.{name}", budget, "is for an unknown cost", suggestion(name, NAMES))
    if "gbops" in budgets and not isinstance(space.activations, str):
        problem = "is a product of two decisions of a layer, and no sum over sites"
        raise InputError("budget.gbops", float(budgets["gbops"]), problem, "Set activations to follow or float.")
    costs = {name: [np.zeros(len(site.domain)) for site in space.sites] for name in budgets}
    fixed = dict.fromkeys(budgets, 0.0)
    places = {site.id: i for i, site in enumerate(space.sites)}
    for path, each in space.bit_costs.by_layer().items():
        site = places.get(f"{path}:weights")
        for name in budgets:
            if site is None:
                fixed[name] += float(each[name][0])
            else:
                costs[name][site] += each[name]
    if "size_bytes" in budgets:
        fixed["size_bytes"] += space.bit_costs.other_bytes
    return Problem(
        sites=tuple(site.id for site in space.sites),
        damage=tuple(damage),
        costs={name: tuple(rows) for name, rows in costs.items()},
        budgets={name: float(budget) for name, budget in budgets.items()},
        ties=tuple(group for group in tied_groups(space.sites) if len(group) > 1),
        fixed=fixed,
    )


def allocate(
    space: Bits,
    damage: Sequence[Vector],
    budgets: Mapping[str, float],
    allocator: Allocator,
    evaluate: Evaluate | None = None,
) -> tuple[Genotype, Allocation]:
    """The genotype that an allocator chooses.

    Args:
        evaluate: quality of a policy given as the index of each site's choice, for allocators that look at it.

    Raises:
        InputError: see ``bit_problem``; the budget is below what the lowest bits cost, which the message names.
    """
    problem = bit_problem(space, damage, budgets)
    found = allocator.allocate(problem, evaluate)
    if len(found.choices) != len(problem.sites) or not problem.is_feasible(found.choices):
        remedy = "Mend the allocator: its choices have to meet every budget and tie."
        raise InputError("allocator", allocator.name, f"gives a policy that costs {found.costs}", remedy)
    policy = {site.id: site.domain[choice] for site, choice in zip(space.sites, found.choices, strict=True)}
    return space.genotype(policy), found
