"""Conformal intervals: from the errors on data that a predictor has not seen to intervals that hold what they promise.

Sources: Lei et al., "Distribution-Free Predictive Inference for Regression", JASA 2018 (split, with normalised scores);
Barber et al., "Predictive inference with the jackknife+", Annals of Statistics 2021 (CV+); Dunn et al.,
"Distribution-Free Prediction Sets for Two-Layer Hierarchical Models", JASA 2023 (pooling over groups).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError

Vector = npt.NDArray[np.float64]

_CHUNK = 2**22
"""Elements of the largest array that ``cv_plus`` makes."""


def check_confidence(confidence: float) -> None:
    """
    Raises:
        InputError: it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError("confidence", confidence, "is not between 0 and 1", "Give for example 0.9.")


def conformal_quantile(scores: npt.ArrayLike, confidence: float) -> float:
    """The bound that the score of one more exchangeable network stays within with this probability.

    It is the ``ceil((n + 1) * confidence)``-th smallest score, so that it holds for every ``n``; infinite where ``n``
    scores are too few to promise anything.

    Args:
        scores: ``(n,)``, larger for worse predictions, e.g. ``|measured - predicted| / predicted``.
        confidence: between 0 and 1.
    """
    check_confidence(confidence)
    values = np.sort(_scores(scores))
    rank = _rank(len(values), confidence)
    return float(values[rank - 1]) if rank <= len(values) else math.inf


def pooled_quantile(groups: Sequence[npt.ArrayLike], confidence: float) -> float:
    """As ``conformal_quantile`` where scores come in groups, e.g. devices, and the next one is of a group not seen.

    The groups' distributions are averaged, each with the same weight however many scores it has. Exact only for many
    groups: with few the next one may differ from all of them.

    Args:
        groups: of each the scores, at least one.
        confidence: between 0 and 1.
    """
    check_confidence(confidence)
    arrays = [values for group in groups if len(values := _scores(group))]
    if not arrays:
        return math.inf
    values = np.concatenate(arrays)
    weights = np.concatenate([np.full(len(array), 1 / len(array)) for array in arrays]) / len(arrays)
    order = np.argsort(values, kind="stable")
    # A sum of weights that should be exactly the confidence may fall a rounding error short of it.
    place = int(np.searchsorted(np.cumsum(weights[order]), confidence - 1e-12))
    return float(values[order[min(place, len(values) - 1)]])


def split_interval(predicted: Vector, quantile: float, scale: Vector | None = None) -> tuple[Vector, Vector]:
    """``predicted -+ quantile * scale``, not below 0; the scale is ``(n,)``, by default the prediction itself."""
    width = quantile * (predicted if scale is None else scale)
    return np.maximum(predicted - width, 0.0), predicted + width


def cv_plus(
    predictions: Vector, folds: npt.NDArray[np.int64], scores: Vector, confidence: float
) -> tuple[Vector, Vector]:
    """CV+ intervals with relative scores; each fold's model is scored only on what it was not fitted to.

    In the worst case of unstable models it covers ``2 * confidence - 1``; for stable ones ``confidence``.

    Args:
        predictions: ``(folds, n)`` of the model fitted without each fold, positive.
        folds: ``(m,)`` the fold of each measured network.
        scores: ``(m,)``, ``|measured - predicted| / predicted`` by the model fitted without its fold.
        confidence: between 0 and 1.

    Returns:
        lower and upper bounds ``(n,)``; 0 and infinity where the measured networks are too few.
    """
    check_confidence(confidence)
    errors = _scores(scores)
    rank, n = _rank(len(errors), confidence), predictions.shape[1]
    low, high = np.zeros(n), np.full(n, math.inf)
    if rank > len(errors):
        return low, high
    step = max(1, _CHUNK // len(errors))
    for start in range(0, n, step):
        centres = predictions[:, start : start + step][folds]
        # The rank-th smallest upper end, and by symmetry the rank-th largest lower end.
        high[start : start + step] = np.partition(centres * (1 + errors)[:, None], rank - 1, axis=0)[rank - 1]
        below = np.partition(centres * (1 - errors)[:, None], len(errors) - rank, axis=0)[len(errors) - rank]
        low[start : start + step] = np.maximum(below, 0.0)
    return low, high


def _rank(count: int, confidence: float) -> int:
    # Without the allowance 10 * 0.9 may round to just above 9 and ask for the tenth.
    return max(1, math.ceil((count + 1) * confidence - 1e-9))


def _scores(scores: npt.ArrayLike) -> Vector:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise InputError("scores", values.shape, "are not a row of numbers", "Give (n,) without NaN.")
    return values
