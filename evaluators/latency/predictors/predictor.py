"""The contract of a latency predictor: fit to measurements, predict a value and an interval."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Networks = TypeVar("Networks")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a predictor says of n networks.

    Attributes:
        ms: ``(n,)`` latencies in ms.
        low_ms, high_ms: ``(n,)`` interval that holds the measured latency with probability ``confidence``.
        confidence: of the interval.
        extrapolated: for each network what was not measured but guessed, in words; empty where nothing was.
    """

    ms: Vector
    low_ms: Vector
    high_ms: Vector
    confidence: float
    extrapolated: tuple[tuple[str, ...], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ms)


class LatencyPredictor(ABC, Generic[Networks]):
    """Learns the latency of networks on one device.

    ``Networks`` is whatever the predictor reads: traces of operators, a population matrix, a matrix of features.
    """

    name: ClassVar[str]

    @abstractmethod
    def fit(self, networks: Networks, ms: Vector) -> Self:
        """Learn from measured latencies ``(n,)`` in ms. Called again with everything when there is more.

        Raises:
            InputError: too few networks, or latencies that are not positive and finite.
        """

    @abstractmethod
    def predict(self, networks: Networks, confidence: float = 0.9) -> Prediction:
        """The latency of each network, with an interval of this confidence."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that ``predict`` needs, as plain data; its digest is the predictor's version."""
