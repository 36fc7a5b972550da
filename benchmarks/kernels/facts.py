"""The machine, the versions and the state of the card, which is read and never set."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[2]
_STATE = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "utilization.gpu")


def facts(device: torch.device) -> dict[str, Any]:
    """What every figure is of."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "l2_bytes": int(torch.cuda.get_device_properties(device).L2_cache_size) if on_gpu else None,
        "driver": _queried("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,  # type: ignore[no-untyped-call]
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "sources": sources(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def card_state() -> dict[str, str] | None:
    """Clocks, power and temperature of the first GPU now; None without ``nvidia-smi``."""
    line = _queried(",".join(_STATE))
    return None if line is None else dict(zip(_STATE, (part.strip() for part in line.split(",")), strict=False))


def sources() -> str:
    """A hash of the kernels, for machines that have the files alone and no history."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _queried(fields: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "kernels")
    return f"{commit} and changes" if changed else commit


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
