"""Real training that says in a file how often it was begun."""

from collections.abc import Sequence

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.training import Training


class CountedTraining(Training):
    name = "counted-training"

    def __init__(self, *, log: str, fidelities: list[int]) -> None:
        super().__init__(fidelities=fidelities)
        self.log = log

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        for task in tasks:
            with open(self.log, "a") as file:
                file.write(f"{task.number}\n")
        return super().evaluate(tasks, context)


ARCHFRONT_PLUGINS = {"evaluators": {"counted-training": CountedTraining}}
