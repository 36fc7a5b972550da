"""Kernels layer by layer: the policy's own values, taken only where they are faster, and judged as they run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.support.small_models import bits, data_of
from torch import nn

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible, judged_outputs
from archfront.evaluators.deployment import kernel_layers
from archfront.evaluators.deployment.deployed import deployed_items
from archfront.evaluators.deployment.half_precision import in_half
from archfront.evaluators.deployment.kernel_layers import (
    Candidate,
    LayerChoice,
    LayerPlan,
    candidates,
    choose,
    layer_plans,
    with_kernels,
)
from archfront.evaluators.deployment.kernel_run import student_call
from archfront.evaluators.deployment.student_files import recorded
from archfront.evaluators.latency import measure_process
from archfront.evaluators.latency.measurement import Settings, Timing, failed
from archfront.evaluators.training_loop import torch_threads
from archfront.kernels.modules.low_bit_linear import Int8Linear, WeightOnlyLinear
from archfront.kernels.packing import unpack
from archfront.search.worker import Worker, WorkerSetup
from archfront.spaces.policies.quantised import LayerBits, bake, quantise, without_input_quantisers
from archfront.spaces.policies.quantiser import Quantiser

Time = Callable[[Sequence[Callable[[], object]]], list[Timing]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def network() -> Compressible:
    return Compressible(bits("vit", weights=[2, 3, 4, 5, 8, 32], keep={}), data_of("vit"), 64)


def student_of(network: Compressible, width: int, but: dict[str, int] | None = None) -> nn.Module:
    return copy.deepcopy(network.prepared(network.space.variant(genotype_of(network, width, but))))


def genotype_of(network: Compressible, width: int, but: dict[str, int] | None = None) -> Any:
    return network.space.genotype({s.id: (but or {}).get(s.module or "", width) for s in network.space.sites})


def dense_of(student: nn.Module) -> nn.Module:
    return bake(without_input_quantisers(copy.deepcopy(student))).eval()


def timed(*ms: float) -> Time:
    """A clock that gives the dense layer the first time, and candidates the others in turn, the last to the rest."""

    def time(calls: Sequence[Callable[[], object]]) -> list[Timing]:
        for call in calls:
            call()
        chosen = [*ms, *[ms[-1]] * len(calls)][: len(calls)]
        return [replace(failed(""), error=None, median_ms=t, low_ms=0.9 * t, high_ms=1.1 * t) for t in chosen]

    return time


FASTER, SLOWER = timed(2.0, 1.0), timed(1.0, 2.0)


def linear(bits: int, inputs: int = 64, **options: Any) -> tuple[nn.Linear, LayerPlan]:
    """A dense layer of quantised weights, and what is behind them."""
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Linear(inputs, 24))
    widths = {"0": LayerBits(weights=bits, activations=options.pop("activations", 8))}
    quantise(model, widths, lambda width: Quantiser(bits=width, **options))
    plan = layer_plans(model)["0"]
    layer = dense_of(model)[0]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    return layer, plan


def made(layer: nn.Linear, plan: LayerPlan) -> dict[str, Candidate]:
    return {candidate.kernel: candidate for candidate in candidates(layer, plan)[0]}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "container"), [(2, 2), (3, 3), (4, 4), (5, 8), (8, 8)])
def test_packed_weights_are_the_policys_own_to_the_bit(width: int, container: int, symmetric: bool) -> None:
    for options in ({"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "group", "group": 32}):
        layer, plan = linear(width, symmetric=symmetric, **options)
        candidate = made(layer, plan)[f"weight-only-{container}"]
        module = candidate.module
        assert isinstance(module, WeightOnlyLinear)
        assert candidate.exact
        assert torch.equal(unpack(module.packed, container, 64, signed=module.zero is None), plan.codes)  # type: ignore[arg-type]
        assert torch.equal(module.dequantised(torch.float32), layer.weight)


@pytest.mark.parametrize(("width", "symmetric"), [(2, True), (4, True), (8, True), (4, False), (7, False)])
def test_int8_weights_are_the_policys_own_to_the_bit(width: int, symmetric: bool) -> None:
    layer, plan = linear(width, symmetric=symmetric)
    module = made(layer, plan)["int8"].module
    assert isinstance(module, Int8Linear)
    assert torch.equal(module.weight.float() * module.scale[:, None], layer.weight)
    assert torch.equal(module.bias, layer.bias)  # type: ignore[arg-type]


def test_rounded_scales_are_said_to_be() -> None:
    for scale_type, exact in (("float32", False), ("float16", True)):
        layer, plan = linear(4, scale_type=scale_type)
        found = made(layer.half(), plan)
        assert found["weight-only-4"].exact == exact
        assert found["int8"].exact  # its scales stay float32
    layer, plan = linear(4)
    [choice] = choose(nn.Sequential(layer.half()), {"0": plan}, torch.randn(3, 64).half(), time=timed(2.0, 3.0, 1.0))
    assert (choice.kernel, choice.exact) == ("weight-only-4", False)
    assert "scales are rounded" in choice.reason


def test_what_is_faster_replaces_every_layer_and_computes_what_the_policy_simulates(network: Compressible) -> None:
    batches, _ = network.inputs("validation", 100)
    for width, inputs, first in ((8, 8, "int8"), (4, 32, "weight-only-4"), (3, 32, "weight-only-3")):
        student = student_of(network, width)
        if inputs == 32:
            without_input_quantisers(student)
        plans = layer_plans(student)
        choices = choose(dense_of(student), plans, batches[0][:8], time=FASTER)
        kernels = {choice.path: choice.kernel for choice in choices}
        assert kernels.pop("patch_embed.proj") == "dense"
        assert set(kernels.values()) == {first}
        model = with_kernels(dense_of(student), plans, choices)
        assert not any(type(layer) is nn.Linear for layer in model.modules())
        with torch.no_grad():
            wanted = torch.cat([student(batch) for batch in batches])
            off = float((torch.cat([model(batch) for batch in batches]) - wanted).norm() / wanted.norm())
            # Eight bits of each row against eight of all rows; weights alone differ by rounding.
            assert off < (0.03 if first == "int8" else 1e-5)
            kernel: Any = model.get_submodule("blocks.0.mlp.fc1")
            kernel.scale = kernel.scale * 1.5
            broken = float((torch.cat([model(batch) for batch in batches]) - wanted).norm() / wanted.norm())
        assert broken > 5 * off
        assert broken > 0.05


def test_what_is_slower_or_uncertain_leaves_the_network_as_it_is(network: Compressible) -> None:
    student = student_of(network, 8)
    dense, plans, x = dense_of(student), layer_plans(student), network.inputs("validation", 20)[0][0]
    # 1.1 * 1.0 lies above 0.9 * 1.2: the intervals overlap.
    for time in (SLOWER, timed(1.2, 1.0)):
        choices = choose(dense, plans, x, time=time)
        assert {choice.kernel for choice in choices} == {"dense"}
        assert all("is not faster" in choice.reason for choice in choices if choice.path != "patch_embed.proj")
        model = with_kernels(copy.deepcopy(dense), plans, choices)
        with torch.no_grad():
            assert torch.equal(model(x), dense(x))
    timing = next(choice for choice in choices if choice.path == "blocks.0.mlp.fc1")
    assert (timing.kernel_ms, timing.dense_ms) == (1.0, 1.2)


def test_each_layer_gets_what_is_fastest_for_it(network: Compressible) -> None:
    student = student_of(network, 4, {"blocks.1.mlp.fc2": 32})
    dense, plans, x = dense_of(student), layer_plans(student), network.inputs("validation", 20)[0][0]
    times = iter([timed(3.0, 2.0, 1.0), timed(3.0, 1.0, 2.0)])

    def time(calls: Sequence[Callable[[], object]]) -> list[Timing]:
        return next(times, SLOWER)(calls)

    found = {choice.path: choice for choice in choose(dense, plans, x, time=time)}
    assert found["blocks.0.attn.qkv"].kernel == "weight-only-4"
    assert found["blocks.0.attn.proj"].kernel == "int8"
    assert found["blocks.0.mlp.fc1"].kernel == "dense"
    # Of layers alike one is timed.
    assert found["blocks.1.attn.qkv"].kernel == "weight-only-4"
    assert found["blocks.1.mlp.fc2"].reason == "the policy leaves its weights in float"
    model = with_kernels(copy.deepcopy(dense), plans, list(found.values()))
    assert torch.equal(model.get_submodule("blocks.0.mlp.fc1").weight, dense.get_submodule("blocks.0.mlp.fc1").weight)  # type: ignore[arg-type]
    assert isinstance(model.get_submodule("blocks.0.attn.proj"), Int8Linear)


@pytest.mark.parametrize(
    ("layer", "refused"),
    [
        (linear(8, activations=32), {"int8": "reads 32 bits"}),
        (linear(4, granularity="group", group=32), {"int8": "groups of 32"}),
        (linear(4, granularity="group", group=48), {"int8": "groups of 48", "weight-only": "no multiple of 32"}),
        (linear(8, symmetric=False), {"int8": "less their zero points"}),
    ],
)
def test_layers_are_refused_with_the_reason(layer: tuple[nn.Linear, LayerPlan], refused: dict[str, str]) -> None:
    found, reasons = candidates(*layer)
    assert len(found) + len(reasons) == 2
    assert [reason.partition(":")[0] for reason in reasons] == list(refused)
    for words, reason in zip(refused.values(), reasons, strict=True):
        assert words in reason
    [choice] = choose(nn.Sequential(layer[0]), {"0": layer[1]}, torch.randn(2, 64), time=FASTER)
    assert all(words in choice.reason for words in refused.values())
    assert (choice.kernel == "dense") == (not found)


def test_scales_that_half_precision_cannot_hold_are_refused() -> None:
    layer, plan = linear(4)
    assert plan.scale is not None
    small = replace(plan, scale=plan.scale * 1e-9)
    found, reasons = candidates(layer.half(), small)
    assert [candidate.kernel for candidate in found] == ["int8"]
    assert "cannot hold a scale" in reasons[0]


def test_convolutions_and_what_is_never_called_stay_dense() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    quantise(
        student, dict.fromkeys(("0", "2"), LayerBits(weights=8, activations=8)), lambda width: Quantiser(bits=width)
    )
    assert layer_plans(student)["0"].codes is None
    conv, full = choose(dense_of(student), layer_plans(student), torch.randn(2, 1, 8, 8), time=FASTER)
    assert (conv.kernel, conv.reason) == ("dense", "no kernel serves Conv2d")
    assert full.kernel == "int8"

    layer, plan = linear(8)
    spare = nn.Sequential(layer)
    spare.add_module("spare", nn.Identity())
    spare.spare.add_module("inner", copy.deepcopy(layer))  # type: ignore[union-attr, operator]
    found = choose(spare, {"0": plan, "spare.inner": plan}, torch.randn(2, 64), time=FASTER)
    assert found[1].reason == "a forward pass does not call it"


def test_a_layer_at_two_places_is_replaced_at_both() -> None:
    layer, plan = linear(8, inputs=24)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(3, 24)
    with torch.no_grad():
        wanted = model(x)
        choices = choose(model, {"0": plan}, x, time=FASTER)
        with_kernels(model, {"0": plan}, choices)
        assert model[0] is model[2]
        assert isinstance(model[2], Int8Linear)
        assert float((model(x) - wanted).norm() / wanted.norm()) < 0.05


def test_a_kernel_that_computes_something_else_or_fails_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plan = linear(4)
    right = kernel_layers._int8

    def wrong(layer: nn.Linear, plan: LayerPlan) -> Candidate:
        candidate = right(layer, plan)
        candidate.module.scale *= 1.05  # type: ignore[operator, assignment]
        return candidate

    def failing(calls: Sequence[Callable[[], object]]) -> list[Timing]:
        dense, _ = FASTER(calls)
        return [dense, failed("RuntimeError: out of resources")]

    monkeypatch.setattr(kernel_layers, "_int8", wrong)
    x = torch.randn(2, 64)
    [choice] = choose(nn.Sequential(layer), {"0": plan}, x, time=FASTER)
    assert choice.kernel == "weight-only-4"
    assert "int8: its results are off by" in choice.reason
    [choice] = choose(nn.Sequential(layer), {"0": plan}, x, time=failing)
    assert choice.kernel == "dense"
    assert "weight-only-4: RuntimeError: out of resources" in choice.reason
    with pytest.raises(ValueError, match="fp8 is not what its policy allows"):
        with_kernels(nn.Sequential(layer), {"0": plan}, [replace(choice, kernel="fp8")])


def test_choices_are_json(network: Compressible) -> None:
    student = student_of(network, 8)
    choices = choose(dense_of(student), layer_plans(student), network.inputs("validation", 4)[0][0], time=FASTER)
    assert [LayerChoice(**found) for found in json.loads(json.dumps([asdict(c) for c in choices]))] == choices


def test_half_precision_falls_back_to_what_has_the_range() -> None:
    layer = nn.Linear(2, 2).eval()
    assert in_half(layer, torch.ones(1, 2))[1].dtype == torch.float16
    assert layer.weight.dtype == torch.float32
    assert in_half(layer, torch.ones(1, 2) * 1e6)[1].dtype == torch.bfloat16
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert in_half(nn.Embedding(4, 2), tokens)[1].dtype == torch.int64
    with pytest.raises(ValueError, match="not finite"):
        in_half(layer, torch.ones(1, 2) * torch.inf)


def test_a_student_travels_as_files_and_is_judged_as_it_runs(network: Compressible, tmp_path: Path) -> None:
    space: Any = network.space
    items = [{"genotype": genotype_of(network, 8), "backend": "triton", "batch": 4}]
    [item], [facts] = deployed_items(network, items, tmp_path, 1)
    assert facts == recorded(item) == {}
    run: Any = student_call(space, item, "cpu", finished=lambda call: call, time=FASTER)
    found = recorded(item)
    linears = sum(type(layer) is nn.Linear for layer in network.model.modules())
    assert found["kernel_layers"] == linears
    assert found["dtype"] == "float16"
    assert {choice["kernel"] for choice in found["layers"]} == {"dense", "int8"}

    # What is judged is what runs: the module of the call, on the data.
    [model], logits = [run.func], []
    assert sum(isinstance(layer, Int8Linear) for layer in model.modules()) == linears
    batches, labels = network.inputs("test")
    with torch.no_grad():
        assert run().shape == (4, 10)
        assert run().dtype == torch.float16
        logits = [model(batch.half()).float() for batch in batches]
    judged = judged_outputs(labels, network.own_logits("test", None, 0, batches), torch.cat(logits))
    assert found["test_accuracy_drop"] == pytest.approx(judged.drop)
    assert found["test_accuracy"] > 80

    # On a student whose weights went wrong it shows.
    spoilt = load_file(item["student"])
    spoilt["state/head.weight"] *= -1
    spoilt["codes/head"] *= -1
    with safe_open(item["student"], "pt") as file:
        metadata = file.metadata()
    save_file(spoilt, item["student"], metadata)
    student_call(space, item, "cpu", finished=lambda call: call, time=FASTER)
    assert recorded(item)["test_accuracy"] < 20


def test_backends_of_gpus_say_so_on_a_processor(network: Compressible, tmp_path: Path) -> None:
    space: Any = network.space
    backends = ("triton", "triton-graph", "half", "half-compile", "half-graph")
    items = [{"genotype": genotype_of(network, 8), "backend": backend} for backend in backends]
    to_measure, _ = deployed_items(network, items, tmp_path, 1)
    request = {"space": {"name": "bits", **space.config}, "items": to_measure, "threads": 1}
    assert [timing["error"] for timing in measure_process.respond(request)["items"]] == [
        f"ValueError: backend {backend!r} needs a CUDA device" for backend in backends
    ]


def test_the_measuring_process_chooses_by_its_own_clock(
    network: Compressible, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With twins in the place of kernels, on a processor."""
    space: Any = network.space
    halved: list[nn.Module] = []
    monkeypatch.setattr(measure_process, "_OF_GPUS", ())
    monkeypatch.setattr(measure_process, "in_half", lambda model, x: (halved.append(model), in_half(model, x))[1])
    monkeypatch.setattr(kernel_layers, "_SETTINGS", Settings(rounds=5, warmup_limit_ms=20.0))
    items = [{"genotype": genotype_of(network, 4), "backend": backend} for backend in ("triton", "half")]
    to_measure, _ = deployed_items(network, items, tmp_path, 1)
    request = {"space": {"name": "bits", **space.config}, "items": to_measure, "threads": 1}
    answer = measure_process.respond({**request, "settings": asdict(Settings(rounds=3))})
    assert [timing["error"] for timing in answer["items"]] == [None, None]
    # In half precision nothing is simulated.
    assert not any(hasattr(layer, "input_quantiser") for layer in halved[0].modules())
    found = recorded(to_measure[0])
    timed_layers = [choice for choice in found["layers"] if choice["dense_ms"] is not None]
    assert len(timed_layers) == sum(type(layer) is nn.Linear for layer in network.model.modules())
    for choice in timed_layers:
        assert (choice["kernel"] == "dense") == ("not faster" in choice["reason"])
        assert choice["kernel_ms"] > 0
    assert found["kernel_layers"] == sum(choice["kernel"] != "dense" for choice in timed_layers)


