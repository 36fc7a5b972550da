"""How far a kernel is from the truth, and whether it touches memory that is not its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 4096
GATES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Bounds of the relative error of one operator against float64 from the same (quantised) numbers."""


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same values amid poison, and all of that memory: what is read past an end and used then shows in the result.

    Poison is NaN, and the most negative number of integers.
    """
    memory = torch.full((values.numel() + 2 * GUARD,), _poison(values.dtype), dtype=values.dtype)
    view = memory[GUARD : GUARD + values.numel()].view(values.shape)
    view.copy_(values)
    return view, memory


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Callable[[], bool]]:
    """An output full of poison amid poison, and whether anything was written past its ends since."""
    out, memory = guarded(torch.full(shape, _poison(dtype), dtype=dtype))
    before = memory.clone()

    def strayed() -> bool:
        ends = [slice(None, GUARD), slice(GUARD + out.numel(), None)]
        return not all(torch.equal(_bits(memory[end]), _bits(before[end])) for end in ends)

    return out, strayed


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN and infinities count as infinitely far."""
    difference = (found.double() - truth.double()).nan_to_num(nan=torch.inf).norm()
    return float(difference / truth.double().norm().clamp_min(1e-300))


def worst_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the truth's root mean square."""
    difference = (found.double() - truth.double()).nan_to_num(nan=torch.inf).abs()
    size = truth.double().square().mean().sqrt().clamp_min(1e-300)
    return float(difference.max() / size) if found.numel() else 0.0


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
