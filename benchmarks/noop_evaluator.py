"""An evaluator that costs nothing, for ``throughput.py``."""

from collections.abc import Sequence

from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task


class NoOp(Evaluator):
    """Two conflicting sums of the genotype."""

    name = "no-op"
    batch_size = 256

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return [MetricSpec(name=name, unit="1", direction="min") for name in ("a", "b")]

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated]:
        return [
            Evaluated(
                {
                    "a": Metric(float(sum(task.genotype))),
                    "b": Metric(float(sum((c - i % 9) ** 2 for i, c in enumerate(task.genotype)))),
                }
            )
            for task in tasks
        ]


ARCHFRONT_PLUGINS = {"evaluators": {"no-op": NoOp}}