def test_files_are_not_measured_under_the_name_of_a_gpu() -> None:
    for item in ({"file": "network.onnx"}, {"untouched": True, "backend": "onnx"}):
        with pytest.raises(ValueError, match="processors alone"):
            measure_process._call(None, item, "cuda:0", 1)


def test_what_the_process_found_out_is_in_the_workers_answer(
    network: Compressible, monkeypatch: pytest.MonkeyPatch
) -> None:
    space: Any = network.space
    job = {
        "name": "bits", "space": {"name": "bits", **space.config}, "data": {"name": "digits"},
        "evaluators": [{"name": "compression", "calibration": 64}],
        "objectives": [{"metric": "accuracy", "direction": "max"}], "strategy": {"name": "random"},
        "budget": {"evaluations": 1},
    }  # fmt: skip

    def measured(_space: Any, items: list[dict[str, Any]], **_options: Any) -> tuple[list[Timing], dict[str, Any]]:
        for item in items:
            if "student" in item:
                student_call(space, item, "cpu", finished=lambda call: call, time=FASTER)
        return [failed("") for _ in items], {}

    monkeypatch.setattr("archfront.search.worker.measured_elsewhere", measured)
    items = [{"genotype": genotype_of(network, 8), "backend": backend} for backend in ("eager", "triton")]
    worker = Worker(WorkerSetup(spec=job))
    (eager, triton), _ = worker.call("compression", "measure", {"items": items, "threads": 1})
    assert not eager.get("layers")
    assert "kernel_layers" not in eager
    assert {choice["kernel"] for choice in triton["layers"]} == {"int8", "dense"}
    assert {"accuracy_drop", "test_accuracy", "test_accuracy_drop_std", "kernel_layers"} <= triton.keys()
    json.dumps(triton)
    with pytest.raises(InputError, match=r"finalists\.device.*cuda:99"):
        worker.call("compression", "measure", {"items": [], "threads": 1, "device": "cuda:99"})


@pytest.mark.parametrize("kernel", ["int8", "weight-only-8"])
def test_kernels_share_no_memory_with_what_they_are_made_of(kernel: str) -> None:
    layer, plan = linear(8)
    before = copy.deepcopy((layer.state_dict(), plan.codes, plan.scale))
    for buffer in made(layer, plan)[kernel].module.buffers():
        buffer.zero_()
    for now, old in zip((*layer.state_dict().values(), plan.codes, plan.scale),
                        (*before[0].values(), *before[1:]), strict=True):  # fmt: skip
        assert torch.equal(now, old)  # type: ignore[arg-type]
