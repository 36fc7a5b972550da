"""Binding the measuring process to processors, so that the scheduler does not move it while it is measured."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

PROCESSORS = Path("/sys/devices/system/cpu")

_SAMPLE_S = 0.2
_FAST = 0.8
"""Cores below this share of the fastest one's clock are of a slower kind, such as efficiency cores."""


@dataclass(frozen=True, kw_only=True)
class Core:
    """A physical core.

    Attributes:
        cpus: the logical processors on it that may be used, in order.
        package: its socket.
        busy: share of time for which it was busy, of its busiest processor.
        slow: of a slower kind than others.
    """

    cpus: tuple[int, ...]
    package: int
    busy: float
    slow: bool


def pin(threads: int, processors: Path = PROCESSORS) -> list[int] | None:
    """Bind this process, and the threads that it will start, to as many processors as it has threads.

    Returns:
        The processors, sorted; None where the system cannot bind.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    if threads < len(allowed):
        chosen = choose(_cores(allowed, _busy(allowed), processors), threads)
        try:
            os.sched_setaffinity(0, chosen)
        except OSError:
            return None
    return sorted(os.sched_getaffinity(0))


def choose(cores: Collection[Core], threads: int) -> list[int]:
    """The processors for so many threads: of the fast kind, each on a core of its own, in one socket, least busy; of
    equals the last, since systems put their own work on the first."""
    rest = [core for core in cores if not core.slow] or list(cores)
    if len(rest) < threads:
        rest = list(cores)
    packages: dict[int, list[Core]] = {}
    for core in rest:
        packages.setdefault(core.package, []).append(core)
    ordered = [sorted(members, key=_rank)[:threads] for members in packages.values()]
    full = [members for members in ordered if len(members) == threads]
    if full:
        best = min(full, key=lambda members: (sum(_tenths(core) for core in members), -members[0].cpus[0]))
    else:
        best = sorted(rest, key=_rank)[:threads]
    found = [core.cpus[0] for core in best]
    # More threads than cores: their other processors too.
    found += [cpu for core in best for cpu in core.cpus[1:]]
    return sorted(found[:threads])


def _rank(core: Core) -> tuple[int, int]:
    return _tenths(core), -core.cpus[0]


def _tenths(core: Core) -> int:
    # In steps: a difference of a few percent in a short sample is chance.
    return round(core.busy * 10)


def _busy(allowed: Collection[int]) -> dict[int, float]:
    """Busy share of each processor over a short while; empty where the system does not tell by number."""
    shares = psutil.cpu_percent(_SAMPLE_S, percpu=True)
    return dict(enumerate(share / 100 for share in shares)) if max(allowed) < len(shares) else {}


def _cores(allowed: Collection[int], busy: Mapping[int, float], processors: Path) -> list[Core]:
    """The cores on which processors may be used, as the system's files tell; a core for each processor without them."""
    found: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(allowed):
        siblings = tuple(_numbers(_read(processors / f"cpu{cpu}" / "topology" / "thread_siblings_list"))) or (cpu,)
        found.setdefault(siblings, []).append(cpu)
    clocks = {siblings: _clock(processors / f"cpu{siblings[0]}") for siblings in found}
    fastest = max(clocks.values())
    return [
        Core(
            cpus=tuple(cpus),
            package=int(_read(processors / f"cpu{cpus[0]}" / "topology" / "physical_package_id") or 0),
            # A sibling that may not be used slows the core all the same.
            busy=max(busy.get(cpu, 0.0) for cpu in (*siblings, *cpus)),
            slow=clocks[siblings] < _FAST * fastest,
        )
        for siblings, cpus in found.items()
    ]


def _clock(processor: Path) -> int:
    """A measure of a processor's speed: its capacity on ARM, else its highest clock; 0 where the system is silent."""
    return int(_read(processor / "cpu_capacity") or _read(processor / "cpufreq" / "cpuinfo_max_freq") or 0)


def _numbers(text: str) -> list[int]:
    """``0,4-6`` as 0, 4, 5, 6."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
