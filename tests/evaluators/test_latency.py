from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.latency import evaluator as module
from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.evaluator import Latency
from archfront.evaluators.latency.measurement import (
    MeasurementError,
    Settings,
    Timing,
    measure,
    measured_elsewhere,
    summary,
)
from archfront.evaluators.latency.table import (
    Correction,
    LatencyTable,
    fit_correction,
    make_table,
    process_deviation,
    spread_networks,
)
from archfront.evaluators.registry import EVALUATORS
from archfront.plugins import Plugin
from archfront.spaces.choices import Choices
from archfront.spaces.fbnet import FBNetTiny

SPACE = FBNetTiny(layers=3, head_channels=16, blocks=["k3_e1", "k3_e6", "skip"])
QUICK = Settings(rounds=5, sample_ms=0.3, warmup_ms=2, warmup_limit_ms=30)
CONFIG = {"name": SPACE.name, **SPACE.config}


def made_table(space: FBNetTiny = SPACE) -> LatencyTable:
    """A table that nobody measured: block i takes i + 1 ms."""
    blocks = {spec.descriptor: float(i + 1) for i, spec in enumerate(space.block_catalogue())}
    return LatencyTable(
        space=space.digest,
        device=fingerprint(1).to_json(),
        batch=1,
        threads=1,
        backend="eager",
        blocks=blocks,
        correction=Correction(intercept_ms=0.5, slope=2.0, relative_std=0.1, networks=4),
        fitted=[],
    )


def tasks(genotypes: list[Any]) -> list[Task]:
    return [Task(number=i, genotype=g, key=str(i), fidelity=1, repeat=0, seed=0) for i, g in enumerate(genotypes)]


def test_medians_withstand_outliers_and_name_them() -> None:
    values = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 40.0]
    timing = summary(values, Settings())
    assert timing.median_ms == 1.0
    assert timing.low_ms <= timing.median_ms <= timing.high_ms < 2
    assert timing.notes == ["1 of 8 samples are outliers"]
    assert timing.samples_ms == values
    rng = np.random.default_rng(0)
    few, many = (summary(rng.normal(1, 0.1, n).tolist(), Settings()) for n in (10, 400))
    assert many.std_ms < few.std_ms
    assert many.std_ms == pytest.approx(1.2533 * 0.1 / 400**0.5, rel=0.4)
    assert many.spread_ms == pytest.approx(0.1, rel=0.2)


def test_measuring_is_interleaved_warm_and_right() -> None:
    order: list[int] = []

    def sleeper(number: int, seconds: float) -> Any:
        def call() -> None:
            order.append(number)
            time.sleep(seconds)

        return call

    def broken() -> None:
        raise RuntimeError("no such operator")

    functions = [sleeper(0, 1e-3), broken, sleeper(2, 3e-3)]
    timings, probe_ms = measure(functions, Settings(rounds=8, sample_ms=1, lead_ms=1, warmup_ms=3, warmup_limit_ms=50))
    assert np.isnan(probe_ms)
    assert timings[1].error == "RuntimeError: no such operator"
    assert np.isnan(timings[1].median_ms)
    assert 0.95 < timings[0].median_ms < 2.5
    assert timings[2].median_ms / timings[0].median_ms == pytest.approx(3, rel=0.35)
    assert [len(timings[i].samples_ms) for i in (0, 2)] == [8, 8]
    # After the warm-up the two take turns.
    measured = order[-2 * 8 * 2 :]
    assert sum(a != b for a, b in pairwise(measured)) >= 8


def test_a_slow_start_is_left_out() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(5e-3 * [20, 15, 11, 8, 6, 4, 1][min(calls, 7) - 1])

    [timing], _ = measure([call], Settings(rounds=5, sample_ms=5, warmup_ms=5, warmup_limit_ms=1000))
    assert np.median(timing.samples_ms) < 15
    assert timing.samples_ms[0] < 25
    assert timing.notes == [] or "outlier" in timing.notes[0]


def test_a_fresh_process_measures_networks_and_blocks() -> None:
    blocks = [spec.descriptor for spec in SPACE.block_catalogue()][:2]
    items: list[dict[str, Any]] = [
        {"genotype": ["k3_e6", "k3_e6", "k3_e6"]},
        {"genotype": ["skip", "skip", "skip"]},
        {"genotype": ["k3_e6", "k3_e6", "k3_e6"], "batch": 64, "channels_last": True},
        {"block": blocks[0]},
        {"block": "nonsense"},
        {"genotype": ["skip", "skip", "skip"], "backend": "tpu"},
    ]
    timings, environment = measured_elsewhere(CONFIG, items, threads=1, settings=QUICK)
    heavy, light, many, block, nonsense, tpu = timings
    assert block.median_ms < light.median_ms < heavy.median_ms < many.median_ms
    assert "nonsense" in str(nonsense.error)
    assert "unknown backend 'tpu'" in str(tpu.error)
    assert environment["threads"] == 1
    assert environment["device"] == fingerprint(1).to_json()
    assert environment["peak_memory_bytes"] > 2**20
    with pytest.raises(MeasurementError, match="digitz"):
        measured_elsewhere({"name": "digitz"}, items[:1], threads=1)
    with pytest.raises(MeasurementError, match="longer than"):
        measured_elsewhere(CONFIG, items, threads=1, timeout_s=0.05)


