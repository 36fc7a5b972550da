"""An evaluator whose figures hold for a device: it notes from when to when it was at work, and where."""

import socket
import time
from collections.abc import Sequence

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task


class Stopwatch(Evaluator):
    name = "stopwatch"
    on_device = True

    def __init__(self, *, log: str) -> None:
        self.log = log

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return [MetricSpec(name="wait_ms", unit="ms", direction="min")]

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated]:
        begun = time.time()
        time.sleep(0.1)
        with open(self.log, "a") as file:
            file.write(f"{begun} {time.time()} {socket.gethostname()}\n")
        return [Evaluated({"wait_ms": Metric(100.0, "measured", device=socket.gethostname())}) for _ in tasks]


ARCHFRONT_PLUGINS = {"evaluators": {"stopwatch": Stopwatch}}
