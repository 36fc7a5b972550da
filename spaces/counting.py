"""What models cost: parameters, multiply-accumulates and bytes, counted on meta tensors, so nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.spaces.blocks import NO_BLOCK, BlockSpace
from archfront.spaces.policies.packing import quantised_bytes
from archfront.spaces.policies.quantised import float_weight, quantised_layers
from archfront.spaces.space import Population

FLOAT_BYTES = 4
_blocks: dict[str, list[Cost]] = {}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs for one input, without batch.

    Attributes:
        params: trainable and frozen parameters, shared ones once.
        macs: multiply-accumulates of convolutions and matrix products (linear, attention).
        size_bytes: parameters and floating buffers (batch norm statistics) as float32, quantised weights as packed
            codes and scales, other buffers as they are.
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


@runtime_checkable
class Costed(Protocol):
    """A space that knows the costs of its models without building them."""

    def costs(self, population: Population) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Parameters and multiply-adds for one input, of what ``build`` makes: ``(n,)`` each."""


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
    size = params * FLOAT_BYTES + buffers
    for _, layer, holder in quantised_layers(model):
        weight = float_weight(layer)
        assert weight is not None
        size += round(quantised_bytes(weight.shape, holder.quantiser)) - weight.numel() * FLOAT_BYTES
    return Cost(params, int(counter.get_total_flops()) // 2, size, peak * FLOAT_BYTES)


def block_costs(space: BlockSpace) -> list[Cost]:
    """The cost of each block of the catalogue, counted once per process."""
    if space.digest not in _blocks:
        with torch.device("meta"):
            made = [(space.build_block(spec.descriptor), spec.input_shape) for spec in space.block_catalogue()]
        _blocks[space.digest] = [count(block, shape) for block, shape in made]
    return _blocks[space.digest]


def chained(costs: list[Cost], indices: npt.NDArray[np.int64]) -> Cost:
    """A chain's cost is the sum of its blocks'; the peak of its activations is the largest of theirs."""
    parts = [costs[i] for i in indices if i != NO_BLOCK]
    return Cost(
        sum(part.params for part in parts),
        sum(part.macs for part in parts),
        sum(part.size_bytes for part in parts),
        max(part.activation_bytes for part in parts),
    )


def chain_costs(space: BlockSpace, population: Population) -> npt.NDArray[np.int64]:
    """``(n, 2)``: parameters and multiply-adds of chains of blocks, as ``chained`` sums them."""
    found = [(cost.params, cost.macs) for cost in block_costs(space)]
    padded = np.array([*found, (0, 0)], dtype=np.int64)  # NO_BLOCK, -1, is the last
    sums: npt.NDArray[np.int64] = padded[space.block_indices(population)].sum(axis=1)
    return sums


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, (tuple, list)):
        return sum(_elements(item) for item in value)
    return 0
