"""Few-shot transfer: on made-up devices of which everything is known, and on HELP's with the goals."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.few_shot import FewShotTransfer

Vector = npt.NDArray[np.float64]
N, P = 400, 5


def made_up(devices: int = 6, noise: float = 0.01, seed: int = 0) -> tuple[Vector, Vector, Vector]:
    """Structure ``(n, p)``, known devices ``(n, D)``, and a new one ``(n,)``, of very different speeds."""
    rng = np.random.default_rng(seed)
    structure = rng.integers(0, 8, (N, P)).astype(np.float64)
    prices = rng.uniform(0.5, 1.5, P) * rng.lognormal(0, 0.4, (devices + 1, P))
    ms = (5 + structure @ prices.T) * rng.lognormal(0, 2, devices + 1)
    ms *= np.exp(noise * rng.normal(size=ms.shape))
    return structure, ms[:, :devices], ms[:, devices]


def rank(predictor: FewShotTransfer, ms: Vector, rows: Any) -> float:
    others = np.setdiff1d(np.flatnonzero(np.isfinite(ms)), rows)
    return float(spearmanr(predictor.fit(rows, ms[rows]).predict(others).ms, ms[others]).statistic)


def test_ten_measurements_of_an_additive_device() -> None:
    structure, known, ms = made_up()
    predictor = FewShotTransfer(structure, known)
    rows = predictor.choose(10, np.random.default_rng(0))
    assert rank(predictor, ms, rows) > 0.99
    said = predictor.predict(np.arange(N))
    assert np.median(np.abs(said.ms / ms - 1)) < 0.02


def test_chosen_samples_beat_random_ones() -> None:
    structure, known, ms = made_up()
    chosen, drawn = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        chosen.append(rank(p := FewShotTransfer(structure, known), ms, p.choose(6, rng)))
        drawn.append(rank(FewShotTransfer(structure, known), ms, rng.choice(N, 6, replace=False)))
    assert np.mean(chosen) > np.mean(drawn) + 0.002


def test_known_devices_help() -> None:
    structure, known, ms = made_up(devices=12)
    rng = np.random.default_rng(0)
    with_them, without = [], []
    for _ in range(8):
        rows = rng.choice(N, 4, replace=False)
        with_them.append(rank(FewShotTransfer(structure, known), ms, rows))
        without.append(rank(FewShotTransfer(structure), ms, rows))
    assert np.mean(with_them) > np.mean(without) + 0.01


@pytest.mark.parametrize("families", [None, ["a", "a", "b", "b", "c", "c", "d", "d"]])
def test_intervals_cover(families: list[str] | None) -> None:
    covered = []
    for seed in range(6):
        structure, known, ms = made_up(devices=8, noise=0.05, seed=seed)
        predictor = FewShotTransfer(structure, known, families=families)
        rows = np.random.default_rng(seed).choice(N, 10, replace=False)
        said = predictor.fit(rows, ms[rows]).predict(np.arange(N), 0.9)
        covered.append(np.mean((said.low_ms <= ms) & (ms <= said.high_ms)))
        wide, narrow = predictor.predict(np.arange(N), 0.99), predictor.predict(np.arange(N), 0.5)
        assert (wide.high_ms >= said.high_ms).all()
        assert (said.high_ms >= narrow.high_ms).all()
        assert (wide.low_ms >= 0).all()
    assert 0.82 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("devices", [0, 1, 2])
@pytest.mark.parametrize("count", [3, 10, 50])
def test_few_known_devices_and_any_number_of_samples(devices: int, count: int) -> None:
    structure, known, ms = made_up()
    predictor = FewShotTransfer(structure, known[:, :devices])
    rows = predictor.choose(count, np.random.default_rng(0))
    assert rank(predictor, ms, rows) > (0.4 if count == 3 else 0.9)
    said = predictor.predict(np.arange(N))
    assert np.isfinite(np.stack([said.ms, said.low_ms, said.high_ms])).all()
    assert (said.ms > 0).all()


def test_odd_tables() -> None:
    """Unsupported networks, a constant device, a constant feature, networks that no device knows, no features."""
    structure, known, ms = made_up()
    structure = np.hstack([structure, np.full((N, 1), 7.0)])
    known[::3, 0] = np.nan
    known[:, 1] = 4.0
    known[-50:] = np.nan
    ms[1::5] = np.nan
    predictor = FewShotTransfer(structure, known)
    available = np.flatnonzero(np.isfinite(ms))
    rows = predictor.choose(10, np.random.default_rng(0), available)
    assert np.isin(rows, available).all()
    assert rank(predictor, ms, rows) > 0.97
    assert np.isfinite(FewShotTransfer(np.zeros((N, 0)), known).fit(rows, ms[rows]).predict(np.arange(N)).ms).all()
    constant = FewShotTransfer(structure, np.ones((N, 3))).fit(rows, ms[rows]).predict(np.arange(N))
    assert np.isfinite(constant.high_ms).all()
    flat = FewShotTransfer(structure, known).fit(rows, np.full(10, 3.0)).predict(np.arange(N))
    assert flat.ms == pytest.approx(np.full(N, 3.0), rel=0.05)


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_does_not_matter(unit: float) -> None:
    structure, known, ms = made_up()
    rows = np.arange(10)
    said = FewShotTransfer(structure, known).fit(rows, ms[rows]).predict(np.arange(N))
    scaled = FewShotTransfer(structure, known * 7).fit(rows, ms[rows] * unit).predict(np.arange(N))
    assert scaled.ms / unit == pytest.approx(said.ms, rel=1e-6)
    assert scaled.high_ms / unit == pytest.approx(said.high_ms, rel=1e-6)


def test_an_outlier_does_not_matter() -> None:
    structure, known, ms = made_up()
    rows = np.random.default_rng(0).choice(N, 12, replace=False)
    spoilt = ms.copy()
    spoilt[rows[3]] *= 6
    said = FewShotTransfer(structure, known).fit(rows, spoilt[rows]).predict(np.arange(N))
    assert spearmanr(said.ms, ms).statistic > 0.97


def test_a_runtime_that_drops_operators_is_recognised() -> None:
    structure, known, ms = made_up(noise=0.0)
    rewrite = np.where(np.arange(N) % 2 == 0, np.arange(N), 0)
    on_the_runtime = ms[rewrite] * np.exp(0.01 * np.random.default_rng(0).normal(size=N))
    predictor = FewShotTransfer(structure, known, rewrites=rewrite[None])
    rows = predictor.choose(10, np.random.default_rng(0))
    said = predictor.fit(rows, on_the_runtime[rows]).predict(np.arange(N))
    assert np.median(np.abs(said.ms / on_the_runtime - 1)) < 0.03
    as_written = predictor.fit(rows, ms[rows]).predict(np.arange(N))
    assert np.median(np.abs(as_written.ms / ms - 1)) < 0.03


def test_more_is_chosen_in_the_light_of_what_was_measured() -> None:
    structure, known, ms = made_up()
    predictor = FewShotTransfer(structure, known)
    first = predictor.choose(5, np.random.default_rng(0))
    assert len(set(first)) == 5
    second = predictor.fit(first, ms[first]).choose(5, np.random.default_rng(0))
    assert not set(first) & set(second)
    both = np.concatenate([first, second])
    assert rank(predictor, ms, both) > 0.98
    with pytest.raises(InputError, match="count: 8 is not between 1 and the 5 available"):
        predictor.fit(first, ms[first]).choose(8, np.random.default_rng(0), np.arange(5).tolist() + first.tolist())
    everything = FewShotTransfer(structure, known).choose(N, np.random.default_rng(0))
    assert sorted(everything) == list(range(N))


def test_a_row_may_be_measured_twice() -> None:
    structure, known, ms = made_up()
    rows = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
    assert rank(FewShotTransfer(structure, known), ms, rows) > 0.9


def test_it_round_trips_without_the_table() -> None:
    structure, known, ms = made_up()
    rewrites = np.arange(N)[None, ::-1]
    predictor = FewShotTransfer(structure, known, rewrites=rewrites, families=list("aabbcc"))
    predictor.fit(np.arange(10), ms[:10])
    text = json.dumps(predictor.to_json())
    assert len(text) < 1000
    again = FewShotTransfer.from_json(json.loads(text), structure, known, rewrites=rewrites)
    for name in ("ms", "low_ms", "high_ms"):
        first, second = (getattr(each.predict(np.arange(N)), name) for each in (predictor, again))
        assert first.tolist() == second.tolist()
    with pytest.raises(InputError, match=r"predictor\.known"):
        FewShotTransfer.from_json(json.loads(text), structure, known * 1.01, rewrites=rewrites)
    with pytest.raises(InputError, match=r"predictor\.rewrites"):
        FewShotTransfer.from_json(json.loads(text), structure, known)
    with pytest.raises(InputError, match="predictor"):
        FewShotTransfer.from_json({}, structure, known)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("structure", {"structure": np.zeros(N)}),
        ("structure", {"structure": np.full((N, 2), np.nan)}),
        ("structure", {"structure": np.zeros((2, 2)), "known": None}),
        ("structure", {"structure": [["a"]]}),
        ("known", {"known": np.ones((N - 1, 2))}),
        (r"known\[:, 1\]", {"known": np.stack([np.ones(N), -np.ones(N)], axis=1)}),
        (r"known\[:, 0\]", {"known": np.full((N, 1), np.nan)}),
        (r"known\[:, 0\]", {"known": np.full((N, 1), np.inf)}),
        ("rewrites", {"rewrites": np.zeros((1, 3), np.int64)}),
        ("rewrites", {"rewrites": np.full((1, N), N)}),
        ("families", {"families": ["a"]}),
    ],
)
def test_arguments_that_cannot_be_used(field: str, arguments: dict[str, Any]) -> None:
    structure, known, _ = made_up()
    with pytest.raises(InputError, match=rf"^{field}: "):
        FewShotTransfer(**{"structure": structure, "known": known, **arguments})


def test_measurements_that_cannot_be_used() -> None:
    structure, known, ms = made_up()
    predictor = FewShotTransfer(structure, known)
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="not fitted"):
        predictor.predict(np.arange(3))
    for wrong in (np.nan, 0.0, -1.0, np.inf):
        with pytest.raises(InputError, match=r"^ms: "):
            predictor.fit(np.arange(3), np.array([1.0, 2.0, wrong]))
    with pytest.raises(InputError, match=r"^ms: "):
        predictor.fit(np.arange(3), ms[:4])
    with pytest.raises(InputError, match="networks: 2 are too few"):
        predictor.fit(np.arange(2), ms[:2])
    with pytest.raises(InputError, match=f"networks: {N} is no row"):
        predictor.fit(np.array([0, 1, N]), ms[:3])
    with pytest.raises(InputError, match=r"^networks: "):
        predictor.fit(np.array([0.5, 1.0, 2.0]), ms[:3])
    with pytest.raises(InputError, match="count: 4 is not between 1 and the 3 available"):
        predictor.choose(4, rng, np.arange(3))
    with pytest.raises(InputError, match=r"^count: 0"):
        predictor.choose(0, rng)
    with pytest.raises(InputError, match=r"^confidence: "):
        predictor.fit(np.arange(5), ms[:5]).predict(np.arange(3), 1.5)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's tables, where the public data are."""
    folder = os.environ.get("ARCHFRONT_DATA")
    if not folder:
        pytest.skip("ARCHFRONT_DATA does not name the folder of the public tables")
    if not (Path(folder) / "help_latency" / "help_nb201_latency_ms.parquet").is_file():
        pytest.skip("ARCHFRONT_DATA has no help_latency/help_nb201_latency_ms.parquet")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import few_shot

    yield few_shot
    for name in ("few_shot", "few_shot_tables"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("space", ["cells", "chains"])
def test_the_goals_on_helps_test_devices(tables: Any, space: str) -> None:
    """Ten chosen samples; four draws here, ten in the benchmark."""
    table = getattr(tables, space)(tables.data_folder())
    ranks = []
    for target in table.test:
        ms = table.ms[target]
        for seed in range(4):
            predictor = tables.transfer(table, table.train)
            rows = predictor.choose(10, np.random.default_rng(seed), np.flatnonzero(np.isfinite(ms)))
            ranks.append(rank(predictor, ms, rows))
    assert np.mean(ranks) >= table.goal
