"""A deterministic evaluator for tests: two conflicting metrics of a genotype, after a pause, or a misdeed on demand."""

import hashlib
import os
import signal
import time
from collections.abc import Sequence

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task


class Synthetic(Evaluator):
    name = "synthetic"

    def __init__(
        self,
        *,
        sleep_s: float = 0.0,
        batch_size: int = 1,
        fidelities: list[int] | None = None,
        misdeed: str = "none",
        every: int = 1,
        log: str | None = None,
    ) -> None:
        self.sleep_s = sleep_s
        self.batch_size = batch_size
        self.fidelities = fidelities
        self.misdeed = misdeed
        self.every = every
        self.log = log

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return [
            MetricSpec(name="gain", unit="1", direction="max"),
            MetricSpec(name="cost", unit="1", direction="min", has_std=True),
        ]

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated]:
        return [self._one(task) for task in tasks]

    def _one(self, task: Task) -> Evaluated:
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{task.number}\n")
        if self.sleep_s:
            time.sleep(self.sleep_s)
        digest = hashlib.blake2b(f"{task.key}/{task.fidelity}".encode(), digest_size=8).digest()
        noise = int.from_bytes(digest, "big") / 2**64
        cost = sum(float(c) if isinstance(c, (int, float)) else len(c) for c in task.genotype)
        gain = cost**0.5 + noise + 0.1 * task.fidelity
        if self.misdeed != "none" and task.number % self.every == self.every - 1:
            gain = self._misbehave(gain)
        return Evaluated({"gain": Metric(gain), "cost": Metric(cost, std=0.5)})

    def _misbehave(self, gain: float) -> float:
        if self.misdeed == "raise":
            raise RuntimeError("synthetic misdeed")
        if self.misdeed == "nan":
            return float("nan")
        if self.misdeed == "hang":
            time.sleep(3600)
        if self.misdeed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.misdeed == "hog":
            hog = bytearray(800 * 2**20)
            hog[::4096] = b"x" * len(hog[::4096])
            time.sleep(30)
        return gain


ARCHFRONT_PLUGINS = {"evaluators": {"synthetic": Synthetic}}
