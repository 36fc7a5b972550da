"""How the rows of several spaces make the rows of one population."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archfront.spaces.product import ColumnSpace
from archfront.spaces.space import Population, Space


class Packing:
    """Populations of several spaces side by side, as one.

    Where all of them are matrices of choice indices it is one such matrix, else an ``(n, spaces)`` matrix of objects:
    a row that is an array itself as a tuple, and None where a row does not count.

    Args:
        spaces: of the parts.
    """

    def __init__(self, spaces: Sequence[Space]) -> None:
        self._spaces = spaces
        self.matrix = all(isinstance(space, ColumnSpace) for space in spaces)
        empty = [space.sample(np.random.default_rng(0), 0) for space in spaces]
        self._forms = [(rows.shape[1:], rows.dtype) for rows in empty]
        self._fillers: dict[int, Population] = {}

    def split(self, population: Population) -> list[Population]:
        """The population of each space, ``n`` rows each; any member of the space stands where a row is None."""
        if self.matrix:
            ends = np.cumsum([shape[0] for shape, _ in self._forms])
            return np.split(population, ends[:-1], axis=1)
        parts = []
        for i in range(len(self._spaces)):
            entries = population[:, i]
            given = np.array([entry is not None for entry in entries], dtype=bool)
            parts.append(self.spread(i, self._unpacked(i, entries[given]), given))
        return parts

    def join(self, parts: Sequence[Population], active: npt.NDArray[np.bool_]) -> Population:
        """The inverse of ``split``.

        Args:
            parts: ``n`` rows of each space.
            active: ``(n, spaces)``; what does not count becomes None, in a matrix of indices the first choices.
        """
        if self.matrix:
            kept = [np.where(active[:, i : i + 1], rows, 0) for i, rows in enumerate(parts)]
            return np.concatenate(kept, axis=1).astype(np.int16)
        population = np.empty(active.shape, dtype=object)
        for i, rows in enumerate(parts):
            packed = rows.tolist() if rows.ndim > 1 else rows
            for row in np.flatnonzero(active[:, i]).tolist():
                population[row, i] = tuple(packed[row]) if rows.ndim > 1 else packed[row]
        return population

    def spread(self, i: int, rows: Population, given: npt.NDArray[np.bool_]) -> Population:
        """Rows of space ``i`` at the places that are given, any member of the space at the others."""
        if given.all():
            return rows
        if i not in self._fillers:
            self._fillers[i] = self._spaces[i].sample(np.random.default_rng(0), 1)
        whole: Population = np.repeat(self._fillers[i], len(given), axis=0)
        whole[given] = rows
        return whole

    def _unpacked(self, i: int, entries: Population) -> Population:
        shape, dtype = self._forms[i]
        rows: Population = np.empty((len(entries), *shape), dtype=dtype)
        if not shape:
            return entries
        if dtype.kind != "O":
            return np.array(entries.tolist(), dtype=dtype).reshape(-1, *shape)
        for row, entry in enumerate(entries):
            for column, value in enumerate(entry):  # at once, numpy would take tuples for rows
                rows[row, column] = value
        return rows
