"""What a running job's own measurements say of its predictions: a correction, and how far it errs.

A job measures some of the networks that it predicts. The times that it finds may be a constant share off (other load
than when the device was profiled, another clock), and light networks off otherwise than heavy ones. So a line is
fitted, drawn towards one through 0: a search that has converged shows networks of about one latency, whose noise must
not turn into a line that makes all alike. A line that predicts left-out pairs no better than no line is not taken.

Errors are relative, and the interval is conformal: from how far pairs lie from the line that others give. Those left
out together followed each other, since what disturbs a device disturbs several measurements in a row. The interval
holds for networks like those of the pairs on a device in the states that they met it in; so refits matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from archfront.errors import InputError
from archfront.evaluators.latency.predictors.conformal import conformal_quantile

FORMAT = "archfront-latency-feedback-1"
LEAST_PAIRS = 10
"""Nine are the fewest that bear an interval of 90 %."""
LATEST = 500
"""Pairs that are fitted: the last ones are the most like those to come, and a line needs no more."""
BLOCKS = 10
CONFIDENCES = (0.5, 0.8, 0.9, 0.95, 0.99)
CONSTANT_SHARE = 0.1
"""Prior standard deviation of the constant part, as a share of the middle latency."""

ROUNDS = 2

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """From a prediction to a corrected one: ``intercept_ms + slope * base``.

    Attributes:
        intercept_ms, slope: 0 or more, not both 0.
        widths: half of the interval as a share of the corrected prediction, by confidence; infinite where the pairs
            are too few.
        error, error_before: median relative error on pairs that were left out, and of what was predicted at first.
    """

    intercept_ms: float
    slope: float
    widths: Mapping[float, float]
    error: float
    error_before: float

    def ms(self, base_ms: float) -> float:
        """The corrected latency in ms."""
        return self.intercept_ms + self.slope * base_ms

    def relative_width(self, confidence: float) -> float:
        """
        Raises:
            InputError: the confidence is none of ``CONFIDENCES``.
        """
        if confidence not in self.widths:
            raise InputError("confidence", confidence, "was not kept", f"Give one of {CONFIDENCES}.")
        return self.widths[confidence]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "intercept_ms": self.intercept_ms,
            "slope": self.slope,
            "widths": [[level, width if math.isfinite(width) else None] for level, width in self.widths.items()],
            "error": self.error,
            "error_before": self.error_before,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Feedback:
        """The inverse of ``to_json``.

        Raises:
            InputError: it is of another format.
        """
        if data.get("format") != FORMAT:
            raise InputError("latency.feedback", data.get("format"), "is another format", f"Give one of {FORMAT}.")
        return cls(
            intercept_ms=data["intercept_ms"],
            slope=data["slope"],
            widths={level: math.inf if width is None else width for level, width in data["widths"]},
            error=data["error"],
            error_before=data["error_before"],
        )


def fit_feedback(pairs: Vector) -> Feedback:
    """Fit to the last ``LATEST`` pairs.

    Args:
        pairs: ``(n, 2)`` of predicted and measured ms, all positive, at least ``LEAST_PAIRS``.

    Raises:
        InputError: there are fewer, or one is not positive.
    """
    if len(pairs) < LEAST_PAIRS or not (pairs > 0).all():
        problem = "pairs are too few, or one is not positive"
        raise InputError("latency.feedback", len(pairs), problem, f"Give {LEAST_PAIRS} or more, in ms.")
    base, measured = pairs[-LATEST:].T
    intercept, slope = _line(base, measured)
    before = scores = np.abs(measured / base - 1)
    blocks = np.arange(len(base)) * BLOCKS // len(base)
    lines = np.array([_line(base[blocks != block], measured[blocks != block]) for block in range(BLOCKS)])[blocks]
    left_out = np.abs(measured / (lines[:, 0] + lines[:, 1] * base) - 1)
    if np.median(left_out) < np.median(before):
        scores = left_out
    else:
        intercept, slope = 0.0, 1.0
    return Feedback(
        intercept_ms=intercept,
        slope=slope,
        widths={level: conformal_quantile(scores, level) for level in CONFIDENCES},
        error=float(np.median(scores)),
        error_before=float(np.median(before)),
    )


def _line(base: Vector, measured: Vector) -> tuple[float, float]:
    """Intercept in ms and slope with the least squared relative errors."""
    level = float(np.median(measured))
    # Divided by the measured time: errors are relative, and a network that met other load weighs little.
    shares, constants = base / measured, level / measured
    design = np.stack([shares, constants], axis=1)
    slope, constant = float(shares.sum() / (shares**2).sum()), 0.0
    for _ in range(ROUNDS):
        # What the line before leaves is the noise, against which the prior weighs.
        noise = float(np.sqrt(((design @ [slope, constant] - 1) ** 2).mean()))
        penalised = np.vstack([design, [[0.0, noise / CONSTANT_SHARE]]])
        slope, constant = nnls(penalised, np.append(np.ones(len(base)), 0.0))[0]
    return float(constant) * level, float(slope)
