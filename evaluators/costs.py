"""Parameters, multiply-accumulates and bytes of candidates; see ``spaces.counting``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch

from archfront.errors import InputError
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.spaces.blocks import BlockSpace
from archfront.spaces.counting import Cost, InputShaped, block_costs, chained, count

__all__ = ["Cost", "Costs", "InputShaped", "count"]

_CACHE_ENTRIES = 100_000
_cache: OrderedDict[tuple[str, str], Cost] = OrderedDict()


class Costs(Evaluator):
    """Counts each candidate's parameters, multiply-accumulates and bytes for one input; see ``Cost``."""

    name: ClassVar[str] = "costs"
    batch_size = 512

    def __init__(self) -> None:
        pass

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (
            MetricSpec(name="params", unit="1", direction="min"),
            MetricSpec(name="macs", unit="1", direction="min"),
            MetricSpec(name="size_bytes", unit="bytes", direction="min"),
            MetricSpec(name="activation_bytes", unit="bytes", direction="min"),
        )

    def check(self, context: EvaluationContext) -> None:
        if not isinstance(context.space, InputShaped):
            problem = "does not say what its models take"
            raise InputError("space.name", context.space.name, problem, "Leave out the costs, or choose another space.")

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        self.check(context)
        digest = context.space.digest
        results: list[Evaluated | Exception] = []
        for task in tasks:
            cost = _cache.get((digest, task.key))
            try:
                if cost is None:
                    cost = self._count(task, context)
                    _cache[digest, task.key] = cost
                    if len(_cache) > _CACHE_ENTRIES:
                        _cache.popitem(last=False)
            except Exception as error:
                results.append(error)
                continue
            values = {
                "params": cost.params,
                "macs": cost.macs,
                "size_bytes": cost.size_bytes,
                "activation_bytes": cost.activation_bytes,
            }
            results.append(Evaluated({name: Metric(float(value), "computed") for name, value in values.items()}))
        return results

    def _count(self, task: Task, context: EvaluationContext) -> Cost:
        space = context.space
        if isinstance(space, BlockSpace):
            return chained(block_costs(space), space.block_indices(space.from_json([task.genotype]))[0])
        if not isinstance(space, InputShaped):
            raise TypeError(f"{space.name} does not say what its models take")
        with torch.device("meta"):
            model = space.build(task.genotype)
        return count(model, (space.in_channels, space.resolution, space.resolution))
