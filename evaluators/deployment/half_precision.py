"""A network in half precision: what a GPU runs it in, if anything is to be faster than that."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)
"""The first is finer; the second has float32's range."""


@torch.no_grad()
def in_half(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of a network and its input in float16, or in bfloat16 where float16 overflows on this input.

    Args:
        model: in evaluation mode.
        example: numbers, or tokens, which stay what they are.

    Raises:
        ValueError: neither gives finite outputs.
    """
    for dtype in HALVES:
        made = copy.deepcopy(model).to(dtype)
        given = example.to(dtype) if example.is_floating_point() else example
        if bool(torch.isfinite(made(given)).all()):
            return made, given
    raise ValueError("its outputs are not finite in float16 nor in bfloat16")
