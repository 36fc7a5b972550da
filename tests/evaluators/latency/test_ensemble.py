"""The ensemble for tabular spaces: learns interactions, survives outliers, keeps the promise of its intervals."""

import functools
import itertools
import json

import numpy as np
import numpy.typing as npt
import pytest

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.ensemble import TabularEnsemble

CHOICES = [4, 3, 4, 3, 4]
EVERY = np.array(list(itertools.product(*map(range, CHOICES))))


def latencies(noise: float, seed: int = 0) -> npt.NDArray[np.float64]:
    """``(n,)`` ms of all networks: prices of decisions, one strong interaction, relative noise."""
    rng = np.random.default_rng(seed)
    prices = [rng.uniform(0, 2, count) for count in CHOICES]
    ms = 1 + sum(price[EVERY[:, i]] for i, price in enumerate(prices))
    ms = ms + 3.0 * (EVERY[:, 0] == EVERY[:, 2])
    return np.asarray(ms * np.exp(noise * rng.normal(size=len(EVERY))))


@functools.cache
def fitted() -> tuple[TabularEnsemble, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """One with noise of 4 %, the rows that it has not seen, and all latencies."""
    ms = latencies(0.04)
    rows = np.random.default_rng(1).permutation(len(EVERY))
    return TabularEnsemble(CHOICES).fit(EVERY[rows[:200]], ms[rows[:200]]), rows[200:], ms


def test_predictions_and_their_intervals() -> None:
    predictor, others, ms = fitted()
    said = predictor.predict(EVERY[others])
    assert np.mean(np.abs(said.ms / ms[others] - 1) <= 0.1) >= 0.93
    assert 0.85 <= np.mean((said.low_ms <= ms[others]) & (ms[others] <= said.high_ms)) <= 0.97
    wider = predictor.predict(EVERY[others], 0.98)
    assert (wider.high_ms >= said.high_ms).all()
    assert (wider.low_ms <= said.low_ms).all()


def test_weights_choose_the_members_that_see_the_interaction() -> None:
    weights = fitted()[0].weights
    assert weights.sum() == pytest.approx(1)
    assert weights[0] < 0.1


def test_without_noise_nearly_exact() -> None:
    ms = latencies(0.0)
    rows = np.random.default_rng(1).permutation(len(EVERY))
    said = TabularEnsemble(CHOICES).fit(EVERY[rows[:200]], ms[rows[:200]]).predict(EVERY[rows[200:]])
    assert np.median(np.abs(said.ms / ms[rows[200:]] - 1)) < 0.01


def test_outliers_do_not_matter() -> None:
    ms = latencies(0.02)
    rows = np.random.default_rng(1).permutation(len(EVERY))
    spoilt = ms.copy()
    spoilt[rows[:10]] *= 8
    said = TabularEnsemble(CHOICES).fit(EVERY[rows[:200]], spoilt[rows[:200]]).predict(EVERY[rows[200:]])
    assert np.median(np.abs(said.ms / ms[rows[200:]] - 1)) < 0.04


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_does_not_matter(unit: float) -> None:
    predictor, others, ms = fitted()
    rows = np.random.default_rng(1).permutation(len(EVERY))[:200]
    scaled = TabularEnsemble(CHOICES).fit(EVERY[rows], ms[rows] * unit).predict(EVERY[others])
    assert scaled.ms / unit == pytest.approx(predictor.predict(EVERY[others]).ms, rel=1e-3)


def test_it_round_trips() -> None:
    predictor, others, _ = fitted()
    data = json.loads(json.dumps(predictor.to_json()))
    again = TabularEnsemble.from_json(data)
    assert again.predict(EVERY[others]).ms.tolist() == predictor.predict(EVERY[others]).ms.tolist()
    assert again.to_json() == predictor.to_json()


def test_bad_input() -> None:
    ms = latencies(0.0)
    predictor = TabularEnsemble(CHOICES)
    with pytest.raises(InputError, match="not fitted"):
        predictor.predict(EVERY[:3])
    with pytest.raises(InputError, match="networks: 5 are too few"):
        predictor.fit(np.repeat(EVERY[:5], 10, axis=0), np.repeat(ms[:5], 10))
    with pytest.raises(InputError, match="ms: nan is no latency"):
        predictor.fit(EVERY[:30], np.where(np.arange(30) == 3, np.nan, ms[:30]))
    with pytest.raises(InputError, match="ms: "):
        predictor.fit(EVERY[:30], ms[:29])
    with pytest.raises(InputError, match="networks: 9 is no choice of decision 2"):
        predictor.predict(np.array([[0, 0, 9, 0, 0]]))
    with pytest.raises(InputError, match="networks: "):
        predictor.predict(EVERY[:, :3])
    with pytest.raises(InputError, match="choices: "):
        TabularEnsemble([])
    with pytest.raises(InputError, match="predictor"):
        TabularEnsemble.from_json({"format": "other"})
    with pytest.raises(InputError, match="predictor"):
        TabularEnsemble.from_json({})
