"""The report's layers of a finalist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from archfront.evaluators.latency.predictors.layers import LayerLatency, LayerPrice
from archfront.report.facts import Finalist
from archfront.report.layers import layer_table
from archfront.spaces.space import Layer

RATES = {"float32": 1e9, "int8": 4e9, "bytes": 1e12}


def measured(backend: str, median: float, layers: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    environment = {"rates": RATES, "device": {"digest": "here"}}
    return {"backend": backend, "batch": 1}, {"median_ms": median, "layers": layers, "environment": environment}


def row(layer: str, kernel: str, ms: float, int8: bool = False) -> dict[str, Any]:
    return {"layer": layer, "kernel": kernel, "ms": ms, "macs": 10**6, "bytes": 1000, "elements": 500, "int8": int8}


def job(prices: list[LayerPrice]) -> Any:
    predictor = LayerLatency(prices, (0.1, 0.1), {"digest": "here"})

    def artifacts(kind: str, prefix: str) -> list[dict[str, Any]]:
        return [predictor.to_json()] if kind == "latency" and prefix.endswith(":here:space:") else []

    return SimpleNamespace(ledger=SimpleNamespace(artifacts=artifacts))


def space() -> Any:
    layers = [Layer(name="a", kind="W8 A8", shape=()), Layer(name="b", kind="W32 A32", shape=())]
    return SimpleNamespace(digest="space", describe=lambda _: layers)


def test_the_fastest_measurement_is_told_layer_by_layer() -> None:
    slow = measured("onnx", 2.0, [row("a", "Conv", 1.1), row("b", "Conv", 0.9)])
    rest = {**row("", "", 0.2), "macs": 0}
    fast = measured("onnx-int8", 1.0, [row("a", "QLinearConv", 0.4, int8=True), row("b", "Conv", 1.2), rest])
    blind = measured("openvino", 0.5, [])
    finalist = Finalist(row={"genotype": None}, timings=[slow, fast, blind])
    prices = [LayerPrice(layer=name, float_ms=1.0, int8_ms=0.3, elements=500) for name in "ab"]
    found = layer_table(job(prices), space(), finalist)
    assert found is not None
    backend, [a, b, between] = found
    assert backend == "onnx-int8"
    assert (a.choice, a.kernel, a.predicted_ms, a.measured_ms) == ("W8 A8", "QLinearConv", 0.3, 0.4)
    assert (b.choice, b.kernel, b.predicted_ms, b.measured_ms) == ("W32 A32", "Conv", 1.0, 1.2)
    assert (a.floor_ms, a.ceiling) == (pytest.approx(0.25), pytest.approx(4.0))
    assert (b.floor_ms, b.ceiling) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (between.layer, between.measured_ms, between.floor_ms, between.predicted_ms) == ("", 0.2, None, None)


def test_kernels_of_a_gpu_are_told_as_they_were_chosen() -> None:
    choices = [
        {"path": "a", "kernel": "int8", "kernel_ms": 0.1, "dense_ms": 0.2, "reason": "faster", "exact": True},
        {"path": "b", "kernel": "dense", "kernel_ms": 0.5, "dense_ms": 0.3, "reason": "slower", "exact": None},
    ]
    finalist = Finalist(row={"genotype": None}, timings=[measured("triton", 1.0, choices)])
    found = layer_table(job([]), space(), finalist)
    assert found is not None
    assert [(r.layer, r.kernel, r.measured_ms) for r in found[1]] == [("a", "int8", 0.1), ("b", "dense", 0.3)]
    assert layer_table(job([]), space(), Finalist(row={"genotype": None}, timings=[])) is None
