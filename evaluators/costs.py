"""Parameters, multiply-accumulates and bytes, counted on meta tensors: nothing is computed, nothing allocated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.errors import InputError
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.spaces.blocks import NO_BLOCK, BlockSpace

FLOAT_BYTES = 4
_CACHE_ENTRIES = 100_000
_cache: OrderedDict[tuple[str, str], Cost] = OrderedDict()
_blocks: dict[str, list[Cost]] = {}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs for one input, without batch.

    Attributes:
        params: trainable and frozen parameters, shared ones once.
        macs: multiply-accumulates of convolutions and matrix products (linear, attention).
        size_bytes: parameters and floating buffers (batch norm statistics) as float32, other buffers as they are.
        activation_bytes: the peak, not the sum: the largest input plus output, as float32, of one leaf module. A
            runtime that keeps nothing else alive needs at least so much for activations; residuals come on top.
    """

    params: int
    macs: int
    size_bytes: int
    activation_bytes: int


@runtime_checkable
class InputShaped(Protocol):
    """A space that says what its models take."""

    resolution: int
    in_channels: int


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
            return _chained(_block_costs(space), space.block_indices(space.from_json([task.genotype]))[0])
        if not isinstance(space, InputShaped):
            raise TypeError(f"{space.name} does not say what its models take")
        with torch.device("meta"):
            model = space.build(task.genotype)
        return count(model, (space.in_channels, space.resolution, space.resolution))


def count(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Costs of any module for one input; it is left in evaluation mode on the meta device.

    Products are counted by torch's dispatcher, so those of functions (``matmul``, attention) are seen as well.

    Args:
        model: takes one tensor; moved to the meta device, which loses its weights.
        input_shape: without the batch.
    """
    model = model.to("meta").eval()
    peak = 0

    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal peak
        peak = max(peak, _elements(inputs) + _elements(output))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(hook) for leaf in leaves]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *input_shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    buffers = sum(b.numel() * (FLOAT_BYTES if b.is_floating_point() else b.element_size()) for b in model.buffers())
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, int(counter.get_total_flops()) // 2, params * FLOAT_BYTES + buffers, peak * FLOAT_BYTES)


def _block_costs(space: BlockSpace) -> list[Cost]:
    """The cost of each block of the catalogue, counted once per process."""
    if space.digest not in _blocks:
        with torch.device("meta"):
            made = [(space.build_block(spec.descriptor), spec.input_shape) for spec in space.block_catalogue()]
        _blocks[space.digest] = [count(block, shape) for block, shape in made]
    return _blocks[space.digest]


def _chained(costs: list[Cost], indices: npt.NDArray[np.int64]) -> Cost:
    """A chain's cost is the sum of its blocks'; the peak of its activations is the largest of theirs."""
    parts = [costs[i] for i in indices if i != NO_BLOCK]
    return Cost(
        sum(part.params for part in parts),
        sum(part.macs for part in parts),
        sum(part.size_bytes for part in parts),
        max(part.activation_bytes for part in parts),
    )


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, (tuple, list)):
        return sum(_elements(item) for item in value)
    return 0