def test_the_measuring_process_loads_nothing_else_of_ours() -> None:
    code = (
        "import sys, archfront.evaluators.latency.measure_process; "
        "print([m for m in sys.modules if m.startswith(('archfront.', 'ray', 'sqlalchemy', 'sklearn', 'timm'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = json.loads(loaded.replace("'", '"'))
    leaves = ("archfront.errors", "archfront.registry", "archfront.plugins")
    allowed = (*leaves, "archfront.spaces", "archfront.evaluators.latency", "archfront.evaluators.onnx_")
    # Leaves of torch, which know how a network travels to this process.
    travel = {f"archfront.evaluators.deployment{name}" for name in ("", ".half_precision", ".student_files")}
    assert [n for n in names if n not in {"archfront.evaluators", *travel} and not n.startswith(allowed)] == []


def test_the_correction_finds_a_line_and_keeps_its_intercept_at_0_or_more() -> None:
    sums = np.linspace(1, 10, 12)
    noise = np.random.default_rng(0).normal(1, 0.02, 12)
    fit = fit_correction(list(zip(sums, (0.3 + 1.2 * sums) * noise, strict=True)))
    assert (fit.intercept_ms, fit.slope) == pytest.approx((0.3, 1.2), rel=0.15)
    assert fit.relative_std == pytest.approx(0.02, rel=0.5)
    through = fit_correction(list(zip(sums, 1.2 * sums - 0.5, strict=True)))
    assert through.intercept_ms == 0
    assert 1.0 < through.slope < 1.2
    shaky = fit_correction(list(zip(sums, 0.3 + 1.2 * sums, strict=True)), 0.05)
    assert shaky.relative_std == pytest.approx(0.05)


def test_disturbed_processes_do_not_count_in_the_deviation() -> None:
    base = np.linspace(1, 3, 8)
    assert process_deviation(np.stack([base, 1.02 * base, 1.9 * base])) == pytest.approx(np.log(1.02) / 2**0.5)
    assert process_deviation(base[None]) == 0


def test_networks_for_the_correction_spread_over_the_space() -> None:
    space = FBNetTiny()
    medians = np.ones(len(space.block_catalogue()))
    chosen = spread_networks(space, medians, 12, np.random.default_rng(0))
    lengths = (space.block_indices(chosen) >= 0).sum(axis=1)
    # 14 blocks at most; at least stem, head and the two layers whose skip is a conv.
    assert lengths.max() == 14
    assert lengths.min() <= 5
    assert len(set(lengths.tolist())) >= 8


def test_predictions_are_sums_of_blocks() -> None:
    table = made_table()
    population = SPACE.from_json([["skip", "skip", "skip"], ["k3_e6", "k3_e1", "k3_e1"]])
    indices = SPACE.block_indices(population)
    expected = [0.5 + 2 * sum(i + 1 for i in row if i >= 0) for row in indices.tolist()]
    latency, std = table.predict(SPACE, population)
    assert latency.tolist() == expected
    assert std.tolist() == pytest.approx([0.1 * value for value in expected])
    again = LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again.digest == table.digest
    assert again.predict(SPACE, population)[0].tolist() == expected
    with pytest.raises(InputError, match="another space"):
        table.predict(FBNetTiny(), FBNetTiny().from_json([["skip"] * 12]))
    for broken in ({}, {**table.to_json(), "format": "x"}, {**table.to_json(), "blocks": [[1]]}):
        with pytest.raises(InputError, match=r"latency\.table"):
            LatencyTable.from_json(broken)


def test_the_evaluator_predicts_from_its_artifact() -> None:
    latency = Latency()
    context = EvaluationContext(space=SPACE, artifacts={"latency": made_table().to_json()})
    [light, heavy] = latency.evaluate(tasks([["skip"] * 3, ["k3_e6"] * 3]), context)
    assert isinstance(light, Evaluated)
    assert isinstance(heavy, Evaluated)
    metric = light.metrics["latency_ms"]
    assert metric.value < heavy.metrics["latency_ms"].value
    assert metric.provenance == "predicted"
    assert metric.predictor == f"table:{made_table().digest[:8]}"
    assert metric.device == fingerprint(1).digest
    assert metric.std == pytest.approx(0.1 * metric.value)
    assert latency.metrics[0].has_std
    with pytest.raises(MeasurementError, match="prepare"):
        latency.evaluate(tasks([["skip"] * 3]), EvaluationContext(space=SPACE))


def test_prepare_keys_tell_what_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    context = EvaluationContext(space=SPACE)
    other = EvaluationContext(space=FBNetTiny())
    keys = [
        Latency().prepare_key(context),
        Latency(batch=2).prepare_key(context),
        Latency(threads=2).prepare_key(context),
        Latency(backend="compile").prepare_key(context),
        Latency().prepare_key(other),
    ]
    assert len(set(keys)) == len(keys)
    assert Latency().prepare_key(context) == keys[0]
    assert Latency(mode="measure").prepare_key(context) is None
    assert Latency(mode="measure").prepare(context) == {}
    another = dataclasses.replace(fingerprint(1), model="another processor")
    monkeypatch.setattr(module, "fingerprint", lambda *_: another)
    assert Latency().prepare_key(context) not in keys


@pytest.mark.slow
@pytest.mark.alone
def test_a_small_table_is_measured() -> None:
    table = make_table(SPACE, networks=4, processes=1, settings=QUICK)
    assert set(table.blocks) == {spec.descriptor for spec in SPACE.block_catalogue()}
    assert all(ms > 0 for ms in table.blocks.values())
    assert len(table.fitted) >= 2
    latency, _ = table.predict(SPACE, SPACE.from_json([["skip"] * 3, ["k3_e6"] * 3]))
    assert 0 < latency[0] < latency[1]


def test_measured_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(config: Any, items: Any, **_: Any) -> tuple[list[Timing], dict[str, Any]]:
        if items[0]["genotype"][0] == "bad":
            return [dataclasses.replace(summary([1.0], Settings()), error="cannot run")], {}
        assert (config["name"], items[0]["batch"], items[0]["backend"]) == ("fbnet-tiny", 4, "eager")
        return [summary([1.0, 2.0, 3.0], Settings())], {"device": {"digest": "abc"}}

    monkeypatch.setattr(module, "measured_elsewhere", elsewhere)
    latency = Latency(mode="measure", batch=4)
    good, bad = latency.evaluate(tasks([["skip"] * 3, ["bad"] * 3]), EvaluationContext(space=SPACE))
    assert isinstance(good, Evaluated)
    metric = good.metrics["latency_ms"]
    assert (metric.value, metric.provenance, metric.device, metric.predictor) == (2.0, "measured", "abc", None)
    assert metric.std is not None
    assert metric.std > 0
    assert isinstance(bad, MeasurementError)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"device": "pixel3"}, "device"),
        ({"batch": 0}, "batch"),
        ({"threads": 0}, "threads"),
        ({"mode": "guess"}, "mode"),
        ({"backend": "tvm"}, "backend"),
        ({"repeats": 3}, "repeats"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"evaluators\.(2|latency)\.{field}"):
        EVALUATORS.build({"name": "latency", **arguments}, "evaluators.2")


