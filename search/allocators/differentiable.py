"""Choices as softmax logits, learned against damage and a penalty on what is beyond the budgets (after DiffRate, 2023;
LAPP, 2024)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import softmax

from archfront.search.allocators.allocator import Allocation, Allocator, Evaluate
from archfront.search.allocators.linear_programme import with_bound
from archfront.search.allocators.moves import lowered, raised
from archfront.search.allocators.problem import Problem
from archfront.search.allocators.tables import Ints, Tables

_BETAS = (0.9, 0.999)
"""Adam's decay rates."""


class Differentiable(Allocator):
    """Adam on the expected damage of independent softmax choices and the squared expected excess over each budget.

    Temperature falls and penalty grows in even ratios, so that the end is close to a policy that fits. The likeliest
    choices are then lowered where they still exceed a budget and raised where they leave some.

    Args:
        steps: of Adam.
        learning_rate: of Adam.
        temperature: of the softmax, at the beginning and at the end.
        penalty: factor of the squared excess at the beginning and at the end. The excess is a share of what all sites
            could cost, and added to the damage as a share of its range.
        seed: of the first logits, which differ from each other by a hundredth only.
    """

    name = "differentiable"

    def __init__(
        self,
        steps: Annotated[int, Field(ge=1)] = 200,
        learning_rate: Annotated[float, Field(gt=0)] = 0.1,
        temperature: tuple[float, float] = (1.0, 0.2),
        penalty: tuple[float, float] = (1.0, 1000.0),
        seed: int = 0,
    ) -> None:
        self.steps = steps
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.penalty = penalty
        self.seed = seed

    def allocate(self, problem: Problem, evaluate: Evaluate | None = None) -> Allocation:
        tables = Tables.of(problem)
        return with_bound(tables, raised(tables, lowered(tables, self._likeliest(tables))).tolist())

    def _likeliest(self, tables: Tables) -> Ints:
        """The choices of the greatest logits, feasible or not."""
        low = tables.damage.min(axis=1, keepdims=True)
        damage = np.where(tables.allowed, tables.damage - low, 0.0)
        damage /= float(damage.max(axis=1).sum()) or 1.0
        load = np.where(tables.allowed, tables.load, 0.0)
        span = np.maximum(load.max(axis=2).sum(axis=1), 1.0)
        shares, limits = load / span[:, None, None], 1.0 / span
        blocked = np.where(tables.allowed, 0.0, -np.inf)
        logits = 0.01 * np.random.default_rng(self.seed).standard_normal(damage.shape)
        first, second = np.zeros(damage.shape), np.zeros(damage.shape)
        for step in range(self.steps):
            done = step / max(self.steps - 1, 1)
            temperature = _between(self.temperature, done)
            chosen = softmax(logits / temperature + blocked, axis=1)
            excess = np.maximum((chosen * shares).sum(axis=(1, 2)) - limits, 0.0)
            slope = damage + np.tensordot(2 * _between(self.penalty, done) * excess, shares, axes=1)
            gradient = chosen * (slope - (chosen * slope).sum(axis=1, keepdims=True)) / temperature
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * second + (1 - _BETAS[1]) * gradient**2
            mean, spread = first / (1 - _BETAS[0] ** (step + 1)), second / (1 - _BETAS[1] ** (step + 1))
            logits -= self.learning_rate * mean / (np.sqrt(spread) + 1e-12)
        return np.asarray((logits + blocked).argmax(axis=1), dtype=np.int64)


def _between(ends: tuple[float, float], done: float) -> float:
    """From the first to the second in even ratios."""
    return float(ends[0] * (ends[1] / ends[0]) ** done)
