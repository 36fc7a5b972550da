"""Predicting what policies take as files, from the times of a network's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.small_models import bits

from archfront.errors import InputError
from archfront.evaluators.deployment.int8_files import file_layers, write_static
from archfront.evaluators.deployment.layer_times import LayerNode, attributed, layer_times
from archfront.evaluators.deployment.policy_latency import int8_mask, policy_latency
from archfront.evaluators.deployment.processor_rates import floor_ms, processor_rates
from archfront.evaluators.evaluator import EvaluationContext, Task
from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.evaluator import Latency
from archfront.evaluators.latency.measurement import Settings
from archfront.evaluators.latency.predictors import layers as layers_module
from archfront.evaluators.latency.predictors.layers import LayerLatency, LayerPrice
from archfront.evaluators.latency.predictors.ridge import ridge
from archfront.evaluators.onnx_files import drawn_feed, export_onnx
from archfront.spaces.fbnet import FBNetTiny

QUICK = Settings(rounds=5, sample_ms=0.2, warmup_ms=1, warmup_limit_ms=10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_layer_of_a_file_is_told_apart(kind: str, *, channels_last: bool, tmp_path: Path) -> None:
    space = bits(kind, weights=[8, 32], activations="follow", keep={})
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    example = space.source.example(2)
    export_onnx(space.source.build().eval(), example, source, any_batch=True)
    paths = [layer.path for layer in space.layers.found]
    layers = file_layers(source, paths)
    assert [layer.path for layer in layers] == paths
    chosen = paths[1:4]
    write_static(source, target, [example.numpy()], dict.fromkeys(chosen), channels_last=channels_last)
    feed = drawn_feed(source, 1, list(example.shape[1:]))
    for file, expected in ((source, []), (target, chosen)):
        *found, rest = layer_times(file, layers, feed, 1, runs=3)
        assert sorted(row["layer"] for row in found) == sorted(paths)
        assert {row["layer"] for row in found if row["int8"]} == set(expected)
        macs = {layer.path: layer.macs for layer in space.layers.found}
        assert {row["layer"]: row["macs"] for row in found} == macs
        assert all(row["ms"] > 0 and row["bytes"] > row["elements"] for row in found)
        assert rest["layer"] == ""
        assert rest["ms"] > 0


def event(name: str, operator: str, duration: float, output: list[int]) -> dict[str, Any]:
    args = {"op_name": operator, "input_type_shape": [{"float": output}], "output_type_shape": [{"float": output}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": args}


def test_convolutions_are_told_by_their_order_and_products_by_name() -> None:
    layers = [LayerNode("a", "node_1", True, 90, 10), LayerNode("b", "node_2", True, 90, 10),
              LayerNode("head", "node_3", False, 40, 4)]  # fmt: skip
    events = [
        event("relu_nchwc", "Conv", 100.0, [1, 10, 2, 2]), event("node_2_token_7", "QLinearConv", 50.0, [1, 10, 2, 2]),
        event("scores", "MatMul", 7.0, [1, 4, 4]), event("node_3_quant", "DynamicQuantizeMatMul", 20.0, [1, 4]),
    ]  # fmt: skip
    *found, rest = attributed(events, layers)
    assert [(row.layer, row.kernel, row.ms, row.int8) for row in found] == [
        ("a", "Conv", 0.1, False),
        ("b", "QLinearConv", 0.05, True),
        ("head", "DynamicQuantizeMatMul", 0.02, True),
    ]
    assert [row.macs for row in found] == [40 * 9, 40 * 9, 4 * 10]
    assert found[1].bytes == 4 * 80 + 90
    assert rest.ms == pytest.approx(0.007)
    # With a convolution gone, fused into another say, order tells nothing.
    *found, rest = attributed(events[1:], layers)
    assert [row.layer for row in found] == ["head"]
    assert rest.ms == pytest.approx(0.057)


def truth(masks: np.ndarray) -> np.ndarray:
    """Layers gain what the table says, and each change of type costs 50 microseconds."""
    return (
        1.0
        + 0.8 * (masks @ [0.3, 0.2, 0.1, 0.4] + (~masks) @ [1.0, 0.6, 0.3, 0.9])
        + 0.05 * np.abs(np.diff(masks.astype(int), axis=1)).sum(axis=1)
    )


def table() -> LayerLatency:
    ms = [(1.0, 0.3), (0.6, 0.2), (0.3, 0.1), (0.9, 0.4)]
    prices = [LayerPrice(layer=str(i), float_ms=f, int8_ms=q, elements=1000) for i, (f, q) in enumerate(ms)]
    return LayerLatency(prices, (0.2, 0.2), {"digest": "here"})


def test_what_lies_between_layers_is_learnt() -> None:
    rng = np.random.default_rng(0)
    seen, unseen = rng.random((14, 4)) < 0.5, rng.random((40, 4)) < 0.5
    predictor = table().fit(seen, truth(seen))
    found = predictor.predict(unseen)
    assert np.abs(found.ms / truth(unseen) - 1).max() < 0.02
    assert ((found.low_ms <= truth(unseen)) & (truth(unseen) <= found.high_ms)).mean() > 0.8
    again = LayerLatency.from_json(predictor.to_json())
    assert again.digest == predictor.digest != table().digest
    assert np.array_equal(again.predict(unseen).ms, found.ms)
    with pytest.raises(InputError, match=r"latency.calibration"):
        table().fit(seen[:5], truth(seen[:5]))
    with pytest.raises(InputError, match=r"latency.predictor"):
        LayerLatency.from_json({"format": "another"})


def test_what_the_profiler_does_not_tell_is_learnt_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer gains less than its times say, and one change of type costs more than the others."""

    def surprising(masks: np.ndarray) -> np.ndarray:
        changes = np.diff(masks.astype(int), axis=1) != 0
        return np.asarray(truth(masks) + 0.3 * masks[:, 2] + 0.2 * changes[:, 1])

    rng = np.random.default_rng(1)
    seen, unseen = rng.random((40, 4)) < 0.5, rng.random((40, 4)) < 0.5
    measured = surprising(seen) * rng.normal(1, 0.01, 40)

    def errors() -> np.ndarray:
        return np.abs(table().fit(seen, measured).predict(unseen).ms / surprising(unseen) - 1)

    assert errors().max() < 0.02
    monkeypatch.setattr(layers_module, "ridge", lambda features, _: np.zeros(features.shape[1]))
    assert errors().max() > 0.06


