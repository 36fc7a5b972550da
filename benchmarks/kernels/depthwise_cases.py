"""Depthwise convolutions with norm and ReLU, beside a copy of as many bytes and cuDNN on channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Variant, normal
from torch import Tensor

from archfront.kernels.ops.depthwise import depthwise_scale_shift
from archfront.kernels.reference.cost import Cost
from archfront.kernels.reference.depthwise import depthwise_cost
from archfront.kernels.reference.depthwise import depthwise_scale_shift as twin

OPERATOR = "depthwise_scale_shift"
COMPILED = "conv2d channels_last, compiled"
_DTYPE = torch.float16
# (n, c, h, w), kernel, stride.
_SHAPES = [
    ((256, 576, 28, 28), 3, 1),
    ((256, 144, 56, 56), 3, 1),
    ((256, 144, 56, 56), 3, 2),
    ((256, 96, 112, 112), 3, 2),
    ((256, 960, 14, 14), 3, 1),
    ((256, 576, 28, 28), 5, 1),
    ((256, 672, 14, 14), 5, 1),
    ((256, 1104, 7, 7), 3, 1),
    ((8, 576, 28, 28), 3, 1),
    ((1, 576, 28, 28), 3, 1),
]
_TINY = [((2, 3, 6, 5), 3, 1), ((1, 5, 7, 7), 5, 2)]


class Values(NamedTuple):
    """Of the operator, in order."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """FBNet's and MobileNet's planes at batch 256, the 3 x 3 first, and two small batches."""
    for place, (shape, kernel, stride) in enumerate(_TINY if device.type == "cpu" else _SHAPES):
        yield _case(shape, kernel, stride, 0 if place < 3 else 1 if place < 7 else 2, device)


def _one_image(result: Tensor) -> Tensor:
    return result[:1]


def _case(shape: tuple[int, int, int, int], kernel: int, stride: int, priority: int, device: torch.device) -> Case:
    def values(seed: int) -> Values:
        x = normal(shape, 4 * seed, device, _DTYPE)
        weight = normal((shape[1], 1, kernel, kernel), 4 * seed + 1, device, _DTYPE, 1 / kernel)
        vectors = (normal((shape[1],), 4 * seed + 2 + i, device, torch.float32) for i in range(2))
        return Values(x, weight, *vectors)

    def folded(given: Values) -> tuple[Any, ...]:
        """Scale and shift in the convolution's weight and bias, as any deployment has them."""
        weight = (given.weight.float() * given.scale[:, None, None, None]).to(_DTYPE)
        return given.x.contiguous(memory_format=torch.channels_last), weight, given.shift.to(_DTYPE)

    def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(x, weight, bias, stride, kernel // 2, groups=shape[1]).relu()

    def exact(given: Values) -> Tensor:
        wide = (given.x[:1].double(), *(part.double() for part in given[1:]))
        return twin(*wide, stride=stride, relu=True)

    def exact_folded(given: Values) -> Tensor:
        x, weight, bias = folded(given._replace(x=given.x[:1]))
        return convolved(x.double(), weight.double(), bias.double())

    cost = depthwise_cost(shape, kernel=kernel, stride=stride, relu=True, dtype=_DTYPE)
    half = cost.bytes // 2 // _DTYPE.itemsize

    def copied(given: Values) -> tuple[Any, ...]:
        """A tensor whose copy moves as many bytes as the operator must."""
        flat = given.x.flatten()
        return (flat[:half].clone() if flat.numel() >= half else flat.repeat(2)[:half].clone(),)

    eager, compiled = "conv2d channels_last, eager", COMPILED
    variants = [
        Variant(
            OPERATOR,
            tuple,
            lambda *given: depthwise_scale_shift(*given, stride=stride, relu=True),
            exact,
            cost,
            "float32",
            _one_image,
            ours=True,
        ),
        Variant(
            "copy of as many bytes",
            copied,
            torch.clone,
            lambda given: copied(given)[0].double(),
            Cost(0, cost.bytes),
            "float32",
            lambda result: result,
        ),
        Variant(eager, folded, convolved, exact_folded, cost, "float32", _one_image),
        Variant(compiled, folded, convolved, exact_folded, cost, "float32", _one_image, compiled=True),
    ]
    facts = {"n": shape[0], "c": shape[1], "h": shape[2], "kernel": kernel, "stride": stride}
    name = f"{shape[0]} x {shape[1]} x {shape[2]}^2 k{kernel} s{stride}"
    return Case(OPERATOR, name, _DTYPE, facts, values, variants, COMPILED, priority)
