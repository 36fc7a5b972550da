"""Networks as files: what a policy says is what the file computes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.support.small_models import bits, data_of

from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.deployment.deployed import FILE_BACKENDS, Deployment, deployed_items, int8_layers
from archfront.evaluators.deployment.int8_files import LayerNotFoundError, write_static
from archfront.evaluators.deployment.layer_times import NO_LAYER
from archfront.evaluators.latency.measurement import Settings, measured_elsewhere
from archfront.evaluators.onnx_files import export_onnx, outputs
from archfront.evaluators.training_loop import torch_threads


@pytest.fixture(scope="module", params=["resnet", "vit"])
def network(request: pytest.FixtureRequest) -> Compressible:
    space = bits(request.param, weights=[4, 8, 32], activations="follow", keep={})
    return Compressible(space, data_of(request.param), 64)


def policy_of(network: Compressible, width: int, but: dict[str, int] | None = None) -> Any:
    space: Any = network.space
    widths = {s.id: (but or {}).get(s.module or "", width) for s in space.sites}
    return space.variant(space.genotype(widths))


def deployment(network: Compressible, policy: Any, folder: Path) -> Deployment:
    with torch_threads(1):
        return Deployment(network, network.prepared(policy), folder, "network")


@pytest.fixture(scope="module")
def eight(network: Compressible, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """All layers at 8 bits; its files are made once. OpenVINO 2026.4 gets int8 convolutions of a single input channel
    wrong, which every file's own accuracy shows, so the patch embedding stays in float."""
    return deployment(network, policy_of(network, 8, {"patch_embed.proj": 32}), tmp_path_factory.mktemp("eight"))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def test_a_static_file_computes_what_the_policy_simulates(network: Compressible, eight: Deployment) -> None:
    policy = policy_of(network, 8, {"patch_embed.proj": 32})
    path = eight.file("static")
    batches, _ = network.inputs("validation", 100)
    with torch.no_grad():
        simulated = torch.cat([network.prepared(policy)(batch) for batch in batches])
        own = torch.cat([network.model(batch) for batch in batches])
    found = outputs(path, "onnx", batches, 1)
    # Sums between layers are in int8 too, which the simulation leaves in float: of the same size as what 8 bits do.
    assert float((found - simulated).norm() / own.norm()) < 0.06
    assert float((found.argmax(-1) == own.argmax(-1)).double().mean()) > 0.95
    counts = operators(path)
    layers = len(int8_layers(network.prepared(policy)))
    assert counts["QuantizeLinear"] >= 1
    # The weights of every layer, and its bias, are stored as codes.
    assert counts["DequantizeLinear"] >= 2 * layers


def test_layers_that_the_policy_leaves_in_float_stay_there(
    network: Compressible, eight: Deployment, tmp_path: Path
) -> None:
    space: Any = network.space
    last = space.sites[-1].module
    but_one = policy_of(network, 8, {"patch_embed.proj": 32, last: 32})
    some = deployment(network, but_one, tmp_path).file("static")
    left = len(int8_layers(network.prepared(but_one)))
    weights = [
        sum(
            w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1 and not w.name.startswith(NO_LAYER)
            for w in onnx.load(str(path)).graph.initializer
        )
        for path in (eight.file("static"), some)
    ]
    assert weights[1] == left < weights[0]


def test_four_bits_travel_in_int8_without_another_loss(network: Compressible, tmp_path: Path) -> None:
    policy = policy_of(network, 4)
    made = deployment(network, policy, tmp_path)
    path = made.file("float")
    batches, _ = network.inputs("validation", 60)
    student = network.prepared(policy)
    with torch.no_grad():
        weights_alone = torch.cat([made._plain(batch) for batch in batches])
        simulated = torch.cat([student(batch) for batch in batches])
    np.testing.assert_allclose(outputs(path, "onnx", batches, 1), weights_alone, rtol=1e-3, atol=1e-3)
    # Inputs have 256 steps in the carrier where the policy has 16: nearer to the weights alone than the simulation is.
    carried = outputs(made.file("static"), "onnx", batches, 1)
    assert (carried - weights_alone).norm() < (simulated - weights_alone).norm()


