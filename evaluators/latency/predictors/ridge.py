"""Ridge regression whose penalty the data choose, by how well left-out rows are predicted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archfront.evaluators.latency.predictors.predictor import Vector

_PENALTIES = np.geomspace(1e-4, 1e2, 13)
"""Shares of the features' mean square."""


def ridge(features: npt.NDArray[np.float64], targets: Vector) -> Vector:
    """Coefficients ``(p,)`` of features ``(n, p)``; zeros where no penalty predicts left-out targets better than that.

    Left-out errors are those of the closed form, ``residual / (1 - leverage)``.
    """
    left, scales, right = np.linalg.svd(features, full_matrices=False)
    rotated = left.T @ targets
    least, best = float((targets**2).mean()), np.zeros(features.shape[1])
    if not scales.any():
        return best
    for penalty in _PENALTIES * float((scales**2).mean()):
        shrunk = scales**2 / (scales**2 + penalty)
        leverage = (left**2) @ shrunk
        errors = (targets - left @ (shrunk * rotated)) / np.maximum(1 - leverage, 1e-9)
        if (error := float((errors**2).mean())) < least:
            least, best = error, right.T @ (shrunk * rotated / np.where(scales > 0, scales, 1.0))
    return best
