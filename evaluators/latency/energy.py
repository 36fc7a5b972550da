"""Energy of a call, where the machine exposes a counter: RAPL on processors, NVML on NVIDIA's GPUs.

The counters move in ticks of 1 ms (RAPL) to 100 ms (NVML), as long as a sample or longer. A network is therefore run
alone from one tick to a later one, apart from the samples of its time, which take turns with those of other items.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")

_PATIENCE = 5.0
"""A counter that has not moved after so many times the span asked for stands still."""


class EnergyMeter(ABC):
    """A counter of energy. What it counts includes the idle power, and all that others do on the device.

    Attributes:
        source: what is counted, for people.
    """

    source: str

    @abstractmethod
    def total_mj(self) -> float:
        """Energy in millijoules since some fixed moment; it never falls.

        Raises:
            OSError: the counter cannot be read any more.
        """


class RaplMeter(EnergyMeter):
    """Processor packages and their memory, by Linux's powercap zones.

    Args:
        zones: folders with ``energy_uj`` and ``max_energy_range_uj``, in microjoules.

    Raises:
        OSError: a counter cannot be read; since 2020 kernels allow it to root alone.
    """

    def __init__(self, zones: list[Path]) -> None:
        names = [(zone / "name").read_text().strip() for zone in zones]
        self.source = f"RAPL: {', '.join(names)}"
        self._files = [zone / "energy_uj" for zone in zones]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_number(file) for file in self._files]
        self._total_uj = 0

    def total_mj(self) -> float:
        now = [_number(file) for file in self._files]
        for before, after, span in zip(self._last, now, self._ranges, strict=True):
            # A counter starts anew at 0 beyond its range: at 100 W after some 40 minutes, so once between two readings.
            self._total_uj += after - before if after >= before else after - before + span
        self._last = now
        return self._total_uj / 1e3


class NvmlMeter(EnergyMeter):
    """A whole GPU, by NVML's counter (Volta and later).

    Args:
        nvml: the module ``pynvml``.
        uuid: the GPU's, as torch and NVML both know it; their numbers differ under ``CUDA_VISIBLE_DEVICES``.

    Raises:
        OSError: the GPU has no such counter.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self.source = f"NVML: GPU-{uuid}"
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError as error:
            raise OSError(str(error)) from None
        self.total_mj()

    def total_mj(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from None


def find_meter(device: str, powercap: Path = POWERCAP) -> EnergyMeter | None:
    """The meter of ``cpu`` or ``cuda:<number>``; None where the machine exposes none, or not to this user."""
    try:
        if device != "cpu":
            import pynvml

            return NvmlMeter(pynvml, str(torch.cuda.get_device_properties(device).uuid))
        zones = _zones(powercap)
        return RaplMeter(zones) if zones else None
    except (ImportError, OSError, ValueError):
        return None


def energy_mj(function: Callable[[], object], calls: int, meter: EnergyMeter, span_ms: float) -> float | None:
    """Energy of one call in millijoules.

    Args:
        function: makes one call; it must have finished the work when it returns.
        calls: between two readings of the counter. They should last about a millisecond: reading costs energy too.
        meter: of the device that does the work.
        span_ms: least time between the two ticks of the counter.

    Returns:
        None if the counter stands still or can no longer be read.
    """
    try:
        return _between_ticks(function, calls, meter, span_ms)
    except OSError:
        return None


def _between_ticks(function: Callable[[], object], calls: int, meter: EnergyMeter, span_ms: float) -> float | None:
    first = _run_to_tick(function, calls, meter, span_ms)
    if first is None:
        return None
    begin_mj, _ = first
    start, made = perf_counter(), 0
    # Not read before the span is over, so that reading does not count much.
    while (perf_counter() - start) * 1e3 < span_ms:
        for _ in range(calls):
            function()
        made += calls
    last = _run_to_tick(function, calls, meter, span_ms)
    if last is None:
        return None
    end_mj, more = last
    return (end_mj - begin_mj) / (made + more)


def _run_to_tick(
    function: Callable[[], object], calls: int, meter: EnergyMeter, span_ms: float
) -> tuple[float, int] | None:
    """Run until the counter moves; its value then, and the calls made."""
    before = meter.total_mj()
    start, made = perf_counter(), 0
    while (perf_counter() - start) * 1e3 < _PATIENCE * span_ms:
        for _ in range(calls):
            function()
        made += calls
        now = meter.total_mj()
        if now > before:
            return now, made
    return None


def _zones(powercap: Path) -> list[Path]:
    """Packages, and the memory beside them, which no package contains; not their cores, which they do contain."""
    if not powercap.is_dir():
        return []
    zones = [zone for zone in sorted(powercap.iterdir()) if re.fullmatch(r"intel-rapl(:\d+)+", zone.name)]
    return [zone for zone in zones if (zone / "name").read_text().strip().startswith(("package", "dram"))]


def _number(file: Path) -> int:
    return int(file.read_text())
