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

_TIGHTENED = 20
"""Times that a budget is tightened because costs add up to more than their sum says."""


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
    against the budgets, and the allocator is given as much less as they were exceeded by, again and again.

    Args:
        evaluate: quality of a policy given as the index of each site's choice, for allocators that look at it.

    Raises:
        InputError: see ``policy_problem``; the budget is below what the lowest bits cost, which the message names.
    """
    problem = policy_problem(space, damage, budgets)
    for _ in range(_TIGHTENED):
        genotype, found = _once(space, problem, allocator, evaluate)
        true = {
            name: float(v[0]) for name, v in space.cost_table(space.from_json([genotype])).items() if name in budgets
        }
        over = {name: true[name] - budget for name, budget in budgets.items()}
        if all(excess <= TOLERANCE * max(abs(budgets[name]), 1.0) for name, excess in over.items()):
            return genotype, replace(found, costs=true)
        tightened = {name: problem.budgets[name] - max(excess, 0.0) for name, excess in over.items()}
        if any(tightened[name] < problem.floor(name) for name in tightened):
            break
        problem = replace(problem, budgets=tightened)
    name = max(over, key=lambda one: over[one] / max(abs(budgets[one]), 1e-12))
    remedy = f"Give {rounded_up(true[name])} or more, or lower choices."
    raise InputError(f"budget.{name}", budgets[name], f"is exceeded by the smallest policy found, {true[name]}", remedy)


def _once(
    space: Policies, problem: Problem, allocator: Allocator, evaluate: Evaluate | None
) -> tuple[Genotype, Allocation]:
    found = allocator.allocate(problem, evaluate)
    if len(found.choices) != len(problem.sites) or not problem.is_feasible(found.choices):
        remedy = "Mend the allocator: its choices have to meet every budget and tie."
        raise InputError("allocator", allocator.name, f"gives a policy that costs {found.costs}", remedy)
    policy = {site.id: site.domain[choice] for site, choice in zip(space.sites, found.choices, strict=True)}
    return space.genotype(policy), found
