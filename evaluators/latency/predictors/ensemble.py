"""Many measurements of a small tabular space: an ensemble over encodings, with CV+ intervals.

Its members see what the others miss: a ridge regression on single decisions and structure, and boosted trees on what
it leaves; with the relations between decisions another such pair, whose trees are deeper, and a Gaussian process on the
logarithm. Their weights are those that predict best across folds. All minimise relative errors, robustly: phones give
single latencies of many times the usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import svd

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.conformal import check_confidence, cv_plus
from archfront.evaluators.latency.predictors.device_prior import rbf
from archfront.evaluators.latency.predictors.predictor import LatencyPredictor, Prediction

Decisions = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Features = Callable[[Decisions], Matrix]

FORMAT = "archfront-tabular-ensemble-1"
LEAST = 20
FOLDS = 5
MEMBERS = ("single", "boosted", "relations", "boosted-relations", "process")
FREEDOM = 3.0
"""Degrees of freedom of the relative errors: large ones get small weights."""

PENALTIES = tuple(10.0**power for power in range(-5, 1))
LENGTHS = (0.5, 1.0, 2.0, 4.0)
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Variances of the noise, in variances of the process."""

TREES: Mapping[str, Any] = {
    "max_iter": 120,
    "learning_rate": 0.08,
    "max_leaf_nodes": 8,
    "min_samples_leaf": 8,
    "l2_regularization": 1.0,
    "early_stopping": False,
    "random_state": 0,
}
DEEPER: Mapping[str, Any] = {
    **TREES,
    "max_iter": 300,
    "learning_rate": 0.05,
    "max_leaf_nodes": 16,
    "min_samples_leaf": 5,
}


class TabularEnsemble(LatencyPredictor[Decisions]):
    """Networks are rows ``(n, d)`` of decisions.

    Args:
        choices: how many choices each of the d decisions has.
        structure: from decisions ``(n, d)`` to further features ``(n, p)``; none by default.
        relations: from decisions to features ``(n, q)`` of how they meet; all pairs of two decisions' choices by
            default.

    Raises:
        InputError: an argument cannot be used.
    """

    name: ClassVar[str] = "tabular-ensemble"

    def __init__(
        self, choices: Sequence[int], structure: Features | None = None, relations: Features | None = None
    ) -> None:
        if not choices or min(choices) < 1:
            raise InputError("choices", choices, "is empty or below 1", "Give each decision's number of choices.")
        self.choices = [int(count) for count in choices]
        self._structure = structure
        self._relations = relations
        self._networks: Decisions = np.zeros((0, len(self.choices)), np.int64)
        self._ms: Vector = np.zeros(0)
        self._folds: Decisions = np.zeros(0, np.int64)
        self._models: list[_Members] = []
        self._scores: Vector = np.zeros(0)
        self.weights: Vector = np.zeros(0)

    def fit(self, networks: Decisions, ms: npt.ArrayLike) -> Self:
        """See ``LatencyPredictor``; networks measured twice count twice, and fall into one fold."""
        decisions = self._checked(networks)
        values = np.asarray(ms, dtype=np.float64)
        if values.shape != (len(decisions),):
            raise InputError("ms", values.shape, "is not one latency for each network", f"Give {(len(decisions),)}.")
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            value = float(values[wrong][0])
            raise InputError("ms", value, "is no latency", "Give positive milliseconds, and leave out what failed.")
        _, group = np.unique(decisions, axis=0, return_inverse=True)
        if group.max(initial=-1) + 1 < LEAST:
            raise InputError("networks", int(group.max(initial=-1)) + 1, "are too few", f"Measure {LEAST} or more.")
        self._networks, self._ms = decisions, values
        # Shuffled by a seed of its own, so that the same measurements make the same predictor.
        self._folds = np.random.default_rng(0).permutation(group.max() + 1)[group.ravel()] % FOLDS
        encoded = self._encoded(decisions)
        self._models = []
        held_out = np.zeros((len(MEMBERS), len(values)))
        for fold in range(FOLDS):
            inside = self._folds != fold
            model = _Members(encoded.rows(inside), values[inside])
            held_out[:, ~inside] = model.predict(encoded.rows(~inside))
            self._models.append(model)
        self.weights = _stacked(held_out, values)
        predicted = self.weights @ held_out
        self._scores = np.abs(values - predicted) / predicted
        return self

    def predict(self, networks: Decisions, confidence: float = 0.9) -> Prediction:
        """The mean of the folds' ensembles, and the CV+ interval of their relative errors."""
        check_confidence(confidence)
        encoded = self._encoded(self._checked(networks))
        if not self._models:
            raise InputError("predictor", self.name, "was not fitted", "Call fit first.")
        each = np.stack([self.weights @ model.predict(encoded) for model in self._models])
        low, high = cv_plus(each, self._folds, self._scores, confidence)
        return Prediction(ms=each.mean(axis=0), low_ms=low, high_ms=high, confidence=confidence)

    def to_json(self) -> dict[str, Any]:
        """The measurements: fitting is deterministic, and they are smaller than what is fitted."""
        networks, ms = self._networks.tolist(), self._ms.tolist()
        return {"format": FORMAT, "choices": self.choices, "networks": networks, "ms": ms}

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], structure: Features | None = None, relations: Features | None = None
    ) -> Self:
        """The inverse of ``to_json``, given the same structure and relations.

        Raises:
            InputError: it is no such predictor.
        """
        try:
            if data["format"] != FORMAT:
                raise InputError("predictor.format", data["format"], "is another format", f"Give one of {FORMAT}.")
            made = cls(data["choices"], structure, relations)
            if data["networks"]:
                made.fit(np.array(data["networks"], np.int64), np.array(data["ms"], np.float64))
        except (KeyError, TypeError) as error:
            problem = f"is no tabular ensemble ({error!r})"
            raise InputError("predictor", sorted(data), problem, "Make it again.") from None
        return made

    def _checked(self, networks: Decisions) -> Decisions:
        given = np.asarray(networks)
        if given.ndim != 2 or given.shape[1] != len(self.choices) or not np.issubdtype(given.dtype, np.integer):
            form = f"Give integers (n, {len(self.choices)})."
            raise InputError("networks", f"{given.dtype}{given.shape}", "is no matrix of decisions", form)
        outside = (given < 0) | (given >= np.array(self.choices))
        if outside.any():
            row, column = np.argwhere(outside)[0]
            problem, remedy = f"is no choice of decision {column}", f"Give 0 to {self.choices[column] - 1}."
            raise InputError("networks", int(given[row, column]), problem, remedy)
        return given.astype(np.int64)

    def _encoded(self, decisions: Decisions) -> _Encoded:
        one_hot = [np.eye(count)[decisions[:, i]] for i, count in enumerate(self.choices)]
        further = np.zeros((len(decisions), 0)) if self._structure is None else self._structure(decisions)
        single = np.hstack([*one_hot, further])
        if self._relations is not None:
            related = [self._relations(decisions)]
        else:
            related = [
                (left[:, :, None] * right[:, None, :]).reshape(len(decisions), -1)
                for i, left in enumerate(one_hot)
                for right in one_hot[:i]
            ]
        return _Encoded(single=single, related=np.hstack([single, *related]))


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """Features of n networks: of single decisions and structure, and with relations between decisions."""

    single: Matrix
    related: Matrix

    def rows(self, mask: npt.NDArray[np.bool_]) -> _Encoded:
        return _Encoded(single=self.single[mask], related=self.related[mask])