def test_ridge_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(60, 8))
    coefficients = np.array([1.0, -2.0, 0, 0, 0, 0.5, 0, 0])
    found = ridge(features, features @ coefficients + rng.normal(0, 0.05, 60))
    assert found == pytest.approx(coefficients, abs=0.05)
    # A sum of many small effects is told from noise; noise is not told from nothing.
    noise = [ridge(features, rng.normal(size=60)) for _ in range(20)]
    assert np.median([np.abs(one).max() for one in noise]) < 0.1
    assert not ridge(np.zeros((6, 3)), np.ones(6)).any()


def test_policies_are_predicted_by_what_int8_carries() -> None:
    space = bits("resnet", weights=[4, 8, 32], activations="follow", keep={})
    latency = Latency(mode="layers", backend="onnx-int8")
    artifact = policy_latency(space, fingerprint(1).to_json(), networks=8, settings=QUICK).to_json()
    context = EvaluationContext(space=space, artifacts={"latency": artifact})
    policies = [space.genotype({s.id: width for s in space.sites}) for width in (4, 8, 32)]
    tasks = [
        Task(number=i, genotype=g, key=str(i), fidelity=1, repeat=0, seed=0) for i, g in enumerate(policies)
    ]  # fmt: skip
    four, eight, plain = (one.metrics["latency_ms"] for one in latency.evaluate(tasks, context))  # type: ignore[union-attr]
    assert four.value == eight.value  # four bits travel in eight
    assert four.value != plain.value > 0
    assert four.provenance == "predicted"
    assert str(four.predictor).startswith("layers:")
    predictor = LayerLatency.from_json(artifact)
    paths = [price.layer for price in predictor.layers]
    assert paths == [layer.path for layer in space.layers.found]
    assert int8_mask(space, paths, policies).tolist() == [[True] * len(paths)] * 2 + [[False] * len(paths)]
    assert all(price.float_ms > 0 and price.int8_ms > 0 for price in predictor.layers)


def test_what_has_no_times_of_layers_is_refused() -> None:
    with pytest.raises(InputError, match=r"evaluators.latency.backend.*'eager'.*layers"):
        Latency(mode="layers")
    with pytest.raises(InputError, match=r"evaluators.latency.backend.*'onnx-int8'.*operators"):
        Latency(mode="operators", backend="onnx-int8")
    with pytest.raises(InputError, match=r"evaluators.latency.verify.*layers"):
        Latency(mode="layers", backend="onnx-int8", verify=0.1)
    latency = Latency(mode="layers", backend="onnx-int8")
    with pytest.raises(InputError, match=r"does not serve fbnet-tiny"):
        latency.check(EvaluationContext(space=FBNetTiny(layers=3)))
    space = bits("resnet", weights=[8, 32], activations="float", keep={})
    with pytest.raises(InputError, match=r"space.activations.*follow"):
        policy_latency(space, {}, networks=8, settings=QUICK)


def test_floors_are_of_arithmetic_or_of_bytes() -> None:
    rates = {"float32": 1e9, "int8": 4e9, "bytes": 2e9}
    assert floor_ms(1e6, 0, rates, int8=False) == pytest.approx(1.0)
    assert floor_ms(1e6, 0, rates, int8=True) == pytest.approx(0.25)
    assert floor_ms(1e6, 4e6, rates, int8=True) == pytest.approx(2.0)
    found = processor_rates(1)
    assert found.keys() == rates.keys()
    assert all(rate > 1e8 for rate in found.values())
