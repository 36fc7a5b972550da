"""Measuring: ONNX Runtime, energy, throttling and pinning. The timing itself: ``tests/evaluators/test_latency.py``."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from archfront.errors import InputError, MissingExtraError
from archfront.evaluators.latency.device import fingerprint
from archfront.evaluators.latency.energy import NvmlMeter, energy_mj, find_meter
from archfront.evaluators.latency.evaluator import Latency
from archfront.evaluators.latency.measure_process import _call, notes
from archfront.evaluators.latency.measurement import (
    Settings,
    Timing,
    add_energy,
    failed,
    measure,
    measured_elsewhere,
    pace,
    summary,
)
from archfront.evaluators.latency.network_profile import network_latency
from archfront.evaluators.latency.onnx_backend import OutputsDifferError, check_outputs, onnx_call
from archfront.evaluators.latency.operators import Operator
from archfront.evaluators.latency.pinning import Core, choose, pin
from archfront.evaluators.latency.profile import Profile, profile_operators
from archfront.evaluators.latency.space_traces import traced_genotypes
from archfront.search.job import Finalists
from archfront.spaces.fbnet import FBNetTiny

SPACE = FBNetTiny(layers=3, head_channels=16, blocks=["k3_e1", "k3_e6", "skip"])
QUICK = Settings(rounds=5, sample_ms=0.3, warmup_ms=2, warmup_limit_ms=30)


# ONNX Runtime


class Small(nn.Module):
    """Writes into its input, and gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(torch.relu_(x))
        return {"features": y, "mean": y.mean((2, 3))}


class Otherwise(nn.Module):
    """Computes something else where it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.1 if torch.compiler.is_exporting() else 1.0)


def test_onnx_runtime_calls_the_same_network() -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        network, example = Small().eval(), torch.randn(2, 3, 6, 6)
        given = example.clone()
        call = onnx_call(network, example, threads=1)
        features, mean = call()  # type: ignore[misc]
        assert torch.equal(example, given)
        expected = network(given)
    assert features == pytest.approx(expected["features"].numpy(), abs=1e-5)
    assert mean == pytest.approx(expected["mean"].numpy(), abs=1e-5)
    with torch.inference_mode(), pytest.raises(OutputsDifferError, match=r"0\.1 of its largest value"):
        onnx_call(Otherwise().eval(), torch.randn(4, 8), threads=1)
    with pytest.raises(ValueError, match="processors"):
        onnx_call(Otherwise().eval(), torch.empty(1, device="meta"), threads=1)


def test_outputs_of_onnx_runtime_must_agree() -> None:
    right = np.linspace(-2, 2, 9, dtype=np.float32).reshape(3, 3)
    check_outputs([right, right[:0]], [right + 1e-3, right[:0]])
    for wrong, words in (
        ([right + 1e-2], r"by 0\.01, 0\.005 of"),
        ([right * np.nan], "by nan"),
        ([right[:2]], "shapes"),
        ([right, right], "shapes"),
    ):
        with pytest.raises(OutputsDifferError, match=words):
            check_outputs([right], wrong)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'archfront\[onnx\]'"):
        onnx_call(Otherwise().eval(), torch.ones(1), threads=1)


def test_the_measuring_process_knows_onnx_and_is_bound_to_its_processors() -> None:
    items: list[dict[str, Any]] = [
        {"genotype": ["k3_e6", "k3_e6", "k3_e6"]},
        {"genotype": ["k3_e6", "k3_e6", "k3_e6"], "backend": "onnx"},
        {"genotype": ["skip", "skip", "skip"], "backend": "onnx", "channels_last": True},
    ]
    config = {"name": SPACE.name, **SPACE.config}
    [eager, onnx, refused], environment = measured_elsewhere(config, items, threads=1, settings=QUICK)
    assert onnx.error is None
    # Small blocks: what eager spends is Python's time, which ONNX Runtime does without.
    assert 0 < onnx.median_ms < eager.median_ms
    assert "channels_last" in str(refused.error)
    if hasattr(os, "sched_getaffinity"):
        assert len(environment["cpus"]) == 1
        assert set(environment["cpus"]) <= os.sched_getaffinity(0)
    meter = find_meter("cpu")
    assert environment["energy"] == (meter and meter.source)
    assert (eager.energy_mj is None) == (meter is None)


def test_jobs_know_onnx() -> None:
    assert Finalists.model_validate({"backends": ["eager", "onnx"]}).backends == ["eager", "onnx"]
    assert Latency(backend="onnx", mode="measure").backend == "onnx"
    with pytest.raises(InputError, match=r"evaluators\.latency\.backend: 'onnx' measures processors"):
        Latency(backend="onnx", device="cuda:0", mode="measure")
    assert Latency(backend="onnx", mode="operators").backend == "onnx"


@pytest.mark.slow
@pytest.mark.alone
def test_operators_are_corrected_by_networks_that_ran_on_the_backend() -> None:
    eager, onnx = (
        network_latency(
            SPACE,
            fingerprint(1),
            backend=backend,
            networks=8,
            randoms=0,
            operator_settings=QUICK,
            network_settings=QUICK,
        )
        for backend in ("eager", "onnx")
    )
    traces = list(traced_genotypes(SPACE, [["k3_e6", "k3_e6", "k3_e6"], ["k3_e1", "skip", "k3_e6"]]))
    assert (onnx.predict(traces).ms < 0.5 * eager.predict(traces).ms).all()


def test_all_networks_of_a_process_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch itself stops after eight of one class, and runs the others eagerly."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for genotype in list(itertools.product(["k3_e1", "k3_e6", "skip"], repeat=3))[:12]:
        _call(SPACE, {"genotype": genotype, "backend": "compile"}, "cpu", 1)()
    assert counters["unique_graphs"] - before == 12
    torch._dynamo.reset()


# Energy


def zone(folder: Path, name: str, energy_uj: int, range_uj: int = 10**9) -> Path:
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder


def spend(folder: Path, uj: int, every: int = 1) -> Callable[[], None]:
    """A call that takes so much energy of a zone, whose counter moves only at each so many calls."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            file = folder / "energy_uj"
            span = int((folder / "max_energy_range_uj").read_text())
            file.write_text(str((int(file.read_text()) + every * uj) % span))

    return call


