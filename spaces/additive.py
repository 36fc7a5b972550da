"""Uniform draws from the rows of a product whose sums of costs lie within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archfront.spaces.space import Population

Ints = npt.NDArray[np.int64]

_CELLS = 1 << 18
"""Of the grid of partial sums; a table of so many floats is kept for each column."""


@dataclass(frozen=True, kw_only=True)
class Sum:
    """One cost that is a sum over columns, and its bounds.

    Attributes:
        terms: for each column ``(choices,)`` what each choice adds.
        low, high: the least and the most that the sum may be, both included.
    """

    terms: Sequence[Ints]
    low: int
    high: int


class BoundedSums:
    """Draws rows of choice indices whose sums lie within their bounds: by dynamic programming, uniformly.

    For each column and each partial sum the table holds the probability that uniform choices in the columns that
    follow end within the bounds; a draw goes through the columns and weighs each choice by it. Sums are exact where
    the costs' common divisor leaves a small enough grid. Elsewhere each cost is rounded down to a coarser one, the
    bounds are widened by the most that the rounding can hide, and what then lies outside the true bounds is thrown
    away: the others are still uniform. Probabilities are float64, so uniform to about 1e-13.

    Args:
        sums: one or two.
        cells: of the grid.

    Attributes:
        feasible: the bounds overlap what each sum can be.
        exact: nothing is rounded, so nothing is thrown away.
        chance: probability that a uniform row is within the widened bounds, at least that of the true ones.
    """

    def __init__(self, sums: Sequence[Sum], cells: int = _CELLS) -> None:
        self._sums = sums
        axes = [_Axis(s) for s in sums]
        self.feasible = all(axis.feasible for axis in axes)
        self._columns = len(sums[0].terms)
        self.chance, self.exact = 0.0, True
        if not self.feasible:
            return
        _share(axes, cells, self._columns)
        self._steps = [np.stack([axis.steps[c] for axis in axes]) for c in range(self._columns)]  # (axes, choices)
        self._shape = tuple(axis.cells for axis in axes)
        self._tables = self._filled([axis.within() for axis in axes])
        self.chance = float(self._tables[0].flat[0])
        self.exact = all(axis.unit == axis.divisor for axis in axes)

    def draw(
        self, rng: np.random.Generator, count: int, near: Population | None = None, keep: float = 1.0
    ) -> Population:
        """``(count, columns)`` rows within the widened bounds, uniformly.

        Args:
            near: rows of the same shape; the choice that stands there is ``keep`` times as likely as it would be.
            keep: see ``near``.

        Raises:
            ValueError: there are none (``chance`` is 0).
        """
        if not self.chance:
            raise ValueError("no row is within the bounds")
        rows = np.empty((count, self._columns), dtype=np.int16)
        at = np.zeros((len(self._shape), count, 1), dtype=np.int64)
        size = np.array(self._shape, dtype=np.int64).reshape(-1, 1, 1)
        for column, steps in enumerate(self._steps):
            after = at + steps[:, np.newaxis, :]  # (axes, count, choices)
            inside = (after < size).all(axis=0)
            table = self._tables[column + 1]
            weights = np.where(inside, table[tuple(np.minimum(after, size - 1))], 0.0)
            if near is not None:
                weights[np.arange(count), near[:, column]] *= keep
            weights = weights.cumsum(axis=1)
            chosen = (rng.random((count, 1)) * weights[:, -1:] >= weights).sum(axis=1)
            rows[:, column] = chosen
            at = np.take_along_axis(after, chosen[np.newaxis, :, np.newaxis], axis=2)
        return rows

    def admits(self, rows: Population) -> npt.NDArray[np.bool_]:
        """``(n,)``: which rows are within the true bounds."""
        found = np.ones(len(rows), dtype=bool)
        for one in self._sums:
            total = np.sum([terms[rows[:, c]] for c, terms in enumerate(one.terms)], axis=0)
            found &= (total >= one.low) & (total <= one.high)
        return found

    def _filled(self, within: Sequence[npt.NDArray[np.float64]]) -> list[npt.NDArray[np.float64]]:
        last = within[0] if len(within) == 1 else np.multiply.outer(within[0], within[1])
        tables = [last]
        for steps in reversed(self._steps):
            table = np.zeros(self._shape)
            distinct, repeats = np.unique(steps, axis=1, return_counts=True)
            for step, repeat in zip(distinct.T.tolist(), repeats.tolist(), strict=True):
                if all(s < size for s, size in zip(step, self._shape, strict=True)):
                    to = tuple(slice(0, size - s) for s, size in zip(step, self._shape, strict=True))
                    table[to] += tables[-1][tuple(slice(s, None) for s in step)] * repeat
            tables.append(table / steps.shape[1])
        return tables[::-1]


class _Axis:
    """One sum, turned and shifted so that partial sums begin at 0 and the bound that cuts them off is near."""

    def __init__(self, one: Sum) -> None:
        least, most = (sum(int(f(terms)) for terms in one.terms) for f in (np.min, np.max))
        low, high = max(one.low, least), min(one.high, most)
        self.feasible = low <= high
        # From the far end where that is nearer: the grid need not reach further than the bound.
        if most - low < high - least:
            self._terms = [int(terms.max()) - terms for terms in one.terms]
            self.low, self.high = most - high, most - low
        else:
            self._terms = [terms - int(terms.min()) for terms in one.terms]
            self.low, self.high = low - least, high - least
        self.divisor = max(1, math.gcd(*(int(t) for terms in self._terms for t in terms)))
        self.unit = self.divisor

    @property
    def cells(self) -> int:
        return self.high // self.unit + 1

    @property
    def steps(self) -> list[Ints]:
        return [terms // self.unit for terms in self._terms]

    def within(self) -> npt.NDArray[np.float64]:
        """``(cells,)``: 1 where a sum of rounded costs may hide one within the bounds."""
        hidden = sum(int((terms % self.unit).max()) for terms in self._terms)
        cells = np.arange(self.cells)
        return (cells * self.unit + hidden >= self.low).astype(np.float64)


def _share(axes: Sequence[_Axis], cells: int, columns: int) -> None:
    """Choose each axis' unit, so that the grid has at most about ``cells`` cells and little is thrown away."""
    open_axes = list(axes)
    while open_axes:
        left = cells / math.prod(axis.cells for axis in axes if axis not in open_axes)
        # Rounding widens a window by up to columns * unit: the same part of each window.
        ratios = [(axis.high + 1) / (axis.high - axis.low + columns) for axis in open_axes]
        scale = (math.prod(ratios) / left) ** (1 / len(open_axes))
        units = [max(1, math.ceil(scale * (axis.high - axis.low + columns))) for axis in open_axes]
        fine = [axis for axis, unit in zip(open_axes, units, strict=True) if unit <= axis.divisor]
        if not fine:
            for axis, unit in zip(open_axes, units, strict=True):
                axis.unit = unit
            return
        open_axes = [axis for axis in open_axes if axis not in fine]
