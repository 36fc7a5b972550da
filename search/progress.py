"""How far a job is: counted as results come, shown by displays."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Progress:
    """What a display shows after each commit."""

    asked: int
    finished: int
    failed: int
    running: int
    budget: int
    elapsed_s: float
    front: Any
    fidelity: int | None
    best: list[float]
    worst: list[float]
    per_second: float = 0.0


class Tally:
    """Counts of a job's results, the extremes of each fidelity, and the rate of this run.

    Args:
        elapsed_s: what earlier runs took.
    """

    def __init__(self, elapsed_s: float) -> None:
        self.finished = 0
        self.done = 0
        self.failed = 0
        self._extremes: dict[int, tuple[list[float], list[float]]] = {}
        self._started = time.monotonic() - elapsed_s
        self._first_new: tuple[int, float] | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on the job, earlier runs included."""
        return time.monotonic() - self._started

    def count(self, state: str, fidelity: int, objectives: Sequence[float] | None, *, new: bool = True) -> None:
        """Take in a finished evaluation; ``new`` ones are of this run."""
        self.finished += 1
        if new and self._first_new is None:
            self._first_new = (self.finished, time.monotonic())
        if state != "done" or objectives is None:
            self.failed += state == "failed"
            return
        self.done += 1
        point = list(objectives)
        best, worst = self._extremes.get(fidelity, (point, point))
        self._extremes[fidelity] = (
            [min(a, b) for a, b in zip(best, point, strict=True)],
            [max(a, b) for a, b in zip(worst, point, strict=True)],
        )

    def progress(self, *, asked: int, running: int, budget: int, front_points: Callable[[int], Any]) -> Progress:
        """As a display wants it.

        Args:
            front_points: oriented objectives of the front of a fidelity.
        """
        fidelity = max(self._extremes, default=None)
        best, worst = self._extremes[fidelity] if fidelity is not None else ([], [])
        return Progress(
            asked=asked,
            finished=self.finished,
            failed=self.failed,
            running=running,
            budget=budget,
            elapsed_s=self.elapsed_s,
            front=None if fidelity is None else front_points(fidelity),
            fidelity=fidelity,
            best=best,
            worst=worst,
            per_second=self._rate(),
        )

    def _rate(self) -> float:
        """Evaluations a second since this run's first result: the seconds that workers take to start do not count."""
        now = time.monotonic()
        if self._first_new is None or now <= self._first_new[1]:
            return 0.0
        return (self.finished - self._first_new[0]) / (now - self._first_new[1])
