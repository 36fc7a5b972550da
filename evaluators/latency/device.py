"""What a latency holds for: a device's fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

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
    """

    kind: str
    model: str
    capability: str
    cores: int
    memory_gib: int
    system: str
    torch: str
    threads: int

    @property
    def digest(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "digest": self.digest}


@lru_cache(maxsize=8)
def fingerprint(threads: int) -> Fingerprint:
    """The fingerprint of this machine's processor for so many threads."""
    return Fingerprint(
        kind=LOCAL_CPU,
        model=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        system=f"{platform.system()} {platform.machine()}",
        torch=str(torch.__version__),
        threads=threads,
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
