"""The one discipline of measuring: warm up until stable, interleave, take medians, say how sure they are.

Used for tables, candidates, finalists and benchmarks, always in a fresh process (``measure_process``), so that neither
other code's threads nor its memory disturb the figures. Every item's samples are spread over the whole measurement:
a slow spell of the machine then meets all items alike.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from archfront.errors import ArchfrontError
from archfront.evaluators.latency.device import LOCAL_CPU
from archfront.evaluators.latency.device_lock import device_lock
from archfront.evaluators.latency.energy import EnergyMeter, energy_mj
from archfront.evaluators.latency.quietness import Probe, quiet
from archfront.plugins import Plugin

OUTLIER_DEVIATIONS = 6.0
"""Beyond so many robust deviations above the median a sample counts as an outlier; it stays in the samples."""

DRIFT_DEVIATIONS = 4.0
"""A rise from the first third of the samples to the last counts beyond so many standard deviations of itself."""
LEAST_DRIFT = 0.03
"""Share by which they must rise, too."""
_DRIFT_SAMPLES = 15
"""Of fewer the noise is not known well enough."""

_BOOTSTRAPS = 400
_START_S = 0.1
"""To build an item and warm it up."""
_PROCESS = "archfront.evaluators.latency.measure_process"


class MeasurementError(ArchfrontError):
    """A measuring process failed; its own words are in the message."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: samples of each item.
        sample_ms: a sample repeats the call until it lasts about so long, and is the mean of its calls.
        lead_ms: a sample follows calls that do not count, for about so long, but one at least: they pay for what the
            item before left in the caches, so that a sample is of calls that follow each other.
        warmup_ms: least warm-up of an item.
        stable: warm-up goes on until two successive samples differ by at most this share, ...
        warmup_limit_ms: ... or until it took so long.
        confidence: of the interval of the median.
        energy_ms: least time that a whole network runs alone for its energy, where there is a meter.
    """

    rounds: int = 30
    sample_ms: float = 2.0
    lead_ms: float = 8.0
    warmup_ms: float = 20.0
    stable: float = 0.1
    warmup_limit_ms: float = 500.0
    confidence: float = 0.95
    energy_ms: float = 200.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was found for one item; times in ms of one call.

    Attributes:
        median_ms: of the samples.
        low_ms, high_ms: bootstrap interval of the median.
        std_ms: bootstrap standard deviation of the median: how sure the estimate is.
        spread_ms: robust standard deviation of the samples: how much single calls vary.
        samples_ms: all of them, in the order of measuring.
        calls: in each sample.
        peak_memory_bytes: growth of the process's peak resident memory up to the end of this item's warm-up; 0 where
            it stayed below an earlier peak.
        notes: outliers, warm-up that never became stable, samples that slowed down.
        error: why there is no figure; the others are then nan.
        energy_mj: millijoules of one call of a whole network, by the counter of all processors or of the GPU: idle
            power is in it. None where the machine exposes no counter, and for blocks and operators.
        quiet_ms: what predictors learn from: of the samples that nobody disturbed, see ``quietness``.
        layers: of a file that was asked for them, see ``layer_times``.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    std_ms: float
    spread_ms: float
    samples_ms: list[float] = field(default_factory=list)
    calls: int = 0
    peak_memory_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    energy_mj: float | None = None
    quiet_ms: float = float("nan")
    layers: list[dict[str, Any]] = field(default_factory=list)


def failed(error: str) -> Timing:
    """The timing of an item that could not run."""
    nan = float("nan")
    return Timing(median_ms=nan, low_ms=nan, high_ms=nan, std_ms=nan, spread_ms=nan, error=error)


def measure(
    functions: Sequence[Callable[[], object]], settings: Settings, probe: Probe | None = None
) -> tuple[list[Timing], float]:
    """Time functions against each other, in this process.

    Args:
        functions: each makes one call; it must have finished the work when it returns.
        settings: how long.
        probe: runs after each sample.

    Returns:
        One timing for each, in order, with ``error`` for a function that raised; and what the probe took undisturbed,
        in ms, nan without one.
    """
    probes: list[float] = []
    errors: dict[int, str] = {}
    calls: dict[int, int] = {}
    lead: dict[int, int] = {}
    memory: dict[int, int] = {}
    notes: dict[int, list[str]] = {i: [] for i in range(len(functions))}
    before = peak_memory()
    for i, function in enumerate(functions):
        try:
            ms, stable = _warm_up(function, settings)
        except Exception as error:
            errors[i] = f"{type(error).__name__}: {error}"
            continue
        calls[i], lead[i] = _calls(settings.sample_ms, ms), _calls(settings.lead_ms, ms)
        after = peak_memory()
        memory[i], before = after - before, after
        if not stable:
            notes[i].append(f"not stable after {settings.warmup_limit_ms:g} ms of warm-up")
    samples: dict[int, list[float]] = {i: [] for i in calls}
    # The order changes from round to round, so that no item always follows the same other one.
    rng = np.random.default_rng(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(settings.rounds):
            for i in rng.permutation(list(calls)).tolist():
                for _ in range(lead[i]):
                    functions[i]()
                samples[i].append(_sample(functions[i], calls[i]))
                if probe is not None:
                    probes.append(probe())
    finally:
        if collecting:
            gc.enable()
    timings = [
        failed(errors[i]) if i in errors else summary(samples[i], settings, calls[i], memory[i], notes[i])
        for i in range(len(functions))
    ]
    return timings, quiet(probes)


def summary(
    samples: Sequence[float], settings: Settings, calls: int = 1, memory: int = 0, notes: Sequence[str] = ()
) -> Timing:
    """The figures of samples in ms."""
    values: npt.NDArray[np.float64] = np.asarray(samples, dtype=np.float64)
    median = float(np.median(values))
    rng = np.random.default_rng(len(values))
    medians = np.median(values[rng.integers(len(values), size=(_BOOTSTRAPS, len(values)))], axis=1)
    tail = (1 - settings.confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    spread = float(1.4826 * np.median(np.abs(values - median)))
    outliers = int((values > median + OUTLIER_DEVIATIONS * max(spread, 0.01 * median)).sum())
    found = [*notes, f"{outliers} of {len(values)} samples are outliers"] if outliers else list(notes)
    rise = _rise(values)
    if rise:
        found.append(f"the last third of the samples is {rise:.0%} slower than the first: throttling, or other load")
    return Timing(
        median_ms=median,
        quiet_ms=quiet(samples),
        low_ms=float(low),
        high_ms=float(high),
        std_ms=float(medians.std()),
        spread_ms=spread,
        samples_ms=values.tolist(),
        calls=calls,
        peak_memory_bytes=memory,
        notes=found,
    )


def add_energy(timing: Timing, function: Callable[[], object], meter: EnergyMeter, settings: Settings) -> Timing:
    """A timing with the energy of its function, if that could run."""
    if timing.error is not None:
        return timing
    return replace(timing, energy_mj=energy_mj(function, timing.calls, meter, settings.energy_ms))


def _rise(values: npt.NDArray[np.float64]) -> float:
    """Share by which the last third of the samples is slower than the first; 0 if that may be noise.

    Medians of the thirds, against the noise from sample to sample: neither single outliers nor a high noise count.
    """
    if len(values) < _DRIFT_SAMPLES:
        return 0.0
    third = len(values) // 3
    first, last = np.median(values[:third]), np.median(values[-third:])
    # Of successive samples, as these hardly differ by the drift itself; then the standard error of two medians.
    spread = 1.4826 * np.median(np.abs(np.diff(values))) / 2**0.5
    noise = 2**0.5 * 1.2533 * spread / third**0.5
    return float(last / first - 1) if last - first > max(DRIFT_DEVIATIONS * noise, LEAST_DRIFT * first) else 0.0


def _calls(total_ms: float, ms: float) -> int:
    """How many calls take so long, one at least."""
    return max(1, round(total_ms / max(ms, 1e-4)))


def _warm_up(function: Callable[[], object], settings: Settings) -> tuple[float, bool]:
    """What a call takes in ms, and whether that became stable."""
    function()
    start = perf_counter()
    last = _sample(function, 1)
    calls = _calls(settings.sample_ms, last)
    while True:
        now = _sample(function, calls)
        spent = (perf_counter() - start) * 1e3
        stable = abs(now - last) <= settings.stable * last
        if (stable and spent >= settings.warmup_ms) or spent >= settings.warmup_limit_ms:
            return now, stable
        last = now


def _sample(function: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        function()
    return (perf_counter() - start) * 1e3 / calls


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured_elsewhere(
    space: dict[str, Any] | None,
    items: Sequence[dict[str, Any]],
    *,
    threads: int,
    settings: Settings | None = None,
    timeout_s: float | None = None,
    plugins: Sequence[Plugin] = (),
    device: str = LOCAL_CPU,
) -> tuple[list[Timing], dict[str, Any]]:
    """Measure in a fresh process, alone: another measurement on this host is waited for.

    Args:
        space: ``{"name": ..., <arguments>}`` of a registered space, or None if no item needs one.
        items: each with ``genotype`` (a whole network), ``untouched`` (true: the network that policies are of),
            ``block`` (a descriptor), ``model`` (``timm:resnet18``, with ``shape`` if not its own), ``operator`` (a
            call, see ``operators``), ``file`` (with ``runtime`` and ``shape``, see ``onnx_files``, and ``layers``
            where their times are wanted, see ``layer_times``) or ``problem`` (why there is nothing to measure), and
            optionally ``batch`` (1), ``backend`` (``eager``, ``compile``, ``onnx``, or ``cuda-graph`` on a GPU) and
            ``channels_last`` (false).
        threads: that torch and OpenMP get there.
        settings: how long to measure.
        timeout_s: of the process; None for none.
        plugins: files that may hold the space.
        device: ``local-cpu`` or ``cuda:<number>``.

    Returns:
        The timings in the order of the items, and the environment they hold for.

    Raises:
        MeasurementError: the process failed or took too long.
    """
    request: dict[str, Any] = {"space": space, "items": list(items), "threads": threads, "device": device}
    request["settings"] = asdict(settings or Settings())
    request["plugins"] = [asdict(plugin) for plugin in plugins]
    environment = {**os.environ, **{name: str(threads) for name in _THREAD_VARIABLES}}
    try:
        with device_lock(device):
            done = subprocess.run(
                [sys.executable, "-m", _PROCESS],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                env=environment,
                timeout=timeout_s,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"The measuring process took longer than {timeout_s} s.") from None
    if done.returncode:
        raise MeasurementError(f"The measuring process ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    response = json.loads(done.stdout)
    return [Timing(**timing) for timing in response["items"]], response["environment"]


def quiet_elsewhere(
    space: dict[str, Any] | None, items: Sequence[dict[str, Any]], *, probe_ms: float | None = None, **options: Any
) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
    """As ``measured_elsewhere`` where every item has to run: what predictors learn from.

    Args:
        space, items, options: of ``measured_elsewhere``.
        probe_ms: ``environment["probe_ms"]`` of the process that the figures shall be comparable with. Spells that
            last as long as a process slow all of it down.

    Returns:
        ``(items,)`` ms, undisturbed, and the environment.

    Raises:
        MeasurementError: a process or an item failed; the message names it.
    """
    timings, environment = measured_elsewhere(space, items, **options)
    for item, timing in zip(items, timings, strict=True):
        if timing.error is not None:
            raise MeasurementError(f"{next(iter(item.values()))} cannot be measured: {timing.error}")
    ms = np.array([timing.quiet_ms for timing in timings], dtype=np.float64)
    return ms * pace(environment, probe_ms), environment


def affordable(ms: float, settings: Settings, *, seconds: float, least: int, most: int) -> int:
    """How many items of this latency a process measures in so many seconds, between the least and the most."""
    each_s = settings.rounds * (max(ms, settings.lead_ms) + max(ms, settings.sample_ms)) / 1e3 + _START_S
    return int(np.clip(seconds / each_s, least, most))


def pace(environment: Mapping[str, Any], probe_ms: float | None) -> float:
    """By what to multiply a process's times to compare them with those of one whose probe took ``probe_ms``."""
    here = environment.get("probe_ms")
    return probe_ms / here if probe_ms and here else 1.0


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
