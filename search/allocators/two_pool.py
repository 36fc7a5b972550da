"""Two pools of sites that share a budget, and a sweep over how (MixDQ, 2024; OPTIN, 2024)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from archfront.errors import InputError
from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import Trials
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.registry import ALLOCATORS
from archfront.search.allocators.tables import Tables


class TwoPool(Allocator):
    """For each way to split the budgets, another allocator serves each pool on its own; the best whole policy wins.

    Damages of the two pools never meet in one objective, so they may be in different units if there is ``evaluate``
    to compare whole policies; without it their sum does. Where no split is feasible, which takes several budgets, the
    other allocator gets the problem as a whole; so it does when all sites are in one pool.

    Args:
        pool: names or glob patterns of the sites of the first pool (MixDQ's content layers).
        ratios: of the first pool's mean budget to the second one's (MixDQ's k), by ``two_group_split``, as far as the
            pools' own limits allow; if not set, the first pool gets evenly spaced budgets from its least to its most.
        splits: how many, without ``ratios``.
        inner: the other allocator, by name or as ``{"name": ..., <options>}``.
    """

    name = "two-pool"

    def __init__(
        self,
        pool: Sequence[str] = ("*:activations",),
        ratios: Sequence[float] | None = None,
        splits: Annotated[int, Field(ge=2)] = 21,
        inner: str | Mapping[str, Any] = "milp",
    ) -> None:
        if ratios is not None and (not ratios or min(ratios) <= 0):
            raise InputError("ratios", list(ratios), "are not all above 0", "Give at least one, like 1.0.")
        self.pool = pool
        self.ratios = ratios
        self.splits = splits
        self.inner = ALLOCATORS.build({"name": inner} if isinstance(inner, str) else inner, "inner")

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        """See the base.

        Raises:
            InputError: a tie across the pools, or what the inner allocator raises.
        """
        first = [i for i, site in enumerate(problem.sites) if any(fnmatch.fnmatch(site, p) for p in self.pool)]
        second = [i for i in range(len(problem.sites)) if i not in set(first)]
        if not first or not second or not problem.budgets:
            return self.inner.allocate(problem, evaluate)
        for group in problem.ties:
            if 0 < len(set(group) & set(first)) < len(group):
                names = [problem.sites[i] for i in group]
                raise InputError("ties", names, "are in both pools", "Put tied sites in one pool.")
        trials = None if evaluate is None else Trials(_single(problem), evaluate, self.name)
        best: tuple[float, list[int]] | None = None
        for choices in self._policies(problem, first, second):
            loss = -trials.quality(np.asarray(choices)) if trials is not None else problem.total_damage(choices)
            if best is None or loss < best[0]:
                best = (loss, choices)
        if best is None:
            return self.inner.allocate(problem, evaluate)
        grouped = [best[1][group[0]] for group in problem.groups]
        return with_bound(Tables.of(problem), grouped, trials.count if trials is not None else 0)

    def _policies(self, problem: Problem, first: list[int], second: list[int]) -> Iterator[list[int]]:
        """The feasible ones of all splits, for all sites."""
        for budgets in self._budgets(problem, first, second):
            try:
                one = self.inner.allocate(_part(problem, first, budgets))
                rest = {name: problem.budgets[name] - problem.fixed.get(name, 0.0) - budgets[name] for name in budgets}
                other = self.inner.allocate(_part(problem, second, rest))
            except InputError as error:
                # With several budgets a pool can be in conflict at one split and not at the next.
                if len(budgets) > 1 and error.field.startswith("budget"):
                    continue
                raise
            choices = [0] * len(problem.sites)
            for i, choice in zip([*first, *second], [*one.choices, *other.choices], strict=True):
                choices[i] = choice
            if problem.is_feasible(choices):
                yield choices

    def _budgets(self, problem: Problem, first: list[int], second: list[int]) -> Iterator[dict[str, float]]:
        """The first pool's budgets, split after split."""
        limits, sizes = {}, {}
        free_one, free_other = _part(problem, first, {}), _part(problem, second, {})
        for name, budget in problem.budgets.items():
            total = budget - problem.fixed.get(name, 0.0)
            dearest = [float(sum(np.max(row) for row in part.costs[name])) for part in (free_one, free_other)]
            least = free_one.floor(name)
            limits[name] = (least, max(least, min(dearest[0], total - free_other.floor(name))))
            sizes[name] = (total, *dearest)
        for number in range(self.splits if self.ratios is None else len(self.ratios)):
            split = {}
            for name, (low, high) in limits.items():
                if self.ratios is None:
                    split[name] = low + (high - low) * number / (self.splits - 1)
                    continue
                total, size, other = sizes[name]
                if size <= 0 or other <= 0:
                    raise InputError("ratios", self.ratios, f"cannot split {name}, a pool has none", "Leave them out.")
                _, mean = two_group_split(total / (size + other), self.ratios[number], size / other)
                split[name] = float(np.clip(mean * size, low, high))
            yield split


def two_group_split(budget: float, ratio: float, size_ratio: float) -> tuple[float, float]:
    """MixDQ's mean budgets of the quality and of the content group, the latter ``ratio`` times the former.

    Args:
        budget: mean over both groups, bits for instance.
        size_ratio: size of the content group over that of the quality group.
    """
    quality = budget * (1 + size_ratio) / (ratio * size_ratio + 1)
    return quality, ratio * quality


def _part(problem: Problem, members: list[int], budgets: Mapping[str, float]) -> Problem:
    place = {i: number for number, i in enumerate(members)}
    return Problem(
        sites=tuple(problem.sites[i] for i in members),
        damage=tuple(problem.damage[i] for i in members),
        costs={name: tuple(table[i] for i in members) for name, table in problem.costs.items()},
        budgets=budgets,
        ties=tuple(tuple(place[i] for i in group) for group in problem.ties if group[0] in place),
    )


def _single(problem: Problem) -> Problem:
    """Without ties: its groups are the sites."""
    return Problem(sites=problem.sites, damage=problem.damage, costs=problem.costs, budgets={})
