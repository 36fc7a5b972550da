"""Evaluators that predict, and learn from what their own job measures while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Learned(NamedTuple):
    """What an evaluator learned by some moment of a job.

    Attributes:
        version: ``<pairs>-<digest>``: how many pairs it was fitted to, and a digest of the state.
        state: what ``refit`` returned.
    """

    version: str
    state: Mapping[str, Any]


@runtime_checkable
class Learning(Protocol):
    """What an evaluator has besides ``Evaluator`` if it learns; at most one of a job may.

    It measures some of the candidates that it predicts, chosen by their ``Task.seed`` (any below 2**63 is as likely),
    and reports both. After ``least_pairs`` of these pairs, and twice, four times, ... as many, the driver calls
    ``refit`` once. The version goes into the ledger, and with every task that is asked for from then on to the workers,
    as ``Task.learned``: so what an evaluation predicts with is a function of the ledger's rows, whoever evaluates it
    and however often.
    """

    @property
    def pair_metrics(self) -> Sequence[str]:
        """Names of the metrics that make a pair: an evaluation that is done and has them all, finite, is one. None if
        the evaluator does not learn in this job."""

    @property
    def least_pairs(self) -> int:
        """The first version's pairs, 1 or more."""

    def refit(self, pairs: npt.NDArray[np.float64]) -> Mapping[str, Any]:
        """Learn anew from all pairs; a function of these alone, called in the driver.

        Args:
            pairs: ``(n, len(pair_metrics))``, in the order in which they were committed.

        Returns:
            the state: JSON of at most 10 kB without NaN. ``error`` and ``error_before`` in it, the median relative
            errors on pairs that were left out of the fit and of what was predicted without it, are shown to people.
        """
