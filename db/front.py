"""The front of one fidelity of a job, kept exact under inserts: what enters, what leaves, at which ``seq``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class FrontChange:
    """An evaluation that entered or left at the commit of the evaluation ``seq``."""

    seq: int
    number: int
    entered: bool


class IncrementalFront:
    """Non-dominated set of feasible finished evaluations; equal points all stay.

    Objectives are oriented so that less is better. A point that the front dominates can never enter later, since
    dominance is transitive and the front only improves: so a whole batch is first held against the front at once, and
    only what survives is inserted one by one, in order, for the exact history.
    """

    def __init__(self, objectives: int) -> None:
        self.numbers: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.points: npt.NDArray[np.float64] = np.empty((0, objectives))

    def __len__(self) -> int:
        return len(self.numbers)

    def restore(self, numbers: Sequence[int], points: npt.NDArray[np.float64]) -> None:
        """Start from members that are known to be one front."""
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.points = np.asarray(points, dtype=np.float64).reshape(len(numbers), self.points.shape[1])

    def insert(self, seqs: Sequence[int], numbers: Sequence[int], points: npt.NDArray[np.float64]) -> list[FrontChange]:
        """Insert finite feasible points ``(n, objectives)`` in order; the changes in order."""
        changes: list[FrontChange] = []
        for i in np.flatnonzero(~self._dominated(points)).tolist():
            point = points[i]
            if self._dominated(point[np.newaxis])[0]:
                continue
            beaten = np.all(point <= self.points, axis=1) & np.any(point < self.points, axis=1)
            changes.append(FrontChange(seqs[i], numbers[i], True))
            changes += [FrontChange(seqs[i], int(n), False) for n in self.numbers[beaten]]
            self.numbers = np.append(self.numbers[~beaten], numbers[i])
            self.points = np.concatenate([self.points[~beaten], point[np.newaxis]])
        return changes

    def _dominated(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which of ``(n, m)`` some member dominates."""
        no_worse = np.ones((len(points), len(self.points)), dtype=bool)
        better = np.zeros_like(no_worse)
        for m in range(self.points.shape[1]):
            column, members = points[:, m, np.newaxis], self.points[np.newaxis, :, m]
            no_worse &= members <= column
            better |= members < column
        return np.asarray((no_worse & better).any(axis=1))
