"""EvoNorm-S0, and B0 at inference, beside a copy of as many bytes and the same through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from case import Case, Variant, normal
from torch import Tensor

from archfront.kernels.ops import evonorm as module
from archfront.kernels.reference import evonorm as reference
from archfront.kernels.reference.cost import Cost

COMPILED = "torch, compiled"
_DTYPE = torch.bfloat16
_GROUPS, _EPS = 32, 1e-5
# ResNet-50's planes at batch 256; groups of the first are held on the chip, those of the last two are small.
_SHAPES = [
    (256, 256, 56, 56),
    (256, 512, 28, 28),
    (256, 64, 112, 112),
    (256, 1024, 14, 14),
    (256, 2048, 7, 7),
    (8, 256, 56, 56),
]


class Values(NamedTuple):
    """S0 does not read the running variance."""

    x: Tensor
    v: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """S0 first, which has a goal."""
    for operator, least in (("evonorm_s0", 0), ("evonorm_b0", 2)):
        for place, shape in enumerate([(2, 32, 5, 3)] if device.type == "cpu" else _SHAPES):
            yield _case(operator, shape, least + (place > 1), device)


def _one_image(result: Tensor) -> Tensor:
    return result[:1]


def _case(operator: str, shape: tuple[int, int, int, int], priority: int, device: torch.device) -> Case:
    def values(seed: int) -> Values:
        v, variance, weight, bias = (
            normal((shape[1],), 5 * seed + 1 + place, device, torch.float32) for place in range(4)
        )
        return Values(normal(shape, 5 * seed, device), v, 0.5 + variance.square(), weight, bias)

    def computed(source: Any, given: Values) -> Tensor:
        x, v, variance, weight, bias = given
        if operator == "evonorm_s0":
            return source.evonorm_s0(x, v, weight, bias, groups=_GROUPS, eps=_EPS)  # type: ignore[no-any-return]
        return source.evonorm_b0(x, v, variance, weight, bias, eps=_EPS)  # type: ignore[no-any-return]

    def ours(*given: Tensor) -> Tensor:
        return computed(module, Values(*given))

    def plain(*given: Tensor) -> Tensor:
        return computed(reference, Values(*given))

    def exact(given: Values) -> Tensor:
        return computed(reference, Values(given.x[:1].double(), *(part.double() for part in given[1:])))

    costs = {"evonorm_s0": reference.evonorm_s0_cost, "evonorm_b0": reference.evonorm_b0_cost}
    cost = costs[operator](shape, dtype=_DTYPE)
    variants = [
        Variant(operator, tuple, ours, exact, cost, "float32", _one_image, ours=True),
        Variant(
            "copy of as many bytes",
            lambda given: (given.x,),
            torch.clone,
            lambda given: given.x[:1].double(),
            Cost(0, cost.bytes),
            "float32",
            _one_image,
        ),
        Variant("torch, eager", tuple, plain, exact, cost, "float32", _one_image),
        Variant(COMPILED, tuple, plain, exact, cost, "float32", _one_image, compiled=True),
    ]
    facts = {"n": shape[0], "c": shape[1], "h": shape[2], "groups": _GROUPS}
    name = f"{shape[0]} x {shape[1]} x {shape[2]}^2"
    return Case(operator, name, _DTYPE, facts, values, variants, COMPILED, priority)