def test_packages_and_memory_are_counted_past_their_ranges(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 999_000, 1_000_000)
    memory = zone(tmp_path / "intel-rapl:0:1", "dram", 5)
    for folder, name in (("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path / folder, name, 0)
    meter = find_meter("cpu", tmp_path)
    assert meter is not None
    assert meter.source == "RAPL: package-0, dram"
    assert meter.total_mj() == 0
    (package / "energy_uj").write_text("4000")
    (memory / "energy_uj").write_text("2005")
    assert meter.total_mj() == pytest.approx(5 + 2)
    for folder in tmp_path.iterdir():
        if folder not in (package, memory):
            (folder / "energy_uj").write_text("700000")
    (package / "energy_uj").write_text("3000")
    assert meter.total_mj() == pytest.approx(7 + 999)


def test_energy_counts_whole_ticks(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 0, 3000)
    meter = find_meter("cpu", tmp_path)
    assert meter is not None
    # Not in step with the counter, which also starts anew again and again.
    call = spend(package, 21, every=7)
    for _ in range(3):
        call()
    found = energy_mj(call, 1, meter, span_ms=0.2)
    assert found == pytest.approx(0.021)
    timing = add_energy(summary([1.0], Settings(), calls=1), call, meter, Settings(energy_ms=0.2))
    assert timing.energy_mj == pytest.approx(0.021)
    assert (timing.median_ms, timing.error) == (1.0, None)
    broken = failed("no such operator")
    assert add_energy(broken, call, meter, Settings()) is broken


def test_no_energy_without_a_counter_that_moves(tmp_path: Path) -> None:
    assert find_meter("cpu", tmp_path / "none") is None
    assert find_meter("cpu", tmp_path) is None
    package = zone(tmp_path / "intel-rapl:0", "package-0", 7)
    meter = find_meter("cpu", tmp_path)
    assert meter is not None
    assert energy_mj(lambda: None, 1, meter, span_ms=1) is None
    (package / "energy_uj").unlink()
    assert energy_mj(lambda: None, 1, meter, span_ms=1) is None
    assert find_meter("cpu", tmp_path) is None
    (package / "energy_uj").write_text("unreadable")
    assert find_meter("cpu", tmp_path) is None


class FakeNvml:
    """NVML with one GPU, whose counter moves by 3 J with each reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.total = broken, 1000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-ab-cd":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.broken:
            raise self.NVMLError("Not Supported")
        self.total += 3000
        return self.total


def test_gpus_are_metered_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-cd"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_meter("cuda:0") is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=True))
    assert find_meter("cuda:0") is None
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = find_meter("cuda:0")
    assert isinstance(meter, NvmlMeter)
    assert meter.source == "NVML: GPU-ab-cd"
    assert meter.total_mj() + 3000 == meter.total_mj()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="another"))
    assert find_meter("cuda:0") is None


# Throttling


def drifts(samples: np.ndarray[Any, Any]) -> bool:
    return any("slower than the first" in note for note in summary(samples.tolist(), Settings()).notes)


def test_samples_that_slow_down_are_noted() -> None:
    rng = np.random.default_rng(0)
    for count in (15, 30, 200):
        noise = rng.normal(1, 0.01, count)
        assert drifts(noise * np.linspace(1, 1.15, count))
        assert drifts(np.where(np.arange(count) < count * 0.65, 1.0, 1.3) * noise)
        assert not drifts(noise)
        assert not drifts(noise * np.linspace(1.3, 1, count))
        # A drift within the noise, and one too small to matter.
        assert not drifts(rng.normal(1, 0.3, count) * np.linspace(1, 1.05, count))
        assert not drifts(rng.normal(1, 0.0005, count) * np.linspace(1, 1.02, count))
    # Outliers at the end are outliers.
    late = rng.normal(1, 0.01, 30)
    late[[24, 26, 29]] *= 5
    assert not drifts(late)
    assert summary(late.tolist(), Settings()).notes == ["3 of 30 samples are outliers"]
    assert not drifts(np.linspace(1, 2, 14))
    [note] = [n for n in summary(np.repeat([1.0, 1.1, 1.2], 5).tolist(), Settings()).notes if "slower" in n]
    assert "20% slower" in note


def test_steady_samples_hardly_ever_look_throttled() -> None:
    rng = np.random.default_rng(1)
    for count in (15, 30):
        steady = [drifts(rng.normal(1, deviation, count)) for deviation in (0.01, 0.05, 0.2) for _ in range(300)]
        assert np.mean(steady) < 0.01


def test_a_clock_that_falls_is_noted() -> None:
    assert notes(0.0, 1, 3000.0, 2900.0) == notes(None, 1, None, 2000.0) == notes(0.0, 1, 3000.0, None) == []
    assert notes(0.0, 1, 3000.0, 2400.0) == ["the clock fell from 3000 to 2400 MHz while measuring: throttling"]
    assert len(notes(1e3, 1, 3000.0, 2400.0)) == 2


# Pinning


def cores(*busy: float, packages: tuple[int, ...] = (), slow: tuple[int, ...] = ()) -> list[Core]:
    """Cores of two processors each, numbered as most systems do: first one of each core, then the others."""
    count = len(busy)
    return [
        Core(cpus=(i, i + count), package=packages[i] if packages else 0, busy=share, slow=i in slow)
        for i, share in enumerate(busy)
    ]


@pytest.mark.parametrize(
    ("given", "threads", "expected"),
    [
        (cores(0, 0, 0, 0), 1, [3]),
        (cores(0, 0, 0, 0), 2, [2, 3]),
        (cores(0.01, 0, 0.02, 1), 2, [1, 2]),
        (cores(0, 0, 0, 0), 5, [0, 1, 2, 3, 7]),
        (cores(0, 0, 0, 0, slow=(2, 3)), 2, [0, 1]),
        (cores(0, 0, 0, 0, slow=(2, 3)), 3, [1, 2, 3]),
        (cores(0, 1, 0, 0.3, packages=(0, 0, 1, 1)), 2, [2, 3]),
        (cores(0, 0, 1, 1, packages=(0, 0, 1, 1)), 2, [0, 1]),
        (cores(0, 0, 0, 0, packages=(0, 1, 0, 1)), 3, [1, 2, 3]),
    ],
)
def test_processors_are_chosen(given: list[Core], threads: int, expected: list[int]) -> None:
    assert choose(given, threads) == expected


def machine(monkeypatch: pytest.MonkeyPatch, processors: Path, allowed: set[int], busy: list[float]) -> None:
    """Four processors on two cores; what is allowed changes as it does on Linux."""
    for cpu in range(4):
        topology = processors / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
        (topology / "physical_package_id").write_text("0\n")
    now = set(allowed)

    def bind(_: int, chosen: list[int]) -> None:
        now.intersection_update(chosen)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(now), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", bind, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda *_, **__: busy)


def test_the_system_tells_which_processors_share_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        machine(patch, tmp_path / "a", {0, 1, 2, 3}, [0, 0, 0, 0])
        assert pin(2, tmp_path / "a") == [0, 1]
    with monkeypatch.context() as patch:  # its sibling keeps core 1 busy
        machine(patch, tmp_path / "b", {0, 1, 2}, [0, 0, 0, 90])
        assert pin(1, tmp_path / "b") == [0]
    with monkeypatch.context() as patch:
        machine(patch, tmp_path / "c", {1, 3}, [0, 0, 0, 0])
        assert pin(4, tmp_path / "c") == [1, 3]
    with monkeypatch.context() as patch:
        machine(patch, tmp_path / "d", {1, 3}, [])
        assert pin(1, tmp_path / "none") == [3]
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert pin(1) is None


# Stored timings


def test_timings_of_before_still_load() -> None:
    stored = (
        '{"median_ms": 1.5, "low_ms": 1.4, "high_ms": 1.6, "std_ms": 0.05, "spread_ms": 0.1, "samples_ms": [1.5, 1.5],'
        ' "calls": 2, "peak_memory_bytes": 0, "notes": [], "error": null}'
    )
    timing = Timing(**json.loads(stored))
    assert (timing.median_ms, timing.energy_mj) == (1.5, None)


# Neighbours


def test_what_nobody_disturbed_is_told_from_what_a_neighbour_slowed() -> None:
    rng = np.random.default_rng(0)

    def sampled(busy: float) -> Timing:
        slowed = np.where(rng.random(30) < busy, 1.6, 1.0)
        return summary((slowed * rng.normal(1, 0.01, 30)).tolist(), Settings())

    alone, shared, crowded = sampled(0.0), sampled(0.4), sampled(0.75)
    for timing in (alone, shared, crowded):
        assert timing.quiet_ms == pytest.approx(1, rel=0.03)
    assert crowded.median_ms > 1.5


def test_processes_are_compared_at_one_pace() -> None:
    assert pace({"probe_ms": 0.4}, 0.3) == pytest.approx(0.75)
    assert pace({"probe_ms": None}, 0.3) == pace({}, 0.3) == pace({"probe_ms": 0.4}, None) == 1.0
    # The probe is interleaved with what is measured.
    order: list[str] = []
    settings = Settings(rounds=4, sample_ms=0.01, warmup_ms=0.01)
    _, probe_ms = measure([lambda: order.append("item")], settings, lambda: order.append("probe") or 0.3)  # type: ignore[func-returns-value]
    assert probe_ms == pytest.approx(0.3)
    assert [order.count("probe"), order[-1], order[-2]] == [4, "probe", "item"]


def test_calls_before_a_sample_do_not_count() -> None:
    order: list[str] = []

    def call() -> None:
        order.append("call")
        time.sleep(1e-3)

    settings = Settings(rounds=5, sample_ms=4, lead_ms=12, warmup_ms=1)
    [timing], _ = measure([call], settings, lambda: order.append("probe") or 0.3)  # type: ignore[func-returns-value]
    samples = " ".join(order).split("probe")[1:-1]
    assert timing.calls > 1
    [lead] = {sample.split().count("call") - timing.calls for sample in samples}
    assert lead == pytest.approx(3 * timing.calls, abs=2)


def test_a_slower_process_gives_a_profile_of_the_same_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spell as long as a process slows its operators and its probe alike."""
    slower = iter([1.0, 1.5, 1.25])

    def measured(_: Any, items: Sequence[Any], **__: Any) -> tuple[list[Timing], dict[str, Any]]:
        spell = next(slower)
        timing = summary([2.0 * spell] * 3, Settings())
        return [timing] * len(items), {"device": fingerprint(1).to_json(), "probe_ms": 0.3 * spell}

    monkeypatch.setattr(f"{profile_operators.__module__}.measured_elsewhere", measured)
    monkeypatch.setattr(f"{profile_operators.__module__}._chunks", lambda calls: [[call] for call in calls])
    operators = [Operator(call=str(i), module="", macs=1, read_bytes=1, written_bytes=1, weight_bytes=0) for i in "abc"]
    found = profile_operators(operators, Profile(device=fingerprint(1).to_json(), threads=1))
    assert list(found.ms.values()) == pytest.approx([2.0, 2.0, 2.0])
    again = Profile.from_json(found.to_json())
    assert again.probe_ms == found.probe_ms == pytest.approx(0.3)
    assert again.digest == found.digest
