"""Pareto dominance on matrices of objectives that are all minimised: pure functions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import moocore
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

_FEW = 20_000
"""Larger sets are thinned out first, on a grid of so many cells at most."""

_CELLS, _WORTH_IT = 2**20, 0.75
_MANY, _PARTS = 200_000, 4
"""Larger sets are dealt out to threads: what a part's front leaves out, some member of it dominates."""


def nondominated(points: Points) -> npt.NDArray[np.bool_]:
    """Which rows of ``(n, m)`` no other row dominates; equal rows do not dominate each other, so all of them stay."""
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    if points.shape[1] == 1:
        return np.asarray(points[:, 0] == points[:, 0].min())
    points = _finite(points)
    kept = _not_clearly_dominated(points)
    found = np.zeros(len(points), dtype=bool)
    points = points[kept]
    if len(points) > _MANY:
        parts = [np.arange(first, len(points), _PARTS) for first in range(_PARTS)]
        with ThreadPoolExecutor(_PARTS) as threads:
            masks = threads.map(lambda part: moocore.is_nondominated(points[part], keep_weakly=True), parts)
            left = np.concatenate([part[mask] for part, mask in zip(parts, masks, strict=True)])
        kept, points = kept[left], points[left]
    found[kept] = moocore.is_nondominated(points, keep_weakly=True)
    return found


def nondominated_ranks(points: Points) -> npt.NDArray[np.int64]:
    """Rank of each row: 0 for the front, 1 for the front of what is left without it, and so on (Deb et al., 2002)."""
    if len(points) == 0:
        return np.zeros(0, dtype=np.int64)
    if points.shape[1] == 1:
        return np.unique(points[:, 0], return_inverse=True)[1].astype(np.int64)
    return np.asarray(moocore.pareto_rank(_finite(points)), dtype=np.int64)


def _not_clearly_dominated(points: Points) -> npt.NDArray[np.int64]:
    """Indices of the rows left when those are gone that a look at a grid of cells shows to be dominated: some row lies
    in a cell that is lower in every objective. Such a row can neither be in the front nor, dominance being transitive,
    keep anything out of it."""
    if len(points) < _FEW:
        return np.arange(len(points))
    bins = max(int(_CELLS ** (1 / points.shape[1]) + 1e-9), 2)
    if bins ** points.shape[1] > _CELLS:
        return np.arange(len(points))
    left = _in_undominated_cells(points, bins, _even_bins)
    if len(left) > _WORTH_IT * len(points):
        # Values that crowd together share few even cells. Finding crowds costs more, so it is tried second.
        left = _in_undominated_cells(points, bins, _crowded_bins)
    return left


def _in_undominated_cells(
    points: Points, bins: int, cut: Callable[[npt.NDArray[np.float64], int], npt.NDArray[np.int32]]
) -> npt.NDArray[np.int64]:
    cell = np.zeros(len(points), dtype=np.int32)
    for column in points.T:
        cell *= bins
        cell += cut(column, bins)
    shape = (bins,) * points.shape[1]
    reached = np.zeros(shape, dtype=bool)
    reached.reshape(-1)[cell] = True
    for axis in range(len(shape)):
        # Layer by layer, since numpy's accumulate goes number by number.
        layers = np.moveaxis(reached, axis, 0)
        for below, layer in pairwise(layers):
            layer |= below
    dominated = np.zeros(shape, dtype=bool)
    dominated[(slice(1, None),) * len(shape)] = reached[(slice(None, -1),) * len(shape)]
    return np.flatnonzero(~dominated.reshape(-1)[cell])


def _even_bins(column: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int32]:
    lowest, highest = float(column.min()), float(column.max())
    scale = bins / (highest - lowest) if highest > lowest else 0.0
    if not 0.0 < scale < np.inf:  # one value, or an extent beyond floating point
        return np.zeros(len(column), dtype=np.int32)
    return np.minimum(((column - lowest) * scale).astype(np.int32), bins - 1)


def _crowded_bins(column: npt.NDArray[np.float64], bins: int) -> npt.NDArray[np.int32]:
    sample = column[:: max(len(column) // 4000, 1)]
    edges = np.unique(np.quantile(sample, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, column, side="right").astype(np.int32)


def _finite(points: Points) -> Points:
    """The same order without infinities, which moocore 0.3 gets wrong: each column becomes its dense ranks."""
    if np.isfinite(points).all():
        return points
    ranks = [np.unique(column, return_inverse=True)[1] for column in points.T]
    return np.stack(ranks, axis=1).astype(np.float64)


def crowding_distance(points: Points) -> npt.NDArray[np.float64]:
    """Crowding distance of each row within one front ``(n, m)``; infinite at the ends (Deb et al., 2002)."""
    count, objectives = points.shape
    distance = np.zeros(count)
    if count <= 2:
        return np.full(count, np.inf)
    for m in range(objectives):
        order = np.argsort(points[:, m], kind="stable")
        column = points[order, m]
        extent = column[-1] - column[0]
        distance[order[[0, -1]]] = np.inf
        if extent > 0:
            distance[order[1:-1]] += (column[2:] - column[:-2]) / extent
    return distance


def hypervolume(points: Points, reference: npt.ArrayLike) -> float:
    """Volume that the rows dominate below the reference point; rows that do not lie below it add nothing."""
    if len(points) == 0:
        return 0.0
    return float(moocore.hypervolume(points, ref=np.asarray(reference, dtype=np.float64)))
