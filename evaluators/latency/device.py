"""What a latency holds for: a device's fingerprint."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from archfront.errors import InputError
from archfront.evaluators.latency.digests import json_digest

LOCAL_CPU = "local-cpu"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All that tells one device, as latency sees it, from another.

    Attributes:
        kind: ``local-cpu``.
        model: the processor's name.
        capability: widest vector instructions that torch uses.
        cores: physical cores, or logical ones where the system does not say.
        memory_gib: rounded, so that a kernel's reserve does not matter.
        system: operating system and architecture.
        torch: version.
        threads: that a measured process may use.
        governor: of the processor's clock, where the system tells; of a GPU its driver.
    """

    kind: str
    model: str
    capability: str
    cores: int
    memory_gib: int
    system: str
    torch: str
    threads: int
    governor: str = ""

    @property
    def digest(self) -> str:
        return json_digest(asdict(self))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "digest": self.digest}


def check_device(name: str, field: str = "--device") -> str:
    """The device's name in full.

    Raises:
        InputError: no such kind of device, or none here.
    """
    if name in (LOCAL_CPU, "cpu"):
        return LOCAL_CPU
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ", ".join([LOCAL_CPU, *(f"cuda:{i}" for i in range(count))])
    if kind == "cuda" and number.isdigit() and int(number) >= count:
        raise InputError(field, name, f"is not there: this machine has {count} CUDA devices", f"Known: {known}.")
    if kind != "cuda" or not number.isdigit():
        raise InputError(field, name, "is not a known device", f"Known: {known}.")
    return name


@lru_cache(maxsize=8)
def fingerprint(threads: int, device: str = LOCAL_CPU) -> Fingerprint:
    """The fingerprint of this machine's processor for so many threads, or of ``cuda:<number>``."""
    system = f"{platform.system()} {platform.machine()}"
    if device != LOCAL_CPU:
        properties = torch.cuda.get_device_properties(device)
        return Fingerprint(
            kind="cuda",
            model=properties.name,
            capability=f"sm_{properties.major}{properties.minor}",
            cores=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30),
            system=system,
            torch=str(torch.__version__),
            threads=threads,
            governor=_gpu_driver(),
        )
    return Fingerprint(
        kind=LOCAL_CPU,
        model=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        system=system,
        torch=str(torch.__version__),
        threads=threads,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    )


def _gpu_driver() -> str:
    found = re.search(r"Module\s+([\d.]+)", _read("/proc/driver/nvidia/version"))
    return f"CUDA {torch.version.cuda}" + (f", driver {found.group(1)}" if found else "")


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _read(path: str) -> str:
    """A file of the system; empty where it is not there."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
