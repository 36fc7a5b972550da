"""From scores of policies' sites to a genotype within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.problem import TOLERANCE, Problem, Vector, rounded_up
from archfront.spaces.policies.policy_space import Policies
from archfront.spaces.policies.site import tied_groups
from archfront.spaces.space import Genotype

_HALVED = 10
"""Steps of bisection where costs add up to more than their sum says."""


def policy_problem(space: Policies, damage: Sequence[Vector], budgets: Mapping[str, float]) -> Problem:
    """The sites of a space with what their choices damage and cost.

    Args:
        space: of policies.
        damage: of each site ``(choices,)``, as a score gives it.
        budgets: names of ``COSTS`` -> the most that the whole network may cost.

    Raises:
        InputError: an unknown cost, one that is no sum over sites, or what ``Problem`` refuses.
    """
    costs, fixed = space.additive_costs(list(budgets))
    return Problem(
        sites=tuple(site.id for site in space.sites),
        damage=tuple(damage),
        costs={name: tuple(rows) for name, rows in costs.items()},
        budgets={name: float(budget) for name, budget in budgets.items()},
        ties=tuple(group for group in tied_groups(space.sites) if len(group) > 1),
        fixed=fixed,
    )


def allocate(
    space: Policies,
    damage: Sequence[Vector],
    budgets: Mapping[str, float],
    allocator: Allocator,
    evaluate: Evaluate | None = None,
) -> tuple[Genotype, Allocation]:
    """The genotype that an allocator chooses.

    Where costs are no exact sums over sites (two decisions that meet in one layer), the policy's true costs are held
    against the budgets; where they exceed them, bisection finds how much less the allocator has to be given.

    Args:
        evaluate: quality of a policy given as the index of each site's choice, for allocators that look at it.

    Raises:
        InputError: see ``policy_problem``; the budget is below what the lowest bits cost, which the message names.
    """
    problem = policy_problem(space, damage, budgets)
    floors = {name: problem.floor(name) for name in budgets}

    def given(share: float) -> tuple[Genotype, Allocation]:
        """What this share of the budgets, from the floors of the sums on, gives; with its true costs."""
        limits = {name: floors[name] + share * (budget - floors[name]) for name, budget in budgets.items()}
        genotype, found = _once(space, replace(problem, budgets=limits), allocator, evaluate)
        table = space.cost_table(space.from_json([genotype]))
        return genotype, replace(found, costs={name: float(table[name][0]) for name in budgets})

    best = given(1.0)
    if _fits(best[1], budgets):
        return best
    best = given(0.0)
    if not _fits(best[1], budgets):
        name = max(budgets, key=lambda one: best[1].costs[one] / max(abs(budgets[one]), 1e-12))
        least = rounded_up(best[1].costs[name])
        problem_text = f"is below {least}, which the smallest policy costs"
        raise InputError(f"budget.{name}", budgets[name], problem_text, f"Give {least} or more, or lower choices.")
    low, high = 0.0, 1.0
    for _ in range(_HALVED):
        middle = (low + high) / 2
        found = given(middle)
        if _fits(found[1], budgets):
            low = middle
            best = min(best, found, key=lambda one: one[1].damage)
        else:
            high = middle
    return best


def _fits(found: Allocation, budgets: Mapping[str, float]) -> bool:
    return all(found.costs[name] - b <= TOLERANCE * max(abs(b), 1.0) for name, b in budgets.items())


def _once(
    space: Policies, problem: Problem, allocator: Allocator, evaluate: Evaluate | None
) -> tuple[Genotype, Allocation]:
    found = allocator.allocate(problem, evaluate)
    if len(found.choices) != len(problem.sites) or not problem.is_feasible(found.choices):
        remedy = "Mend the allocator: its choices have to meet every budget and tie."
        raise InputError("allocator", allocator.name, f"gives a policy that costs {found.costs}", remedy)
    policy = {site.id: site.domain[choice] for site, choice in zip(space.sites, found.choices, strict=True)}
    return space.genotype(policy), found