class _Members:
    """The members, fitted to networks and their latencies ``(m,)`` in ms."""

    def __init__(self, encoded: _Encoded, ms: Vector) -> None:
        self._least = 0.5 * float(ms.min())
        self._single = _Boosted(encoded.single, ms, TREES)
        self._related = _Boosted(encoded.related, ms, DEEPER)
        self._level = float(np.log(ms).mean())
        self._process = _Process(encoded.related, np.log(ms) - self._level, self._related.trust)

    def predict(self, encoded: _Encoded) -> Matrix:
        """``(members, n)`` in ms, positive."""
        single, boosted = self._single.predict(encoded.single)
        related, deeper = self._related.predict(encoded.related)
        process = np.exp(self._level + self._process.predict(encoded.related))
        positive: Matrix = np.maximum(np.stack([single, boosted, related, deeper, process]), self._least)
        return positive


class _Boosted:
    """A ridge regression, and trees on what it leaves.

    Attributes:
        trust: ``(m,)``, of each network.
    """

    def __init__(self, features: Matrix, ms: Vector, trees: Mapping[str, Any]) -> None:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._least = 0.5 * float(ms.min())
        self._ridge = _Ridge(features, ms)
        # What the ridge leaves of a network it has not seen: what it leaves of one it has is smaller.
        ratio = self._ridge.residuals / np.maximum(self._ridge.predict(features), self._least)
        self.trust = _trust(ratio)
        self._trees = HistGradientBoostingRegressor(**trees).fit(features, ratio, sample_weight=self.trust)

    def predict(self, features: Matrix) -> tuple[Vector, Vector]:
        """``(n,)`` ms of the ridge alone, and with the trees."""
        base = np.maximum(self._ridge.predict(features), self._least)
        return base, base * (1 + self._trees.predict(features))


