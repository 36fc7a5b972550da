"""A Gaussian process that foresees objectives from a space's features, for strategies that choose before they pay.

Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), equations 2.25 (mean) and 5.12 (leave-one-out
predictions). What it is good for is order, so scale and kernel are those whose leave-one-out predictions rank best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky
from scipy.spatial.distance import cdist
from scipy.stats import norm, rankdata

Floats = npt.NDArray[np.float64]

_LENGTHS = (0.5, 1.0, 2.0)
_NOISES = (1e-3, 3e-2)


@dataclass(frozen=True)
class Kernel:
    """A linear and a squared-exponential part of equal weight, and independent noise.

    Attributes:
        length: of the second part, as a part of the root mean square distance between rows.
        noise: variance beside the values' own of 1.
    """

    length: float
    noise: float

    def between(self, first: Floats, second: Floats, spread: float) -> Floats:
        """``(n, m)`` covariances of rows of ``(n, features)`` and ``(m, features)``."""
        linear = first @ second.T / max(spread, 1e-12)
        squares = cdist(first, second, "sqeuclidean") / max(2 * spread, 1e-12)
        return np.asarray(0.5 * linear + 0.5 * np.exp(-0.5 * squares / self.length**2))


class Surrogate:
    """Fitted to values of one objective.

    Args:
        features: ``(n, features)``.
        values: ``(n,)``, finite.
        kernel: as an earlier fit to fewer rows chose it; chosen here if None.
        plain: keep the values' own scale; else the one is chosen that is foreseen best.

    Attributes:
        kernel: the one that is used.
        agreement: Spearman's correlation of the leave-one-out predictions with the values.
    """

    def __init__(self, features: Floats, values: Floats, kernel: Kernel | None = None, *, plain: bool = False) -> None:
        self._center = features.mean(axis=0)
        self._rows = features - self._center
        self._spread = float(np.square(self._rows).sum(axis=1).mean())
        self._mean, self._deviation = float(values.mean()), float(values.std()) or 1.0
        ranks = rankdata(values)
        best: tuple[float, Kernel, Floats] | None = None
        for tried in _kernels() if kernel is None else [kernel]:
            covariance = tried.between(self._rows, self._rows, self._spread)
            covariance[np.diag_indices_from(covariance)] += tried.noise
            inverse = cho_solve((cholesky(covariance, lower=True), True), np.eye(len(values)))
            for scaled in [_standard(values)] if plain else _scales(values):
                weights = inverse @ scaled
                left_out = scaled - weights / np.diag(inverse)
                agreement = _correlation(rankdata(left_out), ranks)
                if best is None or agreement > best[0] + 1e-9:
                    best = agreement, tried, weights
        assert best is not None
        self.agreement, self.kernel, self._weights = best

    def predict(self, features: Floats) -> Floats:
        """``(n,)`` on a scale of its own, in which less is less; that of ``standard`` if fitted ``plain``."""
        found: Floats = self.kernel.between(features - self._center, self._rows, self._spread) @ self._weights
        return found

    def standard(self, value: float) -> float:
        return (value - self._mean) / self._deviation


def _kernels() -> Iterator[Kernel]:
    for noise in _NOISES:
        for length in _LENGTHS:
            yield Kernel(length, noise)


def _scales(values: Floats) -> Iterator[Floats]:
    """The values, their logarithms where all are positive, and the normal scores of their ranks; standardised."""
    yield _standard(values)
    if values.min() > 0:
        yield _standard(np.log(values))
    yield _standard(np.asarray(norm.ppf((rankdata(values) - 0.5) / len(values))))


def _standard(values: Floats) -> Floats:
    spread = values.std()
    return np.asarray((values - values.mean()) / (spread if spread > 0 else 1.0))


def _correlation(first: Floats, second: Floats) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float(first @ second) / size if size > 0 else 0.0
