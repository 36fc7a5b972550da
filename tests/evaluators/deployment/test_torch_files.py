"""Files of torch's own: int8 by PT2E and Inductor, and linear layers in int8 as TorchScript."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.small_models import DATA, bits, data_of
from torch import Tensor, nn

import archfront
from archfront.cli.benching import served_backends
from archfront.errors import MissingExtraError
from archfront.evaluators.compression.compressible import JUDGED_TOGETHER, Compressible
from archfront.evaluators.deployment import torch_int8_files
from archfront.evaluators.deployment.deployed import (
    FILE_BACKENDS,
    AllFloatError,
    Deployment,
    deployed_items,
    int8_layers,
)
from archfront.evaluators.deployment.int8_files import LayerNotFoundError
from archfront.evaluators.deployment.torch_int8_files import nearest_scales, write_pt2e, write_torchscript
from archfront.evaluators.latency.measurement import Settings, measured_elsewhere
from archfront.evaluators.torch_files import export_program, program_runner, runner, torch_call
from archfront.evaluators.training_loop import torch_threads
from archfront.spaces.policies.quantiser import ActivationQuantiser


@pytest.fixture(scope="module", params=["resnet", "vit"])
def network(request: pytest.FixtureRequest) -> Compressible:
    space = bits(request.param, weights=[4, 8, 32], activations="follow", keep={})
    return Compressible(space, data_of(request.param), 64)


def policy_of(network: Compressible, width: int, but: dict[str, int] | None = None) -> Any:
    space: Any = network.space
    return space.variant(space.genotype({s.id: (but or {}).get(s.module or "", width) for s in space.sites}))


def deployment(network: Compressible, policy: Any, folder: Path) -> Deployment:
    with torch_threads(1):
        return Deployment(network, network.prepared(policy), folder, "network")


@pytest.fixture(scope="module")
def eight(network: Compressible, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """All layers at 8 bits; its files are made once."""
    return deployment(network, policy_of(network, 8), tmp_path_factory.mktemp("eight"))


def over(run: Any, batches: list[Tensor]) -> Tensor:
    with torch.no_grad(), torch_threads(1):
        return torch.cat([run(batch) for batch in batches])


def distance(found: Tensor, wanted: Tensor, own: Tensor) -> float:
    return float((found - wanted).norm() / own.norm())


def kernels(run: Any, batch: Tensor) -> Counter[str]:
    """What a call executes, by name."""
    with torch.profiler.profile() as profile:
        run(batch)
    return Counter({event.key: event.count for event in profile.key_averages()})


@pytest.mark.parametrize(("has_vnni", "bound", "codes"), [(True, 0.005, (-128, 127)), (False, 0.1, (-64, 63))])
def test_a_program_computes_what_the_policy_simulates(
    network: Compressible, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_vnni: bool, bound: float, codes: Any
) -> None:
    monkeypatch.setattr(torch_int8_files, "vnni", lambda: has_vnni)
    policy = policy_of(network, 8)
    batches, _ = network.inputs("validation", 100)
    student = network.prepared(policy)
    simulated, own = over(student, batches), over(network.model, batches)
    made = deployment(network, policy, tmp_path)
    path = made.file("torch-static")
    found = over(program_runner(path, "eager", 1), batches)
    # As eager computes it, exactly: weights keep their codes where these have eight bits.
    assert distance(found, simulated, own) < bound
    weights = [t for t in torch.export.load(path).state_dict.values() if t.dtype == torch.int8]
    assert codes[0] <= min(int(t.min()) for t in weights) < codes[0] * 0.8
    assert codes[1] * 0.8 < max(int(t.max()) for t in weights) <= codes[1]
    # With one layer's range an eighth of what it should be, it is another network.
    ranges = int8_layers(student)
    layer = list(ranges)[-2]
    low, high = ranges[layer] or (0.0, 0.0)
    write_pt2e(made._plain, tmp_path / "w.pt2", network.calibration, {**ranges, layer: (low / 8, high / 8)})
    assert distance(over(program_runner(tmp_path / "w.pt2", "eager", 1), batches), simulated, own) > 2 * bound


@pytest.mark.parametrize("low", [-128, -64])
def test_weights_on_a_grid_keep_it(low: int) -> None:
    high = -low - 1
    for width in range(2, 9 if low == -128 else 8):
        rows = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (40, 200)) * torch.rand(40, 1)
        rows[0] = 0
        scale, zero = nearest_scales(rows, low, high)
        again = (rows / scale.unsqueeze(1)).round().clamp(low, high) * scale.unsqueeze(1)
        torch.testing.assert_close(again, rows, rtol=1e-4, atol=1e-6)
        assert not zero.any()


def test_layers_that_the_policy_leaves_in_float_stay_there(
    network: Compressible, eight: Deployment, tmp_path: Path
) -> None:
    space: Any = network.space
    last = space.sites[-1].module
    policy = policy_of(network, 8, {last: 32})
    program = torch.export.load(deployment(network, policy, tmp_path).file("torch-static"))
    codes = {name: tensor for name, tensor in [*program.state_dict.items()] if tensor.dtype == torch.int8}
    assert len(codes) == len(int8_layers(network.prepared(policy))) == len(int8_layers(eight._student)) - 1
    # The float weights of the others have not come along.
    weights = [name for name, t in program.state_dict.items() if t.is_floating_point() and t.dim() in (2, 4)]
    assert weights == [f"{last}.weight"]


def test_four_bits_travel_in_int8(network: Compressible, tmp_path: Path) -> None:
    policy = policy_of(network, 4)
    made = deployment(network, policy, tmp_path)
    batches, _ = network.inputs("validation", 60)
    student = network.prepared(policy)
    simulated = over(student, batches)
    # In the carrier inputs have 256 steps in the range in which the policy has 16.
    for ranges in student.modules():
        if isinstance(ranges, ActivationQuantiser):
            steps = 255 / (2**ranges.bits - 1)
            ranges.bits = 8
            ranges.scale.div_(steps)
            ranges.zero_point.copy_((ranges.zero_point * steps).round())
    finer = over(student, batches)
    carried = over(program_runner(made.file("torch-static"), "eager", 1), batches)
    assert (carried - finer).norm() < 0.05 * (simulated - finer).norm()


def test_inductor_gets_int8_operators_whatever_it_compiles_anew_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batch, wanted = torch.randn(64, 16), {"0": (-4.0, 4.0), "2": (0.0, 3.0)}
    path = tmp_path / "m.pt2"
    write_pt2e(model, path, [batch], dict(wanted))
    eager, compiled = program_runner(path, "eager", 1), program_runner(path, "inductor", 1)
    for count, threads in ((64, 2), (1, 2), (1, 1)):
        with torch_threads(threads):
            torch.testing.assert_close(compiled(batch[:count]), eager(batch[:count]), rtol=0.02, atol=0.02)
            assert kernels(compiled, batch[:count])["onednn::qlinear_pointwise"] == 2


@pytest.mark.slow
def test_int8_kernels_run(network: Compressible, eight: Deployment) -> None:
    path = eight.file("torch-static")
    batches, _ = network.inputs("validation", 100)
    own, exact = over(network.model, batches), over(program_runner(path, "eager", 1), batches)
    run = program_runner(path, "inductor", 1, batch=100)
    # Where sums saturated, for want of VNNI, this would be far off.
    assert distance(over(run, batches), exact, own) < 0.01
    torch.testing.assert_close(over(run, [batches[0][:7]]), over(run, batches)[:7])
    layers = [eight._plain.get_submodule(name) for name in int8_layers(eight._student)]
    with torch_threads(1):
        found = kernels(run, batches[0])
    assert found["onednn::qconv_pointwise"] == sum(isinstance(layer, nn.Conv2d) for layer in layers)
    assert found["onednn::qlinear_pointwise"] == sum(isinstance(layer, nn.Linear) for layer in layers)
    assert not found["aten::convolution"] + found["aten::addmm"] + found["mkl::_mkl_linear"]


@pytest.mark.slow
def test_one_program_is_measured_and_judged_at_every_batch_size(network: Compressible, tmp_path: Path) -> None:
    space: Any = network.space
    genotype = space.genotype({site.id: 8 for site in space.sites})
    items: list[dict[str, Any]] = [{"genotype": genotype, "backend": "pt2e", "batch": batch} for batch in (1, 8)]
    items.append({"untouched": True, "backend": "compile", "batch": 1})
    with torch_threads(1):
        to_measure, facts = deployed_items(network, items, tmp_path, 1)
    assert to_measure[0]["file"] == to_measure[1]["file"]
    assert facts[0]["accuracy_drop"] < 3
    assert facts[0]["int8_layers"] == len(space.sites)
    timings, _ = measured_elsewhere(
        {"name": "bits", **space.config}, to_measure, threads=1, settings=Settings(rounds=3), timeout_s=400
    )
    assert [timing.error for timing in timings] == [None] * 3


def test_without_torchao_pt2e_says_what_to_install(
    network: Compressible, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer", None)
    with pytest.raises(MissingExtraError, match=r"archfront\[pt2e\]"):
        deployment(network, policy_of(network, 8), tmp_path).file("torch-static")
    found = importlib.util.find_spec
    assert {"pt2e", "torch-int8-dynamic"} <= set(served_backends(policies=True))
    assert not {"pt2e", "torch-int8-dynamic"} & set(served_backends(policies=False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    assert "pt2e" not in served_backends(policies=True)


def test_what_torchao_says_when_it_is_imported_reaches_nobody() -> None:
    program = "from archfront.evaluators.torch_files import x86_quantiser; x86_quantiser()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_layer_that_is_not_quantised_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.Conv2d(3, 3, 2)).eval()
    with pytest.raises(LayerNotFoundError, match="'0'"):
        write_pt2e(model, tmp_path / "m.pt2", [torch.randn(4, 3, 6, 6)], {"0": None, "1": None})


@pytest.fixture(scope="module")
def vit() -> Compressible:
    return Compressible(bits("vit", weights=[8, 32], activations="follow", keep={}), data_of("vit"), 64)


def test_linear_layers_are_in_int8_by_torch_alone(vit: Compressible, tmp_path: Path, caplog: Any) -> None:
    last = vit.space.sites[-1].module
    policy = policy_of(vit, 8, {last: 32})
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        made = deployment(vit, policy, tmp_path)
        path = made.file("torch-dynamic")
        run = runner(path, "torchscript", 1)
    assert not caplog.records
    batches, _ = vit.inputs("validation", 100)
    simulated, own = over(vit.prepared(policy), batches), over(vit.model, batches)
    found = over(run, batches)
    assert distance(found, simulated, own) < 0.05
    linear = sum(isinstance(layer, nn.Linear) for layer in vit.model.modules())
    for count in (1, 8):
        assert kernels(run, batches[0][:count])["quantized::linear_dynamic"] == linear - 1
    facts = made.facts(FILE_BACKENDS["torch-int8-dynamic"], 1)
    assert facts["int8_layers"] == linear - 1
    assert facts["file_bytes"] == path.stat().st_size
    # In the batches that files are judged by: each has ranges of its own.
    batches, labels = vit.inputs("test", batch=JUDGED_TOGETHER)
    right = 100 * float((over(run, batches).argmax(-1) == labels).double().mean())
    assert facts["test_accuracy"] == pytest.approx(right)


def test_linear_layers_in_int8_are_measured(vit: Compressible, tmp_path: Path) -> None:
    space: Any = vit.space
    genotypes = [space.genotype({site.id: width for site in space.sites}) for width in (8, 32)]
    items: list[dict[str, Any]] = [{"genotype": g, "backend": "torch-int8-dynamic", "batch": 2} for g in genotypes]
    with torch_threads(1):
        to_measure, _ = deployed_items(vit, items, tmp_path, 1)
    timings, _ = measured_elsewhere(
        {"name": "bits", **space.config}, to_measure, threads=1, settings=Settings(rounds=3), timeout_s=120
    )
    assert timings[0].error is None
    assert "no linear layer of 8 bits or fewer" in str(timings[1].error)


def test_policies_without_linear_layers_in_int8_are_refused(tmp_path: Path) -> None:
    network = Compressible(bits("resnet", weights=[8, 32], activations="follow", keep={}), data_of("resnet"), 64)
    last: Any = network.space.sites[-1].module
    made = deployment(network, policy_of(network, 8, {last: 32}), tmp_path)
    for form in ("dynamic-onnxruntime", "torch-dynamic"):
        with pytest.raises(AllFloatError, match="no linear layer of 8 bits or fewer"):
            made.file(form)  # type: ignore[arg-type]


def test_linear_layers_of_other_classes_are_named(tmp_path: Path) -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4)).eval()
    with pytest.raises(LayerNotFoundError, match="'1'"):
        write_torchscript(model, tmp_path / "m.pt", torch.randn(2, 4), ["0", "1"])


def test_a_network_whose_trace_serves_one_batch_size_is_refused(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * float(len(x))  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="something else for a batch of 3"):
        write_torchscript(Counting().eval(), tmp_path / "m.pt", torch.randn(2, 4), ["inner"])


def test_tokens_are_drawn_for_networks_that_take_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3)).eval()
    path = tmp_path / "m.pt2"
    export_program(model, torch.zeros(1, 6, dtype=torch.int64), path, any_batch=True)
    found = torch_call(path, "eager", 5, [6], 1, "int64")()
    assert isinstance(found, Tensor)
    assert found.shape == (5, 6, 3)
    with pytest.raises(ValueError, match="known: eager, inductor"):
        program_runner(path, "quickly", 1)


@pytest.mark.slow
def test_only_so_many_finalists_are_compiled(tmp_path: Path) -> None:
    spec = {
        "name": "bits", "space": {"name": "bits", **bits("vit", weights=[8], activations="follow").config},
        "data": DATA, "evaluators": [{"name": "compression", "calibration": 64}],
        "objectives": [{"metric": "accuracy", "direction": "max"}], "strategy": {"name": "random"},
        "budget": {"evaluations": 1}, "workers": {"executor": "inline"},
        "finalists": {"count": 1, "backends": ["eager", "pt2e"], "compiled": 0},
    }  # fmt: skip
    job = archfront.run(spec, db=str(tmp_path / "l.db"))
    measured = [row["settings"]["backend"] for row in job.ledger.benchmarks(job.id) if row["kind"] == "latency"]
    assert measured == ["eager"]
