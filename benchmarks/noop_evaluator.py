"""Evaluators that cost nothing, for the benchmarks."""

from collections.abc import Sequence

import numpy as np

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


class Single(NoOp):
    """One candidate a call, as training takes them."""

    name = "single"
    batch_size = 1


class FourSums(Evaluator):
    """Four conflicting weighted sums without ties, as accuracies and latencies have none: ``a`` to ``d``."""

    name = "four-sums"
    batch_size = 256

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return [MetricSpec(name=name, unit="1", direction="min") for name in ("a", "b", "c", "d")]

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated]:
        genotypes = np.array([task.genotype for task in tasks], dtype=float)
        position = np.arange(genotypes.shape[1])
        # Square roots of different primes have no rational sum: no two candidates are equal by chance.
        weights = np.sqrt(_PRIMES[: len(position)])
        sums = np.stack(
            [
                genotypes @ weights,
                ((genotypes - position % 9) ** 2) @ weights[::-1],
                np.abs(genotypes - (3 * position) % 9) @ weights,
                (8 - genotypes) @ weights[::-1],
            ],
            axis=1,
        )
        return [
            Evaluated({name: Metric(value) for name, value in zip("abcd", row, strict=True)}) for row in sums.tolist()
        ]


_PRIMES = np.array(
    [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79], dtype=float
)  # fmt: skip

ARCHFRONT_PLUGINS = {"evaluators": {"no-op": NoOp, "single": Single, "four-sums": FourSums}}
