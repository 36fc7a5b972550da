"""The Gaussian process behind ``surrogate-nsga2``, and what the strategy makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategies.surrogate import Choice, Kernel, Rows, Surrogate
from archfront.search.strategy import Ask, Problem, Results

from .driver import ToySpace, columns


def test_leave_one_out_is_what_leaving_out_gives() -> None:
    rng = np.random.default_rng(0)
    rows, values = rng.normal(size=(25, 4)), rng.normal(size=25)
    kernel = Kernel(1.0, 0.03)
    fitted = Surrogate(Rows(rows), values, Choice(kernel), plain=True)
    standard = (values - values.mean()) / values.std()
    centred = rows - rows.mean(axis=0)
    spread = float(np.square(centred).sum(axis=1).mean())
    left_out = []
    for i in range(len(rows)):
        rest = np.delete(np.arange(len(rows)), i)
        covariance = kernel.between(centred[rest], centred[rest], spread) + 0.03 * np.eye(len(rest))
        left_out.append(
            kernel.between(centred[[i]], centred[rest], spread)[0] @ np.linalg.solve(covariance, standard[rest])
        )
    assert fitted.agreement == pytest.approx(spearmanr(left_out, values).statistic, abs=1e-9)


@pytest.mark.parametrize("damage", [lambda additive: additive, np.exp, lambda additive: -1 / (1 + np.exp(additive))])
def test_an_order_that_is_additive_on_some_scale_is_foreseen(damage: object) -> None:
    rng = np.random.default_rng(1)
    choices = rng.integers(5, size=(400, 10))
    rows = (choices[..., None] == np.arange(5)).reshape(400, -1).astype(float)
    values = damage(3 * rows @ rng.random(50))  # type: ignore[operator]
    foreseen = Surrogate(Rows(rows[:150]), values[:150]).predict(Rows(rows[150:]))
    assert spearmanr(foreseen, values[150:]).statistic > 0.97


def test_values_that_are_all_alike_are_borne() -> None:
    rows = np.random.default_rng(2).normal(size=(30, 3))
    assert np.isfinite(Surrogate(Rows(rows), np.ones(30)).predict(Rows(rows))).all()
    assert np.isfinite(Surrogate(Rows(np.ones((30, 3))), rows[:, 0]).predict(Rows(rows))).all()


def test_constraints_keep_proposals_among_the_feasible() -> None:
    """One objective that pulls away from what is allowed: the proposals soon stay at the border."""
    space = ToySpace(columns(*[6] * 8, ordered=True))
    problem = Problem(space=space, objectives=1, seed=3)
    strategy = STRATEGIES.build({"name": "surrogate-nsga2", "population": 20}, "strategy", _problem=problem)
    best, feasible, done = np.inf, 0, 0
    for number in range(8):
        ask = Ask(number=number, count=20, first=done, seed=3)
        proposals = strategy.ask(ask)
        strategy.asked(ask, proposals)
        rows = proposals.population.astype(float)
        cost = rows @ np.arange(1, 9)
        violations = np.maximum(cost / 60 - 1, 0)
        found = -(rows @ np.arange(8, 0, -1))
        feasible = int((violations == 0).sum())
        best = min(best, found[violations == 0].min(initial=0.0))
        numbers = np.arange(done, done + len(rows))
        done += len(rows)
        strategy.tell(
            Results(numbers=numbers, fidelities=proposals.fidelities, objectives=found[:, None], violations=violations)
        )
    assert feasible >= 10
    # The best of this knapsack by value over cost: five of each of the first four, two of the fifth.
    assert best == -138