def test_spaces_without_blocks_are_refused() -> None:
    context = EvaluationContext(space=Choices(columns={"a": [1]}))
    with pytest.raises(InputError, match=r"evaluators\.latency\.mode.*measure"):
        Latency().check(context)
    with pytest.raises(InputError, match=r"space\.name"):
        Latency(mode="measure").check(context)
    Latency().check(EvaluationContext(space=SPACE))


@pytest.mark.slow
@pytest.mark.alone
def test_table_and_measurement_agree() -> None:
    from scipy.stats import spearmanr

    space = FBNetTiny()
    table = make_table(space)
    rng = np.random.default_rng(99)
    population = space.sample(rng, 24)
    # Uniform draws hold few skips; a search ends where they are many.
    population[rng.random(population.shape) < rng.random((24, 1))] = space.blocks.index("skip")
    timings, _ = measured_elsewhere(
        {"name": space.name, **space.config}, [{"genotype": g} for g in space.to_json(population)], threads=1
    )
    measured = np.array([timing.median_ms for timing in timings])
    predicted, _ = table.predict(space, population)
    assert spearmanr(predicted, measured).statistic > 0.9
    # The scale may have shifted with other load on the machine, the shape may not.
    ratio = predicted / measured
    assert np.median(np.abs(ratio / np.median(ratio) - 1)) < 0.15
    assert measured.max() / measured.min() > 3


def test_a_space_from_a_plugin_file_is_measured() -> None:
    source = (
        "from archfront.spaces.fbnet import FBNetTiny\n"
        "class Mine(FBNetTiny):\n"
        "    name = 'mine'\n"
        "ARCHFRONT_PLUGINS = {'spaces': {'mine': Mine}}\n"
    )
    items = [{"genotype": ["skip"] * 12}]
    timings, _ = measured_elsewhere(
        {"name": "mine"}, items, threads=1, settings=QUICK, plugins=[Plugin("mine.py", source)]
    )
    assert timings[0].error is None
    assert timings[0].median_ms > 0