class _Ridge:
    """Ridge regression with the penalty that predicts best when one network is left out; relative, robust errors.

    Attributes:
        residuals: ``(m,)`` ms, each network's by the fit without it.
    """

    def __init__(self, features: Matrix, ms: Vector) -> None:
        self._mean = features.mean(axis=0)
        deviation = features.std(axis=0)
        self._scale = np.where(deviation > 0, deviation, 1.0)
        design = (features - self._mean) / self._scale
        size = np.full(len(ms), ms.mean())
        trust = np.ones(len(ms))
        for _ in range(4):
            # By the predicted latency: dividing by the measured one would favour predictions that are too low.
            roots = np.sqrt(trust) / size
            self.residuals = self._solve(design, ms, roots)
            size = np.maximum(design @ self._prices + self._constant, 0.5 * float(ms.min()))
            trust = _trust(self.residuals / size)

    def predict(self, features: Matrix) -> Vector:
        result: Vector = (features - self._mean) / self._scale @ self._prices + self._constant
        return result

    def _solve(self, design: Matrix, ms: Vector, roots: Vector) -> Vector:
        """Set prices and constant; the residuals with each network left out."""
        weights = roots**2
        middle, level = weights @ design / weights.sum(), weights @ ms / weights.sum()
        # By QR iterations: the default, divide and conquer, at times does not converge on columns that repeat others.
        scaled = (design - middle) * roots[:, None]
        left, singular, right = svd(scaled, full_matrices=False, lapack_driver="gesvd", check_finite=False)
        target = (ms - level) * roots
        turned = left.T @ target
        best = np.inf
        for penalty in PENALTIES:
            kept = singular**2 / (singular**2 + penalty * max(float(singular[0]), 1e-12) ** 2)
            leverage = (left**2) @ kept + weights / weights.sum()
            out: Vector = (target - left @ (kept * turned)) / np.maximum(1 - leverage, 0.01)
            loss = float((out**2).sum())
            if loss < best:
                best, residuals = loss, out / roots
                shrunk = np.divide(kept * turned, singular, out=np.zeros_like(turned), where=singular > 0)
                self._prices = right.T @ shrunk
        self._constant = float(level - middle @ self._prices)
        return residuals


class _Process:
    """Gaussian process on residuals ``(m,)`` whose noise has the variance of ``1 / trust``; length by evidence."""

    def __init__(self, features: Matrix, residuals: Vector, trust: Vector) -> None:
        self._mean = features.mean(axis=0)
        deviation = features.std(axis=0)
        self._scale = np.where(deviation > 0, deviation, 1.0) * np.sqrt(features.shape[1])
        self._points = (features - self._mean) / self._scale
        roots, best = np.sqrt(trust), -np.inf
        for length in LENGTHS:
            kernel = rbf(self._points, self._points, length)
            values, basis = np.linalg.eigh(kernel * roots[:, None] * roots)
            turned = basis.T @ (residuals * roots)
            for noise in NOISES:
                total = np.maximum(values, 0.0) + noise
                evidence = -0.5 * len(turned) * np.log((turned**2 / total).mean()) - 0.5 * np.log(total).sum()
                if evidence > best:
                    best, self._length = float(evidence), length
                    self._solved = roots * (basis @ (turned / total))

    def predict(self, features: Matrix) -> Vector:
        points = (features - self._mean) / self._scale
        result: Vector = rbf(points, self._points, self._length) @ self._solved
        return result


def _trust(errors: Vector) -> Vector:
    """Weights ``(m,)`` of relative errors under Student's distribution, its scale from their median."""
    scale = max(1.4826 * float(np.median(np.abs(errors))), 1e-9)
    weights: Vector = (FREEDOM + 1) / (FREEDOM + (errors / scale) ** 2)
    return weights


def _stacked(held_out: Matrix, ms: Vector) -> Vector:
    """``(members,)`` weights, not negative, of sum 1, with about the least mean absolute relative error."""
    from scipy.optimize import nnls

    relative = held_out / ms
    weights = np.full(len(held_out), 1 / len(held_out))
    for _ in range(10):
        roots = 1 / np.sqrt(np.maximum(np.abs(1 - weights @ relative), 0.01))
        # A heavy row asks for a sum of 1 without forbidding what little it then lacks.
        design = np.vstack([(relative * roots).T, 1e3 * np.sqrt(len(ms)) * np.ones(len(held_out))])
        weights = nnls(design, np.append(roots, 1e3 * np.sqrt(len(ms))))[0]
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(held_out), 1 / len(held_out))
