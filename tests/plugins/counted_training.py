"""Real training that says in a file how often it was begun, and that can be held until another job is under way."""

import time
from collections.abc import Sequence
from pathlib import Path

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.training import Training


class CountedTraining(Training):
    name = "counted-training"

    def __init__(self, *, log: str, fidelities: list[int], gate: str | None = None) -> None:
        super().__init__(fidelities=fidelities)
        self.log, self.gate = log, gate

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        for task in tasks:
            with open(self.log, "a") as file:
                file.write(f"{task.number}\n")
            # All but the first evaluation wait for this file.
            while self.gate is not None and task.number > 1 and not Path(self.gate).exists():
                time.sleep(0.05)
        return super().evaluate(tasks, context)


ARCHFRONT_PLUGINS = {"evaluators": {"counted-training": CountedTraining}}
