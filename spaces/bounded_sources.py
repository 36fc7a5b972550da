"""What draws members of a bounded space without a search: a list of them, or dynamic programming over costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from archfront.spaces.additive import BoundedSums, Sum
from archfront.spaces.product import ColumnSpace
from archfront.spaces.space import Population, Space

Price = Callable[[Population], npt.NDArray[np.int64]]
"""Parameters and multiply-adds of a population: ``(n, 2)``."""

Admit = Callable[[Population], npt.NDArray[np.bool_]]

_QUICKLY_LISTED = 1 << 17
_SLOWLY_LISTED = 256
"""Rows that are listed where each has to be built to be counted."""
_CHUNK = 8192
_CHECKED = 512
"""Random rows whose cost has to be the sum of their columns', before costs are taken for sums."""
_BARREN = 400
_BATCH = 1024
_KEEP = 32.0
"""How much likelier a choice is kept than any other one, where a row is led into the bounds column by column."""


class Source(ABC):
    """Draws members. ``size`` is their number where it is known."""

    size: int | None = None

    @abstractmethod
    def draw(self, rng: np.random.Generator, count: int) -> Population | None:
        """``count`` members, uniform among the rows within the bounds; None where there are none."""

    @abstractmethod
    def near(self, rng: np.random.Generator, row: Population) -> Population | None:
        """One member that shares most decisions with ``(1, columns)``; None where there are none."""


class Listed(Source):
    """All members of a small space."""

    def __init__(self, space: ColumnSpace, rows: Population) -> None:
        self._space, self._rows = space, rows
        self.size = len(np.unique(space.folded(rows), axis=0)) if len(rows) else 0

    def draw(self, rng: np.random.Generator, count: int) -> Population | None:
        if not len(self._rows):
            return None if count else self._rows
        return self._space.folded(self._rows[rng.integers(len(self._rows), size=count)])

    def near(self, rng: np.random.Generator, row: Population) -> Population | None:
        if not len(self._rows):
            return None
        unlike = (self._rows != row).sum(axis=1)
        nearest = np.flatnonzero(unlike == unlike.min())
        chosen = nearest[rng.integers(len(nearest), size=1)]
        return self._space.folded(self._rows[chosen])


class Summed(Source):
    """Members of a space whose costs are sums over its columns."""

    def __init__(self, space: ColumnSpace, sums: BoundedSums, admits: Admit, rows: int) -> None:
        self._space, self._sums, self._admits = space, sums, admits
        members = sums.chance * rows
        # Of rows, which are as many as genotypes where all decisions always count; beyond 2**40 floats lose some.
        counts = bool(space.active(np.zeros((1, len(space.columns)), dtype=np.int16)).all())
        self.size = round(members) if sums.exact and counts and members < 1 << 40 else None

    def draw(self, rng: np.random.Generator, count: int) -> Population | None:
        found = np.empty((0, len(self._space.columns)), dtype=np.int16)
        if not count:
            return found
        if not self._sums.chance:
            return None
        barren, batch = 0, count
        while len(found) < count:
            rows = self._sums.draw(rng, batch)
            # The true costs of what is drawn decide, not the tables'.
            rows = self._space.folded(rows[self._sums.admits(rows)])
            rows = rows[self._admits(rows)]
            found = np.concatenate([found, rows])
            barren = 0 if len(rows) else barren + 1
            if barren > _BARREN:
                return None
            batch = min(_BATCH, 2 * batch)
        return found[:count]

    def near(self, rng: np.random.Generator, row: Population) -> Population | None:
        if not self._sums.chance:
            return None
        for _ in range(_BARREN // 16):
            rows = self._sums.draw(rng, 16, near=np.repeat(row, 16, axis=0), keep=_KEEP)
            rows = self._space.folded(rows[self._sums.admits(rows)])
            rows = rows[self._admits(rows)]
            if len(rows):
                nearest: Population = rows[(rows != row).sum(axis=1).argmin()][np.newaxis]
                return nearest
        return None


def find_source(
    space: Space, price: Price, admits: Admit, bounds: Mapping[str, tuple[int | None, int | None]], *, quick: bool
) -> Source | None:
    """The source for a space, or None where members have to be searched for.

    Args:
        space: the inner space.
        price: of its populations.
        admits: which of a population are members.
        bounds: of ``params`` and ``macs``.
        quick: prices come from a formula.
    """
    if not isinstance(space, ColumnSpace):
        return None
    cardinalities = [len(column.choices) for column in space.columns]
    rows = math.prod(cardinalities)
    if rows <= (_QUICKLY_LISTED if quick else _SLOWLY_LISTED):
        every = np.stack(np.unravel_index(np.arange(rows), cardinalities), axis=1).astype(np.int16)
        chunks = [every[i : i + _CHUNK] for i in range(0, rows, _CHUNK)]
        kept = [chunk[admits(space.folded(chunk))] for chunk in chunks]
        return Listed(space, np.concatenate(kept))
    terms = _terms(space, price, cardinalities) if quick else None
    if terms is None:
        return None
    base, tables = terms
    sums = []
    for i, quantity in enumerate(("params", "macs")):
        least, most = bounds[quantity]
        if (least, most) == (None, None):
            continue
        own = [table[:, i] for table in tables]
        highest = int(base[i]) + sum(int(table.max()) for table in own)
        low = 0 if least is None else least
        high = highest if most is None else most
        sums.append(Sum(terms=own, low=low - int(base[i]), high=high - int(base[i])))
    return Summed(space, BoundedSums(sums), admits, rows)


def _terms(
    space: ColumnSpace, price: Price, cardinalities: list[int]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]] | None:
    """A base cost and what each choice of each column adds, ``(choices, 2)``; None where costs are no such sums."""
    zeros = np.zeros((1, len(cardinalities)), dtype=np.int16)
    base = price(space.folded(zeros))[0]
    tables = []
    for column, choices in enumerate(cardinalities):
        rows = np.repeat(zeros, choices, axis=0)
        rows[:, column] = np.arange(choices)
        tables.append(price(space.folded(rows)) - base)
    rng = np.random.default_rng(0)
    rows = (rng.random((_CHECKED, len(cardinalities))) * cardinalities).astype(np.int16)
    total = base + sum(table[rows[:, column]] for column, table in enumerate(tables))
    return (base, tables) if np.array_equal(total, price(space.folded(rows))) else None
