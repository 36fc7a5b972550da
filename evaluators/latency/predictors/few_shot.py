"""Few-shot transfer: the latency of a space's networks on a new device from 3 to 50 measurements.

On every device latency is nearly additive in what a network's structure counts, and known devices tell how the prices
of these counts go together. So the new device's prices get a Gaussian prior with the known prices' mean and
covariance, and what is not additive a small Gaussian process. Both are linear-Gaussian, so ten measurements give the
posterior in closed form; noise, scale, and how far the device may stray from the known ones are averaged by evidence.
HELP (Lee et al., NeurIPS 2021) and MultiPredict (Akhauri and Abdelfattah, AutoML 2023) train networks for the same.

A runtime may run less than what is written: graph compilers drop unused operators. Where the caller says which network
each one then becomes, that too is a hypothesis for the evidence to weigh.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.conformal import (
    check_confidence,
    conformal_quantile,
    pooled_quantile,
    split_interval,
)
from archfront.evaluators.latency.predictors.device_prior import DevicePrior, Posterior, condition, device_prior
from archfront.evaluators.latency.predictors.predictor import LatencyPredictor, Prediction

Rows = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

FORMAT = "archfront-few-shot-1"
LEAST = 3
POOL = 400
"""Networks among which the next to measure are chosen."""

LEAST_LATENCY = 0.01
"""The least that is predicted, in the least measured."""

REWRITE_SHARE = 1 / 3
"""Of the belief that the runtime rewrites networks, while choosing what to measure: enough to put it to the test."""

REWRITE_LOG_ODDS = -2.0
"""Of each rewrite, before measurements, against what is written: random samples may hardly tell them apart."""

CALIBRATION_ROWS = 400
LEAST_GROUPS = 3
"""Fewer families of known devices say nothing of how far the next one strays."""


class FewShotTransfer(LatencyPredictor[Rows]):
    """Networks are rows of the matrices that it is made with.

    Args:
        structure: ``(n, p)`` structural features of all networks of interest, e.g. ``chain_structure``; p may be 0.
        known: ``(n, D)`` latencies in ms on known devices, NaN where unknown; None for no device.
        rewrites: ``(k, n)`` rows of the network that each one may become on the device, e.g. ``cell_rewrites``.
        families: of each known device; devices of one family are left out together when intervals are calibrated.

    Raises:
        InputError: an argument cannot be used; the message names it.
    """

    name: ClassVar[str] = "few-shot"

    def __init__(
        self,
        structure: npt.ArrayLike,
        known: npt.ArrayLike | None = None,
        *,
        rewrites: npt.ArrayLike | None = None,
        families: Sequence[str] | None = None,
    ) -> None:
        self._structure = _matrix("structure", structure)
        n = len(self._structure)
        if n < LEAST or not np.isfinite(self._structure).all():
            problem = "has fewer than 3 rows or is not finite everywhere"
            raise InputError("structure", self._structure.shape, problem, "Give finite features of 3 or more networks.")
        self._known = _known(known, n)
        rows = np.zeros((0, n), np.int64) if rewrites is None else np.asarray(rewrites)
        if rows.ndim != 2 or rows.shape[1] != n or not np.issubdtype(rows.dtype, np.integer):
            raise InputError("rewrites", f"{rows.dtype}{rows.shape}", "is no matrix of rows", f"Give ints (k, {n}).")
        self._rewrites = [np.arange(n), *(_checked_rows("rewrites", row, n) for row in rows)]
        devices = self._known.shape[1]
        self._families = [str(i) for i in range(devices)] if families is None else [str(f) for f in families]
        if len(self._families) != devices:
            raise InputError("families", families, "is not one for each known device", f"Give {devices}.")
        self._prior = device_prior(self._structure, self._known)
        self._rows = np.zeros(0, np.int64)
        self._ms = np.zeros(0)
        self._posterior: list[tuple[Rows, Posterior]] | None = None
        self._scores: list[Vector] | None = None

    def choose(self, count: int, rng: np.random.Generator, available: npt.ArrayLike | None = None) -> Rows:
        """Which networks to measure next: greedily those that lower the expected variance of all others the most.

        Rows that were measured already count as known, and are not chosen again.

        Args:
            count: how many.
            rng: draws the ``POOL`` candidates.
            available: rows that can be measured on the device; all by default.

        Raises:
            InputError: not so many are available.
        """
        n = len(self._structure)
        rows = np.arange(n) if available is None else _checked_rows("available", available, n)
        rows = np.setdiff1d(rows, self._rows)
        if not 1 <= count <= len(rows):
            raise InputError("count", count, f"is not between 1 and the {len(rows)} available", "Ask for fewer.")
        drawn = rng.choice(rows, min(max(POOL, count), len(rows)), replace=False)
        pool = np.concatenate([self._rows, drawn])
        covariance = self._belief(pool)
        noise = self._prior.noise**2
        taken: list[int] = []
        for step in range(len(self._rows) + count):
            if step < len(self._rows):
                best = step
            else:
                lowered = (covariance**2).sum(axis=0) / (np.diag(covariance) + noise)
                lowered[: len(self._rows)] = -1
                lowered[taken] = -1
                best = int(lowered.argmax())
                taken.append(best)
            column = covariance[:, best].copy()
            covariance -= np.outer(column, column) / (column[best] + noise)
        return pool[taken]

    def fit(self, networks: Rows, ms: npt.ArrayLike) -> Self:
        """Learn from rows and their latencies in ms; a row may be measured more than once."""
        rows = _checked_rows("networks", networks, len(self._structure))
        values = np.asarray(ms, dtype=np.float64)
        if values.shape != rows.shape:
            raise InputError("ms", values.shape, "is not one latency for each network", f"Give {rows.shape}.")
        if len(rows) < LEAST:
            raise InputError("networks", len(rows), "are too few", f"Measure {LEAST} or more.")
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            value = float(values[wrong][0])
            raise InputError("ms", value, "is no latency", "Give positive milliseconds, and leave out what failed.")
        self._rows, self._ms = rows, values
        self._posterior = self._conditioned(self._prior, rows, values)
        self._scores = None
        return self

    def predict(self, networks: Rows, confidence: float = 0.9) -> Prediction:
        """Latencies of rows, with intervals as wide as the known devices, each predicted from the others, ask for."""
        check_confidence(confidence)
        rows = _checked_rows("networks", networks, len(self._structure))
        if self._posterior is None:
            raise InputError("predictor", self.name, "was not fitted", "Call fit first.")
        mean, deviation = self._moments(self._posterior, rows)
        # A line may run below zero where nothing was measured; no network takes no time.
        mean = np.maximum(mean, LEAST_LATENCY * self._ms.min())
        low, high = split_interval(mean, self._multiplier(confidence), deviation)
        return Prediction(ms=mean, low_ms=low, high_ms=high, confidence=confidence)

    def to_json(self) -> dict[str, Any]:
        """The measurements, and digests of the matrices that give rows their meaning."""
        return {
            "format": FORMAT,
            "structure": _digest(self._structure),
            "known": _digest(self._known),
            "rewrites": _digest(np.stack(self._rewrites)),
            "families": self._families,
            "rows": self._rows.tolist(),
            "ms": self._ms.tolist(),
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        structure: npt.ArrayLike,
        known: npt.ArrayLike | None = None,
        *,
        rewrites: npt.ArrayLike | None = None,
    ) -> Self:
        """The inverse of ``to_json``, given the same matrices.

        Raises:
            InputError: it is no such predictor, or one of other matrices.
        """
        try:
            made = cls(structure, known, rewrites=rewrites, families=data["families"])
            mine = made.to_json()
            for field in ("format", "structure", "known", "rewrites"):
                if data[field] != mine[field]:
                    problem = f"is not of the given {field}"
                    raise InputError(f"predictor.{field}", data[field], problem, "Give what it was made with.")
            if data["rows"]:
                made.fit(np.array(data["rows"], np.int64), np.array(data["ms"], np.float64))
        except (KeyError, TypeError) as error:
            problem = f"is no few-shot predictor ({error!r})"
            raise InputError("predictor", sorted(data), problem, "Make it again.") from None
        return made

    def _conditioned(self, prior: DevicePrior, rows: Rows, ms: Vector) -> list[tuple[Rows, Posterior]]:
        """Each hypothesis of what the runtime makes of the networks, with its posterior."""
        return [
            (rewrite, condition(prior, which, rewrite[rows], ms))
            for rewrite in self._rewrites
            for which in range(len(prior.covariances))
        ]

    def _moments(self, posterior: list[tuple[Rows, Posterior]], rows: Rows) -> tuple[Vector, Vector]:
        """``(n,)`` means and standard deviations of measurements, averaged over the hypotheses by evidence."""
        belief = [0.0 if rewrite is self._rewrites[0] else REWRITE_LOG_ODDS for rewrite, _ in posterior]
        evidence = np.array([each.log_evidence for _, each in posterior]) + belief
        weights = np.exp(evidence - evidence.max())
        weights /= weights.sum()
        first, second = np.zeros(len(rows)), np.zeros(len(rows))
        for weight, (rewrite, each) in zip(weights, posterior, strict=True):
            if weight > 1e-4:
                mean, variance = each.moments(rewrite[rows])
                first += weight * mean
                second += weight * (variance + mean**2)
        total = weights[weights > 1e-4].sum()
        mean, second = first / total, second / total
        deviation = np.sqrt(np.maximum(second - mean**2, 1e-12 * mean**2))
        return mean, deviation

    def _belief(self, rows: Rows) -> Matrix:
        """Prior covariance ``(m, m)`` of rows, whichever hypothesis holds."""
        count = len(self._rewrites)
        share = REWRITE_SHARE / (count - 1) if count > 1 else 0.0
        weights = np.array([1 - share * (count - 1), *[share] * (count - 1)])
        means = [self._prior.mean_of(rewrite[rows]) for rewrite in self._rewrites]
        centre = np.average(means, axis=0, weights=weights)
        covariance = np.zeros((len(rows), len(rows)))
        for weight, rewrite, mean in zip(weights, self._rewrites, means, strict=True):
            apart = mean - centre
            covariance += weight * (self._prior.covariance(0, rewrite[rows], rewrite[rows]) + np.outer(apart, apart))
        return covariance

    def _multiplier(self, confidence: float) -> float:
        """How many posterior deviations an interval spans.

        Each family of known devices in turn plays the new device, with the same rows measured; where there are too few
        families, the measurements left out one at a time do, and Student's distribution sets the least.
        """
        if self._scores is None:
            self._scores = self._family_scores()
        if len(self._scores) >= LEAST_GROUPS:
            return pooled_quantile(self._scores, confidence)
        student = float(stats.t.ppf((1 + confidence) / 2, df=len(self._rows) - 1))
        if len(self._rows) <= LEAST:
            return student
        within = conformal_quantile(self._left_out_scores(), confidence)
        return max(student, within) if np.isfinite(within) else student

    def _family_scores(self) -> list[Vector]:
        names = sorted(set(self._families))
        if len(names) < LEAST_GROUPS:
            return []
        rng = np.random.default_rng(0)
        sample = rng.permutation(len(self._structure))[:CALIBRATION_ROWS]
        found = []
        for name in names:
            own = np.array([family == name for family in self._families])
            prior = device_prior(self._structure, self._known[:, ~own])
            scores = []
            for column in self._known[:, own].T:
                rows = self._rows[np.isfinite(column[self._rows])]
                tested = np.setdiff1d(sample[np.isfinite(column[sample])], rows)
                if len(rows) >= LEAST and len(tested):
                    mean, deviation = self._moments(self._conditioned(prior, rows, column[rows]), tested)
                    scores.append(np.abs(column[tested] - mean) / deviation)
            if scores:
                found.append(np.concatenate(scores))
        return found

    def _left_out_scores(self) -> Vector:
        scores = []
        for out in range(len(self._rows)):
            rest = np.arange(len(self._rows)) != out
            posterior = self._conditioned(self._prior, self._rows[rest], self._ms[rest])
            mean, deviation = self._moments(posterior, self._rows[[out]])
            scores.append(abs(float(self._ms[out] - mean[0])) / float(deviation[0]))
        return np.array(scores)


def _matrix(field: str, values: npt.ArrayLike) -> Matrix:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(field, type(values).__name__, "is no matrix of numbers", "Give (n, p).") from None
    if matrix.ndim != 2:
        raise InputError(field, matrix.shape, "is no matrix", "Give two dimensions, networks first.")
    return matrix


def _known(known: npt.ArrayLike | None, n: int) -> Matrix:
    matrix = np.zeros((n, 0)) if known is None else _matrix("known", known)
    if len(matrix) != n:
        raise InputError("known", matrix.shape, "has other networks than the structure", f"Give {n} rows.")
    for device, column in enumerate(matrix.T):
        given = column[~np.isnan(column)]
        if not (np.isfinite(given) & (given > 0)).all():
            wrong = given[~(np.isfinite(given) & (given > 0))][0]
            raise InputError(f"known[:, {device}]", float(wrong), "is no latency", "Give NaN where there is none.")
        if len(given) < LEAST:
            raise InputError(f"known[:, {device}]", len(given), "latencies are too few", f"Give {LEAST}, or drop it.")
    return matrix


def _checked_rows(field: str, rows: npt.ArrayLike, n: int) -> Rows:
    given = np.asarray(rows)
    if given.ndim != 1 or not (np.issubdtype(given.dtype, np.integer) or given.size == 0):
        raise InputError(field, f"{given.dtype}{given.shape}", "are not rows", "Give integers (m,).")
    if given.size and (given.min() < 0 or given.max() >= n):
        wrong = int(given.min() if given.min() < 0 else given.max())
        raise InputError(field, wrong, "is no row", f"Give 0 to {n - 1}.")
    return given.astype(np.int64)


def _digest(values: npt.NDArray[Any]) -> str:
    content = np.ascontiguousarray(values)
    return hashlib.blake2b(
        repr((content.shape, content.dtype.str)).encode() + content.tobytes(), digest_size=8
    ).hexdigest()
