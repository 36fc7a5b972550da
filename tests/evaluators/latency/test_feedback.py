"""What a job's own measurements teach its latency predictions."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

import archfront
from archfront.db.ledger import Ledger
from archfront.db.schema import AskRow, MetricRow, PredictorRow
from archfront.errors import InputError
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.latency import evaluator as module
from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.evaluator import Latency
from archfront.evaluators.latency.feedback import LATEST, Feedback, fit_feedback
from archfront.evaluators.latency.measurement import MeasurementError, Settings, summary
from archfront.evaluators.latency.table import Correction, LatencyTable
from archfront.evaluators.learning import Learned, Learning
from archfront.spaces.fbnet import FBNetTiny

SPACE = FBNetTiny(layers=4, head_channels=16, blocks=["k3_e1", "k3_e6", "skip"])
NAMES = ("latency_ms", "latency_predicted_ms", "latency_base_ms")


def drawn(rng: np.random.Generator, count: int, truth: Callable[[Any], Any], low: float = 1, high: float = 4) -> Any:
    base = rng.uniform(low, high, count)
    return np.stack([base, truth(base) * np.exp(rng.normal(0, 0.05, count))], axis=1)


@pytest.mark.parametrize("truth", [lambda b: 1.4 * b, lambda b: 0.6 * b, lambda b: 0.8 + 0.9 * b])
def test_the_correction_finds_what_the_device_does_otherwise(truth: Callable[[Any], Any]) -> None:
    rng = np.random.default_rng(0)
    feedback = fit_feedback(drawn(rng, 80, truth))
    for base in (1.0, 2.0, 4.0):
        assert feedback.ms(base) == pytest.approx(truth(base), rel=0.05)
    assert feedback.error < 0.05 < 0.2 < feedback.error_before
    assert Feedback.from_json(json.loads(json.dumps(feedback.to_json()))) == feedback


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
def test_intervals_hold_what_they_promise(confidence: float) -> None:
    rng = np.random.default_rng(1)
    inside, width = [], []
    for _ in range(60):
        feedback = fit_feedback(drawn(rng, 30, lambda b: 0.3 + 1.2 * b))
        base, measured = drawn(rng, 20, lambda b: 0.3 + 1.2 * b).T
        error = np.abs(measured / np.array([feedback.ms(b) for b in base]) - 1)
        inside += (error <= feedback.relative_width(confidence)).tolist()
        width.append(feedback.relative_width(confidence))
    assert confidence - 0.03 < np.mean(inside) < confidence + 0.05
    assert max(width) < 0.25


def test_networks_of_one_latency_do_not_make_all_alike() -> None:
    rng = np.random.default_rng(2)
    slopes = [fit_feedback(drawn(rng, 10, lambda b: 1.3 * b, 1.98, 2.02)).slope for _ in range(50)]
    assert min(slopes) > 0.8
    assert np.median(slopes) == pytest.approx(1.3, rel=0.1)


def test_a_correction_that_does_not_help_is_not_made() -> None:
    rng = np.random.default_rng(5)
    exact = [fit_feedback(drawn(rng, 20, lambda b: b)) for _ in range(40)]
    kept = [(f.intercept_ms, f.slope) == (0.0, 1.0) for f in exact]
    assert np.mean(kept) > 0.5
    assert all(
        f.error == f.error_before if keeps else f.error < f.error_before for f, keeps in zip(exact, kept, strict=True)
    )


def test_few_pairs_promise_little_and_fewer_are_refused() -> None:
    pairs = drawn(np.random.default_rng(3), 10, lambda b: b)
    feedback = fit_feedback(pairs)
    assert np.isfinite(feedback.relative_width(0.9))
    assert feedback.relative_width(0.99) == np.inf
    assert feedback.to_json()["widths"][-1] == [0.99, None]
    for wrong in (pairs[:9], np.vstack([pairs, [1.0, 0.0]])):
        with pytest.raises(InputError, match=r"latency\.feedback"):
            fit_feedback(wrong)
    with pytest.raises(InputError, match="another format"):
        Feedback.from_json({})
    with pytest.raises(InputError, match="confidence"):
        feedback.relative_width(0.5001)


def test_the_last_pairs_count_and_the_state_stays_small() -> None:
    rng = np.random.default_rng(4)
    old, new = drawn(rng, 300, lambda b: 3 * b), drawn(rng, LATEST, lambda b: b)
    feedback = fit_feedback(np.vstack([old, new]))
    assert feedback == fit_feedback(new)
    assert len(json.dumps(feedback.to_json())) < 1000


def made_table(space: FBNetTiny = SPACE) -> LatencyTable:
    """A table that nobody measured, of a device that takes 50 ms a block."""
    return LatencyTable(
        space=space.digest,
        device=fingerprint(1).to_json(),
        batch=1,
        threads=1,
        backend="eager",
        blocks={spec.descriptor: 50.0 for spec in space.block_catalogue()},
        correction=Correction(intercept_ms=0.0, slope=1.0, relative_std=0.1, networks=4),
        fitted=[],
    )


def tasks(count: int, **more: Any) -> list[Task]:
    rng = np.random.default_rng(0)
    seeds = rng.integers(2**63, size=count).tolist()
    genotypes = SPACE.to_json(SPACE.sample(rng, count))
    pairs = enumerate(zip(seeds, genotypes, strict=True))
    return [Task(number=i, genotype=g, key=str(i), fidelity=0, repeat=0, seed=s, **more) for i, (s, g) in pairs]


def test_a_share_is_measured_and_both_values_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def elsewhere(config: Any, items: Any, **_: Any) -> Any:
        calls.append(len(items))
        timing = summary([70.0, 80.0, 90.0], Settings())
        return [replace(timing, error="cannot run") if len(calls) == 1 else timing], {"device": {"digest": "abc"}}

    monkeypatch.setattr(module, "measured_elsewhere", elsewhere)
    latency = Latency(verify=0.25)
    assert isinstance(latency, Learning)
    assert latency.pair_metrics
    assert not Latency().pair_metrics
    context = EvaluationContext(space=SPACE, artifacts={"latency": made_table().to_json()})
    state = Feedback(intercept_ms=1.0, slope=2.0, widths={0.9: 0.16449}, error=0.1, error_before=0.5).to_json()
    name = f"table:{made_table().digest[:8]}"
    for learned, version in ((None, name), (Learned("10-abc", state), f"{name}@10-abc")):
        calls.clear()
        given = tasks(200, learned=learned)
        found = latency.evaluate(given, context)
        results = [r.metrics for r in found if isinstance(r, Evaluated)]
        measured = [m for m in results if "latency_predicted_ms" in m]
        # Each in a process of its own; the one that could not be measured fails.
        assert calls == [1] * (len(measured) + 1)
        assert [type(r) for r in found if not isinstance(r, Evaluated)] == [MeasurementError]
        assert 30 < len(measured) < 70
        for metrics in results:
            predicted = metrics.get("latency_predicted_ms", metrics["latency_ms"])
            assert (predicted.provenance, predicted.predictor) == ("predicted", version)
            if "latency_base_ms" in metrics:
                base, value = metrics["latency_base_ms"], metrics["latency_ms"]
                assert (base.provenance, base.predictor) == ("predicted", name)
                assert (value.value, value.provenance, value.predictor) == (80.0, "measured", None)
                assert (value.device, predicted.device) == ("abc", fingerprint(1).digest)
                assert predicted.value == (base.value if learned is None else 1 + 2 * base.value)
            if learned is not None:
                assert predicted.std == pytest.approx(0.1 * predicted.value)
        # By the seed alone: whoever evaluates which of them again measures the same ones.
        calls.clear()
        chosen = {t.key for t, r in zip(given, found, strict=True) if _is_measured(r)}
        moved = [replace(task, number=task.number + 1) for task in given[::-1]]
        again = zip(moved, latency.evaluate(moved, context), strict=True)
        assert {t.key for t, r in again if _is_measured(r)} == chosen
    calls.clear()
    latency.evaluate(tasks(50, final=True), context)
    assert calls == []


def _is_measured(result: Any) -> bool:
    return isinstance(result, MeasurementError) or "latency_base_ms" in result.metrics


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"verify": 1.5}, "is no share"), ({"verify": -0.1}, "is no share"), ({"verify": 0.1, "mode": "measure"}, "all")],
)
def test_shares_that_make_no_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"evaluators\.latency\.verify.*{words}"):
        Latency(**arguments)


def learned_job(folder: Path, artifact: Any, key: str | None, evaluations: int, **latency: Any) -> archfront.Job:
    """A job with costs and latency on this processor, which goes by an artifact that is given."""
    ledger = Ledger.open(str(folder / "l.db"))
    ledger.store_artifact("latency", str(key), artifact, fingerprint(1).to_json())
    ledger.close()
    spec = {
        "name": "learns",
        "space": {"name": SPACE.name, **SPACE.config},
        "evaluators": [{"name": "costs"}, {"name": "latency", **latency}],
        "objectives": [{"metric": "latency_ms", "direction": "min"}, {"metric": "macs", "direction": "max"}],
        "constraints": ["latency_ms <= 1000 @ 95%"],
        "strategy": {"name": "random"},
        "budget": {"evaluations": evaluations},
        "workers": {"executor": "inline", "timeout_s": 600, "batch": 2},
        "finalists": {"count": 0},
    }
    return archfront.run(spec, db=folder / "l.db")


def rows_of(job: archfront.Job) -> dict[int, dict[str, Any]]:
    """The metrics of each evaluation, in the order of their numbers."""
    found: dict[int, dict[str, Any]] = {}
    with job.ledger.engine.connect() as connection:
        query = sa.select(MetricRow).where(MetricRow.job_id == job.id, MetricRow.name.in_(NAMES))
        for row in connection.execute(query.order_by(MetricRow.number)):
            found.setdefault(row.number, {})[row.name] = row
    return found


def check_job(job: archfront.Job) -> dict[str, Any]:
    """Versions, provenance and labels as they must be. Returns the errors of the measured candidates."""
    rows = rows_of(job)
    with job.ledger.engine.connect() as connection:
        versions = {
            row.version: row for row in connection.execute(sa.select(PredictorRow).order_by(PredictorRow.pairs))
        }
        asked = connection.execute(sa.select(AskRow.first, AskRow.count, AskRow.predictor).order_by(AskRow.first)).all()
    of = {number: ask.predictor for ask in asked for number in range(ask.first, ask.first + ask.count)}
    order = [None, *versions]
    places = [order.index(of[number]) for number in sorted(rows)]
    assert places == sorted(places)
    # One that came at the very end serves nobody any more.
    assert set(places) in (set(range(len(order))), set(range(len(order) - 1)))
    assert max(places) > 0
    errors: dict[str | None, list[tuple[float, float, bool]]] = {version: [] for version in order}
    for number, metrics in rows.items():
        predicted = metrics.get("latency_predicted_ms", metrics["latency_ms"])
        assert predicted.provenance == "predicted"
        assert predicted.predictor.partition("@")[2] == (of[number] or "")
        if "latency_base_ms" in metrics:
            value, base = metrics["latency_ms"], metrics["latency_base_ms"]
            assert (value.provenance, value.predictor, base.provenance) == ("measured", None, "predicted")
            assert value.device == predicted.device == base.device
            error = abs(value.value / predicted.value - 1)
            inside = abs(value.value - predicted.value) <= 1.6449 * (predicted.std or 0)
            errors[of[number]].append((error, abs(value.value / base.value - 1), inside))
    return {
        str(version): {
            "pairs": len(found),
            "error": float(np.median([e for e, _, _ in found])) if found else None,
            "uncorrected": float(np.median([b for _, b, _ in found])) if found else None,
            "inside": float(np.mean([i for _, _, i in found])) if found else None,
        }
        for version, found in errors.items()
    }


@pytest.mark.slow
@pytest.mark.alone
def test_a_job_learns_from_its_own_measurements(tmp_path: Path) -> None:
    """On this processor, from a table of another that is a hundred times slower."""
    key = Latency().prepare_key(EvaluationContext(space=SPACE))
    job = learned_job(tmp_path, made_table().to_json(), key, 18, verify=0.9)
    found = check_job(job)
    first, last = found.pop("None"), [f for f in found.values() if f["pairs"]][-1]
    # The blocks of that table are all alike, so no line makes it right.
    assert last["error"] < 0.8 < 0.9 < first["error"]
    learned = job.status()["predictor"]
    assert learned["error"] < 0.8 < 0.9 < learned["error_before"]
    assert last["inside"] > first["inside"] == 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("mode", ["table", "operators"])
def test_a_device_that_is_quicker_than_when_it_was_profiled(tmp_path: Path, mode: Any) -> None:
    """Its real profile, as if all had taken three times as long: more than neighbours on the machine could explain."""
    context, evaluator = EvaluationContext(space=SPACE), Latency(mode=mode)
    artifact = evaluator.prepare(context)
    if mode == "table":
        artifact["blocks"] = [[name, 3 * ms] for name, ms in artifact["blocks"]]
        artifact["correction"]["intercept_ms"] *= 3
    else:
        artifact["weights"] = [3 * weight for weight in artifact["weights"]]
    job = learned_job(tmp_path, artifact, evaluator.prepare_key(context), 40, mode=mode, verify=0.75)
    found = check_job(job)
    print(json.dumps([found, job.status()["predictor"]], indent=1))
    first, *_, last = [f for f in found.values() if f["pairs"]]
    assert 0.5 < first["error"] == first["uncorrected"]
    assert last["error"] < 0.5 * last["uncorrected"]
    assert last["inside"] > first["inside"]
