"""What the driver tells the process that runs Ray Tune. Plain data, for both sides of the pipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from archfront.evaluators.evaluator import Task
from archfront.search.executors.ray_options import PoolOptions


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """How to run a job's evaluations on Tune.

    Attributes:
        address: of a Ray cluster; None for one of the gateway's own.
        local_cpus: cores of an own cluster.
        pool: what trials take, and how many run at a time.
        scheduler: name and arguments, all of them (``scheduler_settings``).
        objectives: of the job: ``(metric, -1 for one to maximise, else 1)``.
        metric: the one that the scheduler looks at; None if it looks at none.
        needed: metrics without which, or with one not finite, an evaluation has failed.
        fidelities: of the job, rising; one for a job without.
        seed: of what is random in a scheduler.
    """

    address: str | None
    local_cpus: int
    pool: PoolOptions
    scheduler: Mapping[str, Any]
    objectives: Sequence[tuple[str, int]]
    metric: str | None
    needed: Sequence[str]
    fidelities: Sequence[int]
    seed: int

    def judged(self, values: Sequence[float]) -> float:
        """What the scheduler sees of oriented objectives; 0 if it looks at none."""
        for (name, sign), value in zip(self.objectives, values, strict=True):
            if name == self.metric:
                return sign * value
        return 0.0


class Past(NamedTuple):
    """A finished evaluation and the number that the scheduler judges it by; None where it failed."""

    task: Task
    value: float | None
