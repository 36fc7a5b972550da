"""Sums over decisions: prices are found from few whole candidates, whatever the order of choices means."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from archfront.search.strategies.additive import Additive, Decisions, best_form, held_out
from archfront.search.strategies.registry import STRATEGIES
from archfront.search.strategies.surrogate import Rows, Surrogate
from archfront.search.strategy import Ask, Problem, Results

from .driver import ToySpace, columns

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WIDTHS = np.array([2.0, 3.0, 4.0, 6.0, 8.0])


def policies(count: int, layers: int, seed: int = 0) -> Ints:
    return np.random.default_rng(seed).integers(5, size=(count, layers))


def decisions(layers: int, *, ordered: bool) -> Decisions:
    return Decisions(kinds=("bits",) * layers, counts=(5,) * layers, ordered=(ordered,) * layers)


def damage(chosen: Ints) -> Floats:
    """Of layers whose sensitivity spans two orders of magnitude; two of them do more damage together."""
    sizes = np.geomspace(1, 100, chosen.shape[1])[np.random.default_rng(1).permutation(chosen.shape[1])]
    each = sizes * 4.0 ** -WIDTHS[chosen]
    together: Floats = each.sum(axis=1) + np.sqrt(each[:, 0] * each[:, 1])
    return together


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("rising", [True, False])
def test_prices_that_add_up_are_found_again(*, ordered: bool, rising: bool) -> None:
    chosen = policies(600, 6)
    prices = np.random.default_rng(2).uniform(0.1, 1, (6, 5)).cumsum(axis=1)
    prices = prices if rising else prices[:, ::-1]
    values = prices[np.arange(6), chosen].sum(axis=1)
    alike = decisions(6, ordered=ordered)
    form = best_form(chosen[:300], values[:300], alike)
    foreseen = Additive(chosen[:300], values[:300], alike, form).predict(chosen[300:])
    assert foreseen == pytest.approx(values[300:], rel=2e-3)
    assert form.rising == rising or not ordered


def test_decisions_of_several_kinds() -> None:
    rng = np.random.default_rng(3)
    counts = (2, 3, 3, 7)
    chosen = np.stack([rng.integers(n, size=400) for n in counts], axis=1)
    prices = [rng.uniform(0, 1, n) for n in counts]
    values = 1 + sum(price[chosen[:, i]] for i, price in enumerate(prices))
    mixed = Decisions(("a", "b", "b", "c"), counts, (False, True, False, True))
    form = best_form(chosen[:200], values[:200], mixed)
    foreseen = held_out(chosen, values, mixed, form)
    # An ordered decision whose prices go up and down is none that a sum of steps can say exactly.
    assert spearmanr(foreseen, values).statistic > 0.8
    unordered = Decisions(("a", "b", "b", "c"), counts, (False,) * 4)
    exact = held_out(chosen, values, unordered, best_form(chosen, values, unordered))
    assert exact == pytest.approx(values, rel=5e-3)


def test_few_policies_say_what_a_process_alone_does_not_learn() -> None:
    """Sixty policies of twenty layers, with fewer evaluations than prices."""
    chosen, later = policies(60, 20), policies(500, 20, seed=5)
    features = Rows(chosen / 4.0, chosen), Rows(later / 4.0, later)
    with_sum = Surrogate(features[0], damage(chosen), decisions=decisions(20, ordered=True))
    without = Surrogate(features[0], damage(chosen))
    agreement = spearmanr(with_sum.predict(features[1]), damage(later)).statistic
    assert agreement > 0.97
    assert agreement > spearmanr(without.predict(features[1]), damage(later)).statistic + 0.03


def test_what_is_negative_has_no_sum() -> None:
    chosen = policies(40, 4)
    rows = Rows(chosen / 4.0, chosen)
    fitted = Surrogate(rows, damage(chosen) - 1.0, decisions=decisions(4, ordered=True))
    assert fitted.choice.form is None
    assert np.isfinite(fitted.predict(rows)).all()


def test_an_untouched_network_has_no_damage() -> None:
    chosen = np.concatenate([policies(60, 8), np.full((1, 8), 4)])
    values = damage(chosen) - damage(chosen[-1:])
    rows, later = Rows(chosen / 4.0, chosen), policies(200, 8, seed=5)
    fitted = Surrogate(rows, values, decisions=decisions(8, ordered=True))
    assert fitted.summed is not None
    assert fitted.predict(rows).argmin() == 60
    assert spearmanr(fitted.predict(Rows(later / 4.0, later)), damage(later)).statistic > 0.99


def test_the_search_meets_the_best_policies() -> None:
    """Two objectives whose best values are known: damage that adds up, at bits that add up."""
    layers, population = 16, 20
    sizes = np.geomspace(1, 100, layers)[np.random.default_rng(1).permutation(layers)]

    def evaluate(chosen: Ints) -> Floats:
        return np.stack([(sizes * 4.0 ** -WIDTHS[chosen]).sum(axis=1), WIDTHS[chosen].sum(axis=1)], axis=1)

    space = ToySpace(columns(*[5] * layers, ordered=True))
    problem = Problem(space=space, objectives=2, seed=3)
    strategy = STRATEGIES.build({"name": "surrogate-nsga2", "population": population}, "strategy", _problem=problem)
    found = []
    for number in range(10):
        ask = Ask(number=number, count=population, first=number * population, seed=3)
        proposals = strategy.ask(ask)
        strategy.asked(ask, proposals)
        objectives = evaluate(proposals.population.astype(np.int64))
        found.append(objectives)
        strategy.tell(
            Results(
                numbers=ask.first + np.arange(len(proposals)), fidelities=proposals.fidelities,
                objectives=objectives, violations=np.zeros(len(proposals)),
            )
        )  # fmt: skip
    points = np.concatenate(found)
    budgets = np.array([56.0, 64.0, 80.0])
    excess = [points[points[:, 1] <= budget, 0].min() / least_damage(sizes, budget) for budget in budgets]
    # Without the sum: 1.3, 1.8 and 3.9 times the least damage.
    assert np.mean(excess) < 1.15
    assert max(excess) < 1.5


def least_damage(sizes: Floats, budget: float) -> float:
    """By dynamic programming over whole bits."""
    best = np.full(int(budget) + 1, np.inf)
    best[0] = 0.0
    for size in sizes:
        following = np.full_like(best, np.inf)
        for width in WIDTHS.astype(int):
            moved = best[: len(best) - width] + size * 4.0**-width
            following[width:] = np.minimum(following[width:], moved)
        best = following
    return float(best.min())
