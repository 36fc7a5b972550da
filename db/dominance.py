"""Pareto dominance on matrices of objectives that are all minimised: pure functions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import moocore
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

# Sets of more points are thinned out first, by some of the front of a sample, while each takes a twentieth at least.
_FEW, _SAMPLE, _STRONG, _WORTH_IT = 20_000, 2_000, 8, 0.95
_MANY, _PARTS = 200_000, 4
"""Larger sets are dealt out to threads: what a part's front leaves out, some member of it dominates."""


def nondominated(points: Points) -> npt.NDArray[np.bool_]:
    """Which rows of ``(n, m)`` no other row dominates; equal rows do not dominate each other, so all of them stay."""
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    if points.shape[1] == 1:
        return np.asarray(points[:, 0] == points[:, 0].min())
    kept = _not_clearly_dominated(points)
    found = np.zeros(len(points), dtype=bool)
    finite = _finite(points[kept])
    if len(finite) > _MANY:
        parts = [np.arange(first, len(finite), _PARTS) for first in range(_PARTS)]
        with ThreadPoolExecutor(_PARTS) as threads:
            masks = threads.map(lambda part: moocore.is_nondominated(finite[part], keep_weakly=True), parts)
            left = np.concatenate([part[mask] for part, mask in zip(parts, masks, strict=True)])
        kept, finite = kept[left], finite[left]
    found[kept] = moocore.is_nondominated(finite, keep_weakly=True)
    return found


def nondominated_ranks(points: Points) -> npt.NDArray[np.int64]:
    """Rank of each row: 0 for the front, 1 for the front of what is left without it, and so on (Deb et al., 2002)."""
    if len(points) == 0:
        return np.zeros(0, dtype=np.int64)
    if points.shape[1] == 1:
        return np.unique(points[:, 0], return_inverse=True)[1].astype(np.int64)
    return np.asarray(moocore.pareto_rank(_finite(points)), dtype=np.int64)


def _not_clearly_dominated(points: Points) -> npt.NDArray[np.int64]:
    """Indices of the rows left when a few strong ones have thrown out what they dominate: that can neither be in the
    front nor, dominance being transitive, keep anything out of it. Where little can be thrown out, little is tried."""
    left = np.arange(len(points))
    if len(points) < _FEW:
        return left
    sample = points[:: len(points) // _SAMPLE]
    best = sample[nondominated(sample)]
    with np.errstate(invalid="ignore"):  # infinities: such a row may be tried first or last
        lowest, extent = sample.min(axis=0), np.ptp(sample, axis=0)
        central = np.argsort(((best - lowest) / np.where(extent > 0, extent, 1)).sum(axis=1))
    for row in best[central[:_STRONG]]:
        if (sample >= row).all(axis=1).mean() < 1 - _WORTH_IT:
            break
        no_better, equal = np.ones(len(points), dtype=bool), np.ones(len(points), dtype=bool)
        for m, value in enumerate(row):
            no_better &= points[:, m] >= value
            equal &= points[:, m] == value
        kept = ~no_better | equal
        before = len(points)
        left, points = left[kept], points[kept]
        if len(points) > before * _WORTH_IT:
            break
    return left


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
