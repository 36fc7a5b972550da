"""What the card can do, measured before anything else: copies and products of matrices, on random data."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import Timer
from torch import Tensor

from archfront.kernels.reference.cost import Cost
from archfront.kernels.reference.low_bit_linear import FP8


class Ceilings(NamedTuple):
    """Rates of the device.

    Attributes:
        copy: bytes a second, read and written.
        peaks: operations a second by kind of arithmetic.
        sources: what each rate was measured with, or why it was not.
    """

    copy: float
    peaks: dict[str, float]
    sources: dict[str, str]

    def floor_us(self, cost: Cost, peak: str) -> float:
        """No call takes less: the larger one of arithmetic and traffic."""
        return max(cost.operations / self.peaks[peak], cost.bytes / self.copy) * 1e6


def measure(timer: Timer) -> Ceilings:
    """Copy, bf16, int8, and float32 without TF32. Int8 and fp8 have one peak on the GPUs there are, so the better of
    the two libraries' products counts."""
    device = timer.device
    numbers, size = (2**29, 8192) if timer.on_gpu else (2**20, 64)
    pair = [torch.randn(numbers, device=device, dtype=torch.float16) for _ in range(2)]
    moved = 2 * pair[0].nbytes
    copy = moved / _median_ms(timer, lambda two: two[1].copy_(two[0]), pair) * 1e3
    sources = {"copy": f"{moved / 2**30:.3g} GiB read and written"}

    def product(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = (torch.randn(size, size, device=device) for _ in range(2))
        if dtype == torch.int8:
            return (left * 32).round().clamp(-127, 127).to(dtype), (right * 32).round().clamp(-127, 127).to(dtype).t()
        return left.to(dtype), right.to(dtype).t()

    def scaled(left: Tensor, right: Tensor) -> Tensor:
        one = torch.ones((), device=device)
        return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    tried: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
        "bf16": (torch.bfloat16, torch.mm),
        "_int_mm": (torch.int8, torch._int_mm),
        "_scaled_mm fp8": (FP8, scaled),
        "float32": (torch.float32, torch.mm),
    }
    rates: dict[str, float] = {}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, (dtype, function) in tried.items():
        try:
            operands = product(dtype)
            rates[name] = 2 * size**3 / _median_ms(timer, partial(_applied, function), operands) * 1e3
            sources[name] = f"{size} x {size} x {size}"
        except (RuntimeError, TypeError) as error:
            sources[name] = reason(error)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    low = max(("_int_mm", "_scaled_mm fp8"), key=lambda name: rates.get(name, 0.0))
    if low not in rates:
        # Twice bf16, as data sheets have it, is better than no floor; the table says so.
        low, rates["assumed"] = "assumed", 2 * rates["bf16"]
        sources["int8"] = "twice bf16, not measured"
    peaks = {"bf16": rates["bf16"], "int8": rates[low], "float32": rates["float32"]}
    return Ceilings(copy, peaks, {**sources, "int8": sources.get("int8", low)})


def reason(error: BaseException) -> str:
    """An error in one line: of compilers' pages the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def described(found: Ceilings) -> list[tuple[str, str, str]]:
    """For a table: what, how much, measured how."""
    rows = [("copy", f"{found.copy / 1e12:.3g} TB/s", found.sources["copy"])]
    rows += [
        (f"{name} product", f"{rate / 1e12:.4g} TFLOP/s", found.sources.get(name, ""))
        for name, rate in found.peaks.items()
    ]
    others = {name: text for name, text in found.sources.items() if name not in found.peaks and name != "copy"}
    return rows + [(name, "", text) for name, text in others.items()]


def _applied(function: Callable[[Tensor, Tensor], Tensor], operands: tuple[Tensor, Tensor]) -> Tensor:
    return function(*operands)


def _median_ms(timer: Timer, call: Callable[[Any], Any], value: Any) -> float:
    # Operands of hundreds of MB are cold whatever L2 has.
    loop = timer.loop(call, lambda _: value, warm=True)
    return statistics.median(timer.samples({"": loop})[""])
