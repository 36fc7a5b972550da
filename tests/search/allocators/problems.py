"""What the tests of allocators share: random problems, and the best policy by looking at all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from archfront.search.allocators.problem import TOLERANCE, Problem


def problem(
    damage: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    ties: tuple[tuple[int, ...], ...] = (),
) -> Problem:
    """With one cost, ``size``, and sites ``s0``, ``s1``, ..."""
    return Problem(
        sites=tuple(f"s{i}" for i in range(len(damage))),
        damage=tuple(np.array(row, dtype=np.float64) for row in damage),
        costs={"size": tuple(np.array(row, dtype=np.float64) for row in costs)},
        budgets={"size": budget},
        ties=ties,
    )


def random_problem(seed: int, *, sites: int = 12, budgets: int = 1, ties: bool = True, wild: bool = False) -> Problem:
    """Sites of 1 to 4 choices in any order of cost, some of them tied.

    The dearer of two choices harms less, unless ``wild``: damage is then anything, below 0 as well. With several
    budgets a random policy is known to meet all of them.
    """
    rng = np.random.default_rng([seed, sites, budgets, int(ties), int(wild)])
    groups: list[tuple[int, ...]] = []
    at = 0
    while at < sites:
        size = min(int(rng.integers(1, 4)) if ties and rng.random() < 0.3 else 1, sites - at)
        groups.append(tuple(range(at, at + size)))
        at += size
    damage: list[npt.NDArray[np.float64]] = []
    costs: dict[str, list[npt.NDArray[np.float64]]] = {f"c{b}": [] for b in range(budgets)}
    for group in groups:
        order = rng.permutation(int(rng.choice([1, 2, 2, 3, 3, 4])))
        for _ in group:
            width = len(order)
            harm = np.sort(rng.lognormal(0, 1.5, width))[::-1] + 0.01
            damage.append((rng.normal(0, 1, width) if wild else harm)[order])
            for table in costs.values():
                dear = np.sort(rng.uniform(0.1, 1, width)) * rng.lognormal(0, 1)
                table.append((rng.uniform(0, 3, width) if wild else dear)[order])
    kinds = ["weights" if number % 2 else "activations" for number, group in enumerate(groups) for _ in group]
    free = Problem(
        sites=tuple(f"site{i}:{kind}" for i, kind in enumerate(kinds)),
        damage=tuple(damage),
        costs={name: tuple(table) for name, table in costs.items()},
        budgets={},
        ties=tuple(group for group in groups if len(group) > 1),
        fixed={"c0": 2.5},
    )
    policy = free.spread([int(rng.integers(len(free.damage[group[0]]))) for group in free.groups])
    limits = free.total_costs(policy)
    if budgets == 1:
        dearest = sum(float(np.max(row)) for row in costs["c0"])
        limits = {"c0": free.floor("c0") + float(rng.uniform(0.05, 0.8)) * (2.5 + dearest - free.floor("c0"))}
    return replace(free, budgets=limits)


def best_of_all(given: Problem) -> tuple[float, npt.NDArray[np.float64]]:
    """The least damage of feasible policies by looking at every policy, and the damages of all feasible ones."""
    joined = given.untied()
    damage = np.zeros(1)
    costs = {name: np.array([given.fixed.get(name, 0.0)]) for name in given.budgets}
    for group, row in enumerate(joined.damage):
        damage = np.add.outer(damage, row).ravel()
        costs = {name: np.add.outer(table, joined.costs[name][group]).ravel() for name, table in costs.items()}
    fits = np.ones(len(damage), dtype=bool)
    for name, budget in given.budgets.items():
        fits &= costs[name] <= budget + TOLERANCE * max(abs(budget), 1.0)
    return float(damage[fits].min()), damage[fits]


def quality_of(given: Problem) -> Callable[[Sequence[int]], float]:
    """A true quality that agrees with the damage: 1 without any."""
    worst = sum(float(np.abs(row).max()) for row in given.damage)
    return lambda choices: 1.0 - given.total_damage(choices) / worst
