"""A Gaussian process that foresees objectives from a space's features, for strategies that choose before they pay.

Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), equations 2.25 (mean) and 5.12 (leave-one-out
predictions). What it is good for is order, so scale and kernel are those whose leave-one-out predictions rank best. One
of the scales is the ratio to what adds up over decisions (``additive``): where values nearly do, a hundred evaluations
say more so than a thousand without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky
from scipy.spatial.distance import cdist
from scipy.stats import norm, rankdata

from archfront.search.strategies.additive import Additive, Decisions, Form, best_form

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LENGTHS = (0.5, 1.0, 2.0)
_NOISES = (1e-3, 3e-2)

_LEAST = 5
"""Positive values that a sum is fitted to."""

_WORTH = 0.7
"""Part of the disorder (one less the agreement) of the other scales that a sum may leave at most."""


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


@dataclass(frozen=True)
class Choice:
    """What a fit to fewer rows chose.

    Attributes:
        form: of the additive part; None where values or space have none.
    """

    kernel: Kernel
    form: Form | None = None


@dataclass(frozen=True)
class Rows:
    """Candidates as a surrogate sees them.

    Attributes:
        features: ``(n, features)``.
        choices: ``(n, columns)`` of a space of columns, else None.
    """

    features: Floats
    choices: Ints | None = None

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> Rows:
        return Rows(self.features[:count], None if self.choices is None else self.choices[:count])


class Surrogate:
    """Fitted to values of one objective.

    Args:
        rows: of the candidates.
        values: ``(n,)``, finite.
        choice: as an earlier fit to fewer rows made it; made here if None.
        plain: keep the values' own scale; else the one is chosen that is foreseen best.
        decisions: what the columns of ``rows.choices`` are.

    Attributes:
        choice: the one that is used.
        agreement: Spearman's correlation of the leave-one-out predictions with the values.
    """

    def __init__(
        self,
        rows: Rows,
        values: Floats,
        choice: Choice | None = None,
        *,
        plain: bool = False,
        decisions: Decisions | None = None,
    ) -> None:
        self._center = rows.features.mean(axis=0)
        self._rows = rows.features - self._center
        self._spread = float(np.square(self._rows).sum(axis=1).mean())
        self._mean, self._deviation = float(values.mean()), float(values.std()) or 1.0
        form = None if choice is None else choice.form
        scales = [_Scale(_standard(values))] if plain else list(_scales(values))
        known = values > 0
        adds_up = not plain and (choice is None or form is not None) and values.min() >= 0 and known.sum() >= _LEAST
        if adds_up and decisions is not None and rows.choices is not None:
            form = best_form(rows.choices[known], values[known], decisions) if form is None else form
            scales.append(_beside_sum(rows.choices, values, decisions, form))
        ranks = rankdata(values)
        best: tuple[float, Kernel, _Scale, Floats] | None = None
        least = np.inf
        for tried in _kernels() if choice is None else [choice.kernel]:
            covariance = tried.between(self._rows, self._rows, self._spread)
            covariance[np.diag_indices_from(covariance)] += tried.noise
            inverse = cho_solve((cholesky(covariance, lower=True), True), np.eye(len(values)))
            for scale in scales:
                weights = inverse @ scale.values
                left_out = scale.foreseen + scale.unit * (scale.values - weights / np.diag(inverse))
                agreement = _correlation(rankdata(left_out), ranks)
                # A sum has to be worth its while: where it says little more, what it leaves is harder to learn.
                disorder = (1 - agreement) / (1.0 if scale.summed is None else _WORTH)
                if best is None or disorder < least - 1e-9:
                    least, best = disorder, (agreement, tried, scale, weights)
        assert best is not None
        self.agreement, kernel, self._scale, self._weights = best
        self.choice = Choice(kernel, form)
        order = np.argsort(self._scale.values)
        self._known = self._scale.values[order], values[order]

    def predict(self, rows: Rows) -> Floats:
        """``(n,)`` on a scale of its own, in which less is less; that of ``standard`` if fitted ``plain``."""
        between = self.choice.kernel.between(rows.features - self._center, self._rows, self._spread)
        found: Floats = between @ self._weights
        if self._scale.summed is None:
            return found
        assert rows.choices is not None
        # On the values' own scale: what spreads candidates along a front spreads them as the objectives lie.
        foreseen: Floats = self._scale.summed.predict(rows.choices) * np.exp(self._scale.unit * found)
        return foreseen

    def values(self, predicted: Floats) -> Floats:
        """``(n,)``: what ``predict`` gave, on the scale of the values; within the range of those that are known."""
        if self._scale.summed is not None:
            return predicted
        found: Floats = np.interp(predicted, *self._known)
        return found

    @property
    def summed(self) -> Additive | None:
        """What adds up over decisions, where the scale is the ratio to it."""
        return self._scale.summed

    def standard(self, value: float) -> float:
        return (value - self._mean) / self._deviation


def _kernels() -> Iterator[Kernel]:
    for noise in _NOISES:
        for length in _LENGTHS:
            yield Kernel(length, noise)


@dataclass(frozen=True)
class _Scale:
    """What a process is fitted to.

    Attributes:
        values: ``(n,)``, standardised.
        foreseen: ``(n,)``: what to add to ``unit * values`` for the values' order.
        summed: where ``foreseen`` of other rows comes from; None where it is 0.
    """

    values: Floats
    foreseen: Floats | float = 0.0
    unit: float = 1.0
    summed: Additive | None = None


def _scales(values: Floats) -> Iterator[_Scale]:
    """The values, their logarithms where all are positive, and the normal scores of their ranks."""
    yield _Scale(_standard(values))
    if values.min() > 0:
        yield _Scale(_standard(np.log(values)))
    yield _Scale(_standard(np.asarray(norm.ppf((rankdata(values) - 0.5) / len(values)))))


def _beside_sum(choices: Ints, values: Floats, decisions: Decisions, form: Form) -> _Scale:
    """The logarithms of the ratios to what adds up, each foreseen from the others.

    Of what is 0, the damage of an untouched network, no ratio can be told: it is as foreseen.
    """
    known = values > 0
    summed = Additive(choices[known], values[known], decisions, form)
    foreseen = np.log(summed.predict(choices))
    foreseen[known] = np.log(summed.left_out)
    ratios = np.where(known, np.log(np.where(known, values, 1.0)) - foreseen, 0.0)
    unit = float(ratios.std()) or 1.0
    return _Scale(ratios / unit, foreseen, unit, summed)


def _standard(values: Floats) -> Floats:
    spread = values.std()
    return np.asarray((values - values.mean()) / (spread if spread > 0 else 1.0))


def _correlation(first: Floats, second: Floats) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float(first @ second) / size if size > 0 else 0.0
