"""An evaluator for tests: it predicts costs, measures some of them on a device that is half as dear again, and learns.

All of it is deterministic: what a job does with it is a function of the job file.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task


class Learner(Evaluator):
    name = "learner"
    least_pairs = 4

    def __init__(
        self, *, verify: float = 0.3, sleep_s: float = 0.0, batch_size: int = 1, misdeed: str = "none"
    ) -> None:
        self.verify = verify
        self.sleep_s = sleep_s
        self.batch_size = batch_size
        self.misdeed = misdeed

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return [
            MetricSpec(name="gain", unit="1", direction="max"),
            MetricSpec(name="cost", unit="1", direction="min", has_std=True),
        ]

    @property
    def pair_metrics(self) -> Sequence[str]:
        return ("cost_base", "cost") if self.verify else ()

    def refit(self, pairs: npt.NDArray[np.float64]) -> Mapping[str, Any]:
        if self.misdeed == "raise":
            raise RuntimeError("no lesson")
        base, cost = pairs.T
        ratio = float(cost.sum() / base.sum())
        state = {"ratio": ratio, "std": float((cost - ratio * base).std())}
        error, before = (float(np.median(np.abs(cost / (r * base) - 1))) for r in (ratio, 1.0))
        more = {"words": "x" * 20_000} if self.misdeed == "large" else {}
        return state | {"error": error, "error_before": before, "pairs": len(pairs)} | more

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated]:
        return [self._one(task) for task in tasks]

    def _one(self, task: Task) -> Evaluated:
        if self.sleep_s:
            time.sleep(self.sleep_s)
        digest = hashlib.blake2b(task.key.encode(), digest_size=8).digest()
        noise = int.from_bytes(digest, "big") / 2**64
        base = float(sum(task.genotype))
        gain = Metric(base**0.5 + noise)
        predicted = Metric(base, "predicted", 5.0, "sum")
        if task.learned is not None:
            state = task.learned.state
            predicted = Metric(state["ratio"] * base, "predicted", state["std"], f"sum@{task.learned.version}")
        if task.seed >= self.verify * 2**63:
            return Evaluated({"gain": gain, "cost": predicted})
        measured = Metric(1.5 * base * (1 + 0.1 * noise), "measured", 0.01)
        metrics = {"cost": measured, "cost_predicted": predicted, "cost_base": Metric(base, "predicted", 5.0, "sum")}
        return Evaluated({"gain": gain, **metrics})


class Second(Learner):
    name = "second"


ARCHFRONT_PLUGINS = {"evaluators": {"learner": Learner, "second": Second}}
