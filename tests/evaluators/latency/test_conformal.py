"""Conformal intervals cover what they promise, whatever the errors look like."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.conformal import (
    conformal_quantile,
    cv_plus,
    pooled_quantile,
    split_interval,
)

SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, size: np.abs(rng.normal(size=size)),
    "heavy": lambda rng, size: np.abs(rng.standard_cauchy(size=size)),
    "integer": lambda rng, size: rng.integers(0, 4, size).astype(np.float64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [9, 10, 19, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_the_next_score_is_covered(shape: str, count: int, confidence: float) -> None:
    rng = np.random.default_rng(0)
    scores = SHAPES[shape](rng, (4000, count + 1))
    covered = np.mean([row[-1] <= conformal_quantile(row[:-1], confidence) for row in scores])
    # Four standard errors of 4,000 trials.
    assert covered >= confidence - 4 * math.sqrt(confidence * (1 - confidence) / 4000)
    if shape != "integer":
        assert covered <= confidence + 1 / (count + 1) + 0.03


@pytest.mark.parametrize(("count", "finite"), [(8, False), (9, True), (10, True)])
def test_too_few_scores_promise_nothing(count: int, finite: bool) -> None:
    assert math.isfinite(conformal_quantile(np.arange(count), 0.9)) == finite


def test_the_rank_is_exact() -> None:
    # ceil(10 * 0.9) = 9 in decimals; 0.9 is a little more in binary.
    assert conformal_quantile(np.arange(1, 10), 0.9) == 9
    assert conformal_quantile(np.arange(1, 20), 0.9) == 18


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=20, max_size=60), st.randoms())
def test_the_quantile_grows_with_confidence_and_knows_no_order(scores: list[float], random: object) -> None:
    bounds = [conformal_quantile(scores, confidence) for confidence in (0.1, 0.5, 0.9)]
    assert bounds == sorted(bounds)
    assert conformal_quantile(scores[::-1], 0.5) == bounds[1]
    assert np.mean(np.array(scores) <= bounds[2]) >= 0.9


def test_groups_weigh_the_same_whatever_their_size() -> None:
    assert pooled_quantile([np.zeros(1000), np.ones(10)], 0.5) == 0
    assert pooled_quantile([np.zeros(1000), np.ones(10)], 0.6) == 1
    assert pooled_quantile([np.zeros(0), np.ones(3)], 0.1) == 1
    assert pooled_quantile([], 0.9) == math.inf


def test_new_groups_are_covered() -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        spread = rng.gamma(4, size=16)
        groups = [np.abs(rng.normal(size=50)) * s for s in spread[:-1]]
        covered.append(np.mean(np.abs(rng.normal(size=200)) * spread[-1] <= pooled_quantile(groups, 0.9)))
    assert 0.86 <= np.mean(covered) <= 0.94


def test_split_intervals_stay_positive() -> None:
    low, high = split_interval(np.array([1.0, 2.0]), 0.5)
    assert (low.tolist(), high.tolist()) == ([0.5, 1.0], [1.5, 3.0])
    low, high = split_interval(np.array([1.0]), 3.0, np.array([0.5]))
    assert (low.tolist(), high.tolist()) == ([0.0], [2.5])


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_cv_plus_covers(confidence: float) -> None:
    """Of a model that fits noise as well: a polynomial of many terms."""
    rng = np.random.default_rng(2)
    covered, widths = [], []
    for _ in range(40):
        x = rng.uniform(-1, 1, 200)
        y = 5 + x + rng.normal(0, 0.3, 200)
        folds = np.arange(60) % 5
        models = [np.polyfit(x[:60][folds != f], y[:60][folds != f], 4) for f in range(5)]
        predictions = np.stack([np.polyval(model, x[60:]) for model in models])
        own = np.array([np.polyval(models[f], x[i]) for i, f in enumerate(folds)])
        low, high = cv_plus(predictions, folds, np.abs(y[:60] - own) / own, confidence)
        covered.append(np.mean((low <= y[60:]) & (y[60:] <= high)))
        widths.append(np.mean(high - low))
    assert confidence - 0.02 <= np.mean(covered) <= confidence + 0.04
    assert np.mean(widths) < 2


def test_cv_plus_of_too_few() -> None:
    low, high = cv_plus(np.ones((2, 3)), np.array([0, 1]), np.array([0.1, 0.1]), 0.9)
    assert (low == 0).all()
    assert np.isinf(high).all()


def test_cv_plus_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    arguments = (rng.uniform(1, 2, (3, 50)), np.arange(30) % 3, rng.uniform(0, 0.1, 30), 0.9)
    whole = cv_plus(*arguments)
    monkeypatch.setattr("archfront.evaluators.latency.predictors.conformal._CHUNK", 100)
    for first, second in zip(whole, cv_plus(*arguments), strict=True):
        assert (first == second).all()


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match=r"^confidence: "):
        conformal_quantile([1.0], confidence)


@pytest.mark.parametrize("scores", [[[1.0]], [math.nan]])
def test_scores_that_are_none_are_refused(scores: list[object]) -> None:
    with pytest.raises(InputError, match=r"^scores: "):
        conformal_quantile(scores, 0.9)  # type: ignore[arg-type]
