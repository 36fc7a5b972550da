"""The latency of whole networks: the sum of their operators' times, corrected by networks that were measured.

A sum of operators measured alone leaves out what the interpreter does between them, and that a large network's
weights and activations come from memory where one operator's stay in the cache. So the time is fitted as a
non-negative combination of the sum and of what those effects grow with. Errors are relative, and intervals conformal:
from how far each calibration network lies from the fit to the others.

Backends that fuse operators are served by the same terms, fitted to networks that ran on them: terms of fusion groups
(their first operators, the rest, their number) were tried for ONNX Runtime and torch.compile and gained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from archfront.errors import InputError
from archfront.evaluators.latency.digests import json_digest
from archfront.evaluators.latency.predictors.conformal import check_confidence, conformal_quantile, split_interval
from archfront.evaluators.latency.predictors.operator_prices import OperatorPrices
from archfront.evaluators.latency.predictors.predictor import LatencyPredictor, Prediction, Vector
from archfront.evaluators.latency.profile import Profile
from archfront.evaluators.latency.tracing import Trace

FORMAT = "archfront-network-latency-1"
LEAST_NETWORKS = 6
TERMS = ("operators_ms", "calls", "modules", "weight_mb", "activation_mb")


class NetworkLatency(LatencyPredictor[Sequence[Trace]]):
    """Predicts any traced network on the device of a profile.

    Args:
        profile: of the device.
    """

    name: ClassVar[str] = "operators"

    def __init__(self, profile: Profile) -> None:
        self.prices = OperatorPrices(profile)
        self._weights: Vector = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
        self._scores: Vector = np.zeros(0)

    def fit(self, networks: Sequence[Trace], ms: Vector, alike: Sequence[bool] | None = None) -> Self:
        """Fit the correction.

        Args:
            networks: that were measured.
            ms: ``(n,)``.
            alike: which of them are such as will be asked for: intervals promise what they promise for these. All by
                default. A fit wants networks far apart, whose errors are larger.

        Raises:
            InputError: fewer than 6 networks, or latencies that are not positive and finite.
        """
        self._weights, scores = fit_terms(self.terms(networks), ms)
        self.__dict__.pop("digest", None)
        self._scores = scores if alike is None else scores[np.asarray(alike, dtype=np.bool_)]
        return self

    def predict(self, networks: Sequence[Trace], confidence: float = 0.9) -> Prediction:
        check_confidence(confidence)
        priced = [self.prices.ms(network.operators) for network in networks]
        ms = _terms(networks, priced) @ self._weights
        low, high = split_interval(ms, self.relative_width(confidence))
        notes = tuple(_extrapolated(network, *found) for network, found in zip(networks, priced, strict=True))
        return Prediction(ms=ms, low_ms=low, high_ms=high, confidence=confidence, extrapolated=notes)

    def relative_width(self, confidence: float) -> float:
        """Half of the interval as a share of the prediction; infinite without enough calibration networks."""
        return conformal_quantile(self._scores, confidence) if len(self._scores) else float("inf")

    def terms(self, networks: Sequence[Trace]) -> npt.NDArray[np.float64]:
        """``(n, 5)``, what a latency is a combination of; see ``TERMS``."""
        return _terms(networks, [self.prices.ms(network.operators) for network in networks])

    @property
    def weights(self) -> Vector:
        """``(5,)`` of the terms."""
        return self._weights

    @property
    def correction(self) -> dict[str, float]:
        """ms for each unit of each term."""
        return dict(zip(TERMS, self._weights.tolist(), strict=True))

    @cached_property
    def digest(self) -> str:
        """The version: two of one digest predict the same."""
        return json_digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "profile": self.prices.profile.to_json(),
            "weights": self._weights.tolist(),
            "scores": self._scores.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkLatency:
        """The inverse of ``to_json``.

        Raises:
            InputError: it is not a predictor of this format.
        """
        if data.get("format") != FORMAT:
            raise InputError("latency.predictor", data.get("format"), "is no predictor", f"Give one of {FORMAT}.")
        made = cls(Profile.from_json(data["profile"]))
        made._weights = np.array(data["weights"], dtype=np.float64)
        made._scores = np.array(data["scores"], dtype=np.float64)
        return made


Priced = tuple[Vector, npt.NDArray[np.bool_]]
"""Times of a network's operators in ms, and which of them were measured."""


def _terms(networks: Sequence[Trace], priced: Sequence[Priced]) -> npt.NDArray[np.float64]:
    rows = []
    for network, (prices, _) in zip(networks, priced, strict=True):
        written = sum(operator.written_bytes for operator in network.operators)
        rows.append(
            [prices.sum(), len(network.operators), network.modules, network.weight_bytes / 2**20, written / 2**20]
        )
    return np.array(rows, dtype=np.float64).reshape(-1, len(TERMS))


def _extrapolated(network: Trace, prices: Vector, measured: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    if measured.all():
        return network.warnings
    kinds = sorted({o.kind for o, known in zip(network.operators, measured, strict=True) if not known})
    share = prices[~measured].sum() / max(prices.sum(), 1e-12)
    guessed = f"{int((~measured).sum())} of {len(measured)} operators never measured ({', '.join(kinds)})"
    return (f"{guessed}: {share:.0%} of the time", *network.warnings)


def fit_terms(terms: npt.NDArray[np.float64], ms: Vector) -> tuple[Vector, Vector]:
    """Non-negative weights of terms, of which the first is the sum that the others correct, and how far each network
    lies from the fit to the others.

    Args:
        terms: ``(networks, terms)``.
        ms: ``(networks,)``, measured.

    Returns:
        ``(terms,)`` weights, and ``(networks,)`` relative errors.

    Raises:
        InputError: fewer than 6 networks, or latencies that are not positive and finite.
    """
    measured = check_calibration(terms, ms)
    left_out = [
        terms[i] @ fit_weights(np.delete(terms, i, axis=0), np.delete(measured, i)) for i in range(len(measured))
    ]
    return fit_weights(terms, measured), np.abs(measured / np.array(left_out) - 1)


def check_calibration(networks: npt.NDArray[Any], ms: Vector) -> Vector:
    """The latencies, if they are what a fit to these networks can be made of.

    Raises:
        InputError: fewer than 6 networks, or latencies that are not positive and finite.
    """
    measured = np.asarray(ms, dtype=np.float64)
    if len(networks) != len(measured) or len(networks) < LEAST_NETWORKS:
        problem = f"are {len(networks)} networks with {len(measured)} latencies"
        raise InputError("latency.calibration", len(networks), problem, f"Measure {LEAST_NETWORKS} or more.")
    if not (np.isfinite(measured) & (measured > 0)).all():
        raise InputError("latency.calibration", measured.tolist(), "is not positive and finite", "Measure again.")
    return measured


def fit_weights(terms: npt.NDArray[np.float64], measured: Vector) -> Vector:
    """Non-negative weights with the least squared relative errors, drawn a little towards the sum alone."""
    relative = terms / measured[:, None]
    scale = np.sqrt((relative**2).mean(axis=0))
    scale[scale == 0] = 1.0
    # Few networks cannot tell calls from modules: a small penalty shares between them instead of choosing at random.
    ridge = 0.02 * np.sqrt(len(measured)) * np.eye(terms.shape[1])
    ridge[0] = 0.0
    found = nnls(np.vstack([relative / scale, ridge]), np.concatenate([np.ones(len(measured)), np.zeros(len(scale))]))[
        0
    ]
    return np.asarray(found / scale)
