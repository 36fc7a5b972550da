"""The latency of one network whose layers compute in float or in int8, each as a policy says.

The times of its layers in a file all in float and in one all in int8, as the runtime's own profiler tells, are summed;
what lies between layers depends on which neighbours agree, for values change their type there. Both are weighted as
networks of some policies were measured, as in ``NetworkLatency``. What these networks took otherwise tells what single
layers gain, and single changes of type cost, beyond the profiler's word (``ridge``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.evaluators.latency.digests import json_digest
from archfront.evaluators.latency.predictors.conformal import check_confidence, conformal_quantile, split_interval
from archfront.evaluators.latency.predictors.network import check_calibration, fit_weights
from archfront.evaluators.latency.predictors.predictor import LatencyPredictor, Prediction, Vector
from archfront.evaluators.latency.predictors.ridge import ridge

FORMAT = "archfront-layer-latency-2"

Mask = npt.NDArray[np.bool_]
"""``(n, layers)``: which layers compute in int8."""


@dataclass(frozen=True, kw_only=True)
class LayerPrice:
    """A layer, in the order in which they run.

    Attributes:
        layer: its path.
        float_ms, int8_ms: of one pass.
        elements: that it reads and writes.
    """

    layer: str
    float_ms: float
    int8_ms: float
    elements: int


class LayerLatency(LatencyPredictor[Mask]):
    """Predicts a network under policies on one backend of a device.

    Args:
        layers: in the order in which they run.
        rest_ms: of all that is in no layer, in float and with all layers in int8.
        device: its fingerprint as JSON, with the digest.
        probe_ms: of the process that its pace is of, see ``quietness``.
    """

    name: ClassVar[str] = "layers"

    def __init__(
        self,
        layers: Sequence[LayerPrice],
        rest_ms: tuple[float, float],
        device: Mapping[str, Any] | None = None,
        probe_ms: float | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.rest_ms = rest_ms
        self.device = dict(device or {})
        self.probe_ms = probe_ms
        self._weights: Vector = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
        self._changes: Vector = np.zeros(2 * len(self.layers))
        self._scores: Vector = np.zeros(0)

    def fit(self, networks: Mask, ms: Vector) -> Self:
        """Fit what is between layers, and what the times of layers leave out.

        Raises:
            InputError: fewer than 6 networks, or latencies that are not positive and finite.
        """
        measured = check_calibration(networks, ms)
        terms, places = self.terms(networks), _places(networks)
        self._weights, self._changes = _fitted(terms, places, measured)
        left_out = []
        for i in range(len(measured)):
            others = np.arange(len(measured)) != i
            weights, changes = _fitted(terms[others], places[others], measured[others])
            left_out.append(_ms(terms[i : i + 1], places[i : i + 1], weights, changes)[0])
        self._scores = np.abs(measured / np.array(left_out) - 1)
        self.__dict__.pop("digest", None)
        return self

    def predict(self, networks: Mask, confidence: float = 0.9) -> Prediction:
        check_confidence(confidence)
        ms = _ms(self.terms(networks), _places(networks), self._weights, self._changes)
        low, high = split_interval(ms, self.relative_width(confidence))
        return Prediction(ms=ms, low_ms=low, high_ms=high, confidence=confidence)

    def relative_width(self, confidence: float) -> float:
        """Half of the interval as a share of the prediction; infinite without enough calibration networks."""
        return conformal_quantile(self._scores, confidence) if len(self._scores) else float("inf")

    def terms(self, networks: Mask) -> npt.NDArray[np.float64]:
        """``(n, 5)``: the sum of the layers, one, thousands of elements of layers in int8, and of neighbours that
        differ, and how many of these there are."""
        prices = np.array([(p.float_ms, p.int8_ms, p.elements / 1e3) for p in self.layers], dtype=np.float64)
        float_ms, int8_ms, elements = prices.reshape(-1, 3).T
        int8 = np.asarray(networks, dtype=np.float64)
        share = int8.mean(axis=1)
        rest = (1 - share) * self.rest_ms[0] + share * self.rest_ms[1]
        differ = np.abs(np.diff(int8, axis=1))
        between = np.minimum(elements[:-1], elements[1:])
        return np.stack(
            [(1 - int8) @ float_ms + int8 @ int8_ms + rest, np.ones(len(int8)), int8 @ elements, differ @ between,
             differ.sum(axis=1)],
            axis=1,
        )  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """The version: two of one digest predict the same."""
        return json_digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "device": self.device,
            "probe_ms": self.probe_ms,
            "layers": [asdict(price) for price in self.layers],
            "rest_ms": list(self.rest_ms),
            "weights": self._weights.tolist(),
            "changes": self._changes.tolist(),
            "scores": self._scores.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerLatency:
        """The inverse of ``to_json``.

        Raises:
            InputError: it is not a predictor of this format.
        """
        if data.get("format") != FORMAT:
            raise InputError("latency.predictor", data.get("format"), "is no predictor", f"Give one of {FORMAT}.")
        prices = [LayerPrice(**price) for price in data["layers"]]
        made = cls(prices, tuple(data["rest_ms"]), data["device"], data.get("probe_ms"))
        made._weights = np.array(data["weights"], dtype=np.float64)
        made._changes = np.array(data["changes"], dtype=np.float64)
        made._scores = np.array(data["scores"], dtype=np.float64)
        return made


Rows = npt.NDArray[np.float64]


def _places(networks: Mask) -> Rows:
    """``(n, 2 layers)``: one, which layers compute in int8, and which differ from the next."""
    int8 = np.asarray(networks, dtype=np.float64)
    return np.concatenate([np.ones((len(int8), 1)), int8, np.abs(np.diff(int8, axis=1))], axis=1)


def _fitted(terms: Rows, places: Rows, measured: Vector) -> tuple[Vector, Vector]:
    """Weights of the terms, and ms of the places, with small relative errors."""
    weights = fit_weights(terms, measured)
    mean = places.mean(axis=0)
    centred, level = places[:, 1:] - mean[1:], float(measured.mean())
    # In ms of a middling network: errors are relative, and the penalty knows no unit.
    found = level * ridge(level * centred / measured[:, None], 1 - terms @ weights / measured)
    return weights, np.concatenate([[-mean[1:] @ found], found])


def _ms(terms: Rows, places: Rows, weights: Vector, changes: Vector) -> Vector:
    base = terms @ weights
    # Never less than half of the base: a policy unlike all that were measured must not be free.
    return np.asarray(np.maximum(base + places @ changes, 0.5 * base), dtype=np.float64)