def test_a_dynamic_file_has_its_linear_layers_in_int8(tmp_path: Path) -> None:
    network = Compressible(bits("vit", weights=[8, 32], activations="follow", keep={}), data_of("vit"), 64)
    policy = policy_of(network, 8)
    path = deployment(network, policy, tmp_path).file("dynamic-onnxruntime")
    linear = sum(isinstance(layer, torch.nn.Linear) for layer in network.model.modules())
    assert operators(path)["MatMulInteger"] == linear
    batches, _ = network.inputs("validation", 60)
    with torch.no_grad():
        own = torch.cat([network.model(batch) for batch in batches])
    assert float((outputs(path, "onnx", batches, 1) - own).norm() / own.norm()) < 0.1


def test_openvino_computes_the_same(network: Compressible, eight: Deployment) -> None:
    batches, _ = network.inputs("validation", 40)
    float_file, int8_file = eight.file("float"), eight.file("static")
    for path, bound in ((float_file, 1e-4), (int8_file, 0.05)):
        by_onnx, by_openvino = (outputs(path, runtime, batches, 1) for runtime in ("onnx", "openvino"))
        assert float((by_onnx - by_openvino).norm() / by_onnx.norm()) < bound


def test_facts_of_a_file_are_those_of_its_outputs(network: Compressible, eight: Deployment) -> None:
    facts = eight.facts(FILE_BACKENDS["onnx-int8"], 1)
    batches, labels = network.inputs("test")
    found = outputs(eight.file("static-onnxruntime"), "onnx", batches, 1)
    right = 100 * float((found.argmax(-1) == labels).double().mean())
    assert facts["test_accuracy"] == pytest.approx(right)
    assert facts["file_bytes"] == eight.file("static-onnxruntime").stat().st_size
    assert eight.facts(FILE_BACKENDS["onnx"], 1)["int8_layers"] == 0 < facts["int8_layers"]


def test_the_network_itself_and_what_fails_are_measured_beside_the_rest(network: Compressible, tmp_path: Path) -> None:
    space: Any = network.space
    genotypes = [space.genotype({site.id: width for site in space.sites}) for width in (8, 32)]
    items: list[dict[str, Any]] = [{"genotype": g, "backend": "onnx-int8"} for g in genotypes]
    items += [{"untouched": True, "backend": backend, "batch": 2} for backend in ("onnx", "eager")]
    with torch_threads(1):
        to_measure, facts = deployed_items(network, items, tmp_path, 1)
    assert to_measure[1]["problem"].startswith("not run: the policy has no layer of 8 bits")
    assert facts[0]["int8_layers"] > 0
    assert not facts[1]
    assert facts[2]["accuracy_drop"] == pytest.approx(0, abs=1)
    timings, _ = measured_elsewhere(
        {"name": "bits", **space.config}, to_measure, threads=1, settings=Settings(rounds=3), timeout_s=120
    )
    assert [timing.error is None for timing in timings] == [True, False, True, True]


def test_a_file_needs_nothing_but_onnx_runtime(network: Compressible, eight: Deployment, tmp_path: Path) -> None:
    path = eight.file("static-onnxruntime")
    batches, _ = network.inputs("test", 50)
    np.savez(tmp_path / "samples.npz", images=torch.cat(batches).numpy())
    program = (
        "import sys, numpy, onnxruntime\n"
        f"images = numpy.load({str(tmp_path / 'samples.npz')!r})['images']\n"
        f"session = onnxruntime.InferenceSession({str(path)!r}, providers=['CPUExecutionProvider'])\n"
        "found = session.run(None, {session.get_inputs()[0].name: images})[0]\n"
        f"numpy.save({str(tmp_path / 'found.npy')!r}, found)\n"
        "assert not {'torch', 'archfront'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), outputs(path, "onnx", batches, 1), rtol=1e-4, atol=1e-4)


def test_a_layer_without_an_operator_is_named(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    export_onnx(model, torch.zeros(1, 4), tmp_path / "m.onnx", any_batch=True)
    with pytest.raises(LayerNotFoundError, match="'gone'"):
        write_static(tmp_path / "m.onnx", tmp_path / "q.onnx", [np.zeros((1, 4), np.float32)], {"gone": None})
