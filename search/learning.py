"""Versions of a predictor that learns while its job runs: each a function of the pairs that are in the ledger."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from archfront.db.history import History
from archfront.db.records import FinishedRecord, PredictorRecord
from archfront.errors import InputError, JobFailedError
from archfront.evaluators.evaluator import Evaluator
from archfront.evaluators.learning import Learned, Learning

LARGEST_STATE = 10_000
"""Bytes of JSON: it travels with every batch."""


def learning_evaluator(evaluators: Sequence[tuple[str, Evaluator]]) -> tuple[str, Learning] | None:
    """The evaluator of a job that learns while it runs, with its name.

    Raises:
        InputError: there are several.
    """
    found = [(name, e) for name, e in evaluators if isinstance(e, Learning) and e.pair_metrics]
    if len(found) > 1:
        names = [name for name, _ in found]
        raise InputError("evaluators", names, "learn while the job runs", "Let one of them, the others not.")
    return found[0] if found else None


class Learner:
    """Takes a job's results in the order of their commits, and fits a new version whenever enough pairs are in.

    Attributes:
        current: the version in force; None before the first, or where no evaluator learns.
        new: versions to be committed together with the results that they were fitted to.
    """

    def __init__(self, evaluators: Sequence[tuple[str, Evaluator]], history: History) -> None:
        self._learning = learning_evaluator(evaluators)
        self.current: Learned | None = None
        self.new: list[PredictorRecord] = []
        self._versions: dict[str, Learned] = {}
        self._pairs: list[tuple[float, ...]] = []
        if self._learning is None:
            return
        # What was recorded holds, even if other code or another machine would now fit the same pairs otherwise.
        for record in history.predictors():
            self._begin(record)
        self._pairs = list(map(tuple, history.measured(self._learning[1].pair_metrics).tolist()))

    def version(self, name: str | None) -> Learned | None:
        """The version that an ask recorded."""
        return None if name is None else self._versions.get(name)

    def take(self, record: FinishedRecord) -> None:
        """Learn from a result.

        Raises:
            JobFailedError: the evaluator's ``refit`` failed, or gave what is no state.
        """
        if self._learning is None or record.state != "done":
            return
        name, evaluator = self._learning
        metrics = [record.metrics.get(metric) for metric in evaluator.pair_metrics]
        pair = tuple(math.nan if metric is None else metric.value for metric in metrics)
        if not all(map(math.isfinite, pair)):
            return
        self._pairs.append(pair)
        count = len(self._pairs)
        # Powers of two keep refits few, and each makes a difference.
        times, rest = divmod(count, evaluator.least_pairs)
        if rest or times & (times - 1):
            return
        try:
            text = json.dumps(evaluator.refit(np.array(self._pairs, dtype=np.float64)), allow_nan=False, sort_keys=True)
            if len(text) > LARGEST_STATE:
                raise ValueError(f"a state of {len(text)} bytes, more than {LARGEST_STATE}")
        except Exception as error:
            raise JobFailedError(f"Evaluator {name!r} could not learn from {count} pairs: {error!r}") from error
        digest = hashlib.blake2b(f"{name}/{count}/{text}".encode(), digest_size=8).hexdigest()
        # As a resumed driver reads it: the same types.
        made = PredictorRecord(pairs=count, version=f"{count}-{digest}", evaluator=name, state=json.loads(text))
        self._begin(made)
        self.new.append(made)

    def _begin(self, record: PredictorRecord) -> None:
        self.current = self._versions[record.version] = Learned(record.version, record.state)
