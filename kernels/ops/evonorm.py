"""EvoNorm-S0, and EvoNorm-B0 at inference, in one Triton kernel each: one read and one write where it can be.

A group (S0) or some planes (B0) of an image are held in registers from the variance to the result. Those that are too
large are read twice, tile by tile, the second time from L2 where it holds them. Variances are float32: the mean first,
then squares about it; of tiles, merged pairwise (Chan et al., 1979).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import evonorm as reference

OPERATORS = ("evonorm_s0", "evonorm_b0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Inside a group the kernels count in int32, with room for the masked end of the last tile.
MAX_GROUP = 2**30
MAX_HELD = {True: 32768, False: 8192}
"""Numbers that one program holds in registers, where 16 divides those of a plane and where not: at odd addresses each
takes a register for its own."""
TILE = 2048
"""Numbers of a tile where a group or plane is not held."""


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def column_of(vector: tl.tensor, channel: tl.tensor, has_channel: tl.tensor) -> tl.tensor:
    """A number a channel, float32, beside a tile of channels x pixels."""
    return tl.load(vector + channel, has_channel, other=0.0).to(tl.float32)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def s0_tile(
    value: tl.tensor,
    v: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    channel: tl.tensor,
    has_channel: tl.tensor,
    factor: tl.tensor,
) -> tl.tensor:
    active = value * tl.sigmoid(value * column_of(v, channel, has_channel))
    return active * (column_of(weight, channel, has_channel) * factor) + column_of(bias, channel, has_channel)


@triton.jit  # type: ignore[untyped-decorator]
def s0_kernel(
    x: tl.tensor,
    v: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    HELD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One group of ``width`` channels of one image, which is one piece of memory."""
    program = tl.program_id(0)
    first = program % groups * width
    # A batch may hold more than 2**31 numbers.
    base = program.to(tl.int64) * width * pixels
    row, pixel = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    if HELD:
        inside = (row < width)[:, None] & (pixel < pixels)[None, :]
        place = base + row[:, None] * pixels + pixel[None, :]
        value = tl.load(x + place, inside, other=0.0).to(tl.float32)
        # Not .to: sizes of 1 are constants to the compiler.
        count = width * pixels * 1.0
        centred = tl.where(inside, value - tl.sum(value) / count, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + eps)
        y = s0_tile(value, v, weight, bias, first + row, row < width, factor)
        tl.store(out + place, y.to(out.dtype.element_ty), inside)
    else:
        count, mean, squares = 0.0, 0.0, 0.0
        for start in range(0, width, BLOCK_C):
            for left in range(0, pixels, BLOCK_P):
                inside = (start + row < width)[:, None] & (left + pixel < pixels)[None, :]
                place = base + (start + row)[:, None] * pixels + (left + pixel)[None, :]
                value = tl.load(x + place, inside, other=0.0).to(tl.float32)
                more = (tl.minimum(width - start, BLOCK_C) * tl.minimum(pixels - left, BLOCK_P)).to(tl.float32)
                own = tl.sum(value) / more
                centred = tl.where(inside, value - own, 0.0)
                apart = own - mean
                squares += tl.sum(centred * centred) + apart * apart * (count * more / (count + more))
                count += more
                mean += apart * (more / count)
        factor = 1.0 / tl.sqrt(squares / count + eps)
        for start in range(0, width, BLOCK_C):
            for left in range(0, pixels, BLOCK_P):
                has_row = start + row < width
                inside = has_row[:, None] & (left + pixel < pixels)[None, :]
                place = base + (start + row)[:, None] * pixels + (left + pixel)[None, :]
                value = tl.load(x + place, inside, other=0.0).to(tl.float32)
                y = s0_tile(value, v, weight, bias, first + start + row, has_row, factor)
                tl.store(out + place, y.to(out.dtype.element_ty), inside)


@triton.jit  # type: ignore[untyped-decorator]
def b0_tile(
    value: tl.tensor,
    v: tl.tensor,
    running_var: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    channel: tl.tensor,
    has_row: tl.tensor,
    variance: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    batch = tl.sqrt(column_of(running_var, channel, has_row) + eps)
    instance = value * column_of(v, channel, has_row) + tl.sqrt(variance + eps)[:, None]
    # A NaN among the pixels of a plane is to show in all of it.
    divisor = tl.maximum(batch, instance, propagate_nan=tl.PropagateNan.ALL)
    return value / divisor * column_of(weight, channel, has_row) + column_of(bias, channel, has_row)


@triton.jit  # type: ignore[untyped-decorator]
def b0_kernel(
    x: tl.tensor,
    v: tl.tensor,
    running_var: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    planes: tl.tensor,
    channels: tl.tensor,
    pixels: tl.tensor,
    eps: tl.tensor,
    HELD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """BLOCK_C planes, of whichever images."""
    # A batch may hold more than 2**31 numbers.
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_P)
    channel, has_row = row % channels, row < planes
    base = row[:, None] * pixels
    if HELD:
        inside = has_row[:, None] & (pixel < pixels)[None, :]
        place = base + pixel[None, :]
        value = tl.load(x + place, inside, other=0.0).to(tl.float32)
        mean = tl.sum(value, 1) / pixels
        centred = tl.where(inside, value - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / pixels
        y = b0_tile(value, v, running_var, weight, bias, channel, has_row, variance, eps)
        tl.store(out + place, y.to(out.dtype.element_ty), inside)
    else:
        count = 0.0
        mean, squares = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
        for left in range(0, pixels, BLOCK_P):
            inside = has_row[:, None] & (left + pixel < pixels)[None, :]
            value = tl.load(x + base + (left + pixel)[None, :], inside, other=0.0).to(tl.float32)
            more = tl.minimum(pixels - left, BLOCK_P).to(tl.float32)
            own = tl.sum(value, 1) / more
            centred = tl.where(inside, value - own[:, None], 0.0)
            apart = own - mean
            squares += tl.sum(centred * centred, 1) + apart * apart * (count * more / (count + more))
            count += more
            mean += apart * (more / count)
        variance = squares / pixels
        for left in range(0, pixels, BLOCK_P):
            inside = has_row[:, None] & (left + pixel < pixels)[None, :]
            place = base + (left + pixel)[None, :]
            value = tl.load(x + place, inside, other=0.0).to(tl.float32)
            y = b0_tile(value, v, running_var, weight, bias, channel, has_row, variance, eps)
            tl.store(out + place, y.to(out.dtype.element_ty), inside)


class Launch(NamedTuple):
    """What a call needs beside its tensors: ``kernel[grid](*tensors, *sizes, eps, **constants)``."""

    grid: tuple[int]
    sizes: tuple[int, int, int]
    constants: dict[str, int | bool]


def plan_s0(shape: torch.Size, groups: int, held: int | None = None, tile: int = TILE) -> Launch:
    """The launch for an x of ``shape``: a program each group."""
    count, channels, height, width = shape
    each, pixels = channels // groups, height * width
    block_c, block_p = int(triton.next_power_of_2(each)), int(triton.next_power_of_2(pixels))
    whole = block_c * block_p <= (MAX_HELD[pixels % 16 == 0] if held is None else held)
    if not whole:
        block_p = min(block_p, tile)
        block_c = min(block_c, tile // block_p)
    return Launch((count * groups,), (groups, each, pixels), _constants(whole, block_c, block_p))


def plan_b0(shape: torch.Size, held: int | None = None, tile: int = TILE) -> Launch:
    """The launch for an x of ``shape``: a program each large plane, or each few small ones."""
    count, channels, height, width = shape
    planes, pixels = count * channels, height * width
    block_p = int(triton.next_power_of_2(pixels))
    whole = block_p <= (MAX_HELD[pixels % 16 == 0] if held is None else held)
    if not whole:
        block_p = tile
    block_c = min(int(triton.next_power_of_2(planes)), max(1, 2048 // block_p))
    return Launch((triton.cdiv(planes, block_c),), (planes, channels, pixels), _constants(whole, block_c, block_p))


def _constants(held: bool, block_c: int, block_p: int) -> dict[str, int | bool]:
    warps = max(1, min(16, block_c * block_p // 512))
    return {"HELD": held, "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": warps}


def run_s0(
    x: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    groups: int,
    eps: float,
    launch: Launch | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    if x.shape[0] == 0:
        return
    launch = launch or plan_s0(x.shape, groups)
    s0_kernel[launch.grid](x, v, weight, bias, out, *launch.sizes, eps, **launch.constants)


def run_b0(
    x: Tensor,
    v: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    eps: float,
    launch: Launch | None = None,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    if x.shape[0] == 0:
        return
    launch = launch or plan_b0(x.shape)
    b0_kernel[launch.grid](x, v, running_var, weight, bias, out, *launch.sizes, eps, **launch.constants)


def _check(x: Tensor, vectors: dict[str, Tensor], eps: float) -> None:
    """Raises ValueError where a kernel would compute something else than its twin, or nothing."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise refusal("x.shape", tuple(x.shape), "(n, c, h, w) with c, h and w of at least 1")
    check_dtype("x", x, DTYPES)
    channels = x.shape[1]
    for name, vector in vectors.items():
        check_shape(name, vector, (channels,), f"(c,) with c = {channels} of x")
        # Their dtype is their own: the kernels widen all.
        check_dtype(name, vector, DTYPES)
    if not eps > 0:
        raise refusal("eps", eps, "a number above 0")
    check_together(x, vectors)


def check_s0(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    _check(x, {"v": v, "weight": weight, "bias": bias}, eps)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if groups < 1 or channels % groups:
        raise refusal("groups", groups, f"a divisor of c = {channels} of x")
    if channels // groups * pixels >= MAX_GROUP:
        raise refusal("x.shape", tuple(x.shape), f"c / groups * h * w below {MAX_GROUP}")


def check_b0(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    _check(x, {"v": v, "running_var": running_var, "weight": weight, "bias": bias}, eps)
    if x.shape[2] * x.shape[3] >= MAX_GROUP:
        raise refusal("x.shape", tuple(x.shape), f"h * w below {MAX_GROUP}")


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::evonorm_s0", mutates_args=(), device_types="cuda")
def _operator_s0(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    check_s0(x, v, weight, bias, groups, eps)
    out = torch.empty_like(x)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_s0(x, v, weight, bias, out, groups=groups, eps=eps)
    return out


@_operator_s0.register_kernel("cpu")
def _s0_on_cpu(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    check_s0(x, v, weight, bias, groups, eps)
    return reference.evonorm_s0(x, v, weight, bias, groups=groups, eps=eps)


@_operator_s0.register_fake
def _s0_shape_only(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    check_s0(x, v, weight, bias, groups, eps)
    return torch.empty_like(x)


@torch.library.custom_op("archfront::evonorm_b0", mutates_args=(), device_types="cuda")
def _operator_b0(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    check_b0(x, v, running_var, weight, bias, eps)
    out = torch.empty_like(x)
    with torch.cuda.device(x.device):
        run_b0(x, v, running_var, weight, bias, out, eps=eps)
    return out


@_operator_b0.register_kernel("cpu")
def _b0_on_cpu(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    check_b0(x, v, running_var, weight, bias, eps)
    return reference.evonorm_b0(x, v, running_var, weight, bias, eps=eps)


@_operator_b0.register_fake
def _b0_shape_only(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    check_b0(x, v, running_var, weight, bias, eps)
    return torch.empty_like(x)


def evonorm_s0(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(n, c, h, w)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        v, weight, bias: ``(c,)``, each of one of these dtypes.
        groups: of neighbouring channels; divides c.
        eps: added to the variance; above 0.

    Returns:
        ``(n, c, h, w)`` of x's dtype.

    Raises:
        ValueError: a shape, dtype, number of groups, eps, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: Tensor = _operator_s0(x, v, weight, bias, groups=groups, eps=eps)
    return result


def evonorm_b0(x: Tensor, v: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(n, c, h, w)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        v, running_var, weight, bias: ``(c,)``, each of one of these dtypes.
        eps: added to both variances; above 0.

    Returns:
        ``(n, c, h, w)`` of x's dtype.

    Raises:
        ValueError: a shape, dtype, eps, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: Tensor = _operator_b0(x, v, running_var, weight, bias, eps=eps)
    return result


def compile_cases() -> list[CompileCase]:
    """Planes of ResNet-50 and MobileNetV2 at 224 pixels, held and not, small and large."""
    full, half, brain = torch.float32, torch.float16, torch.bfloat16
    cases = []
    for shape, groups, dtype in (
        ((8, 256, 56, 56), 32, half),
        ((8, 256, 56, 56), 32, full),
        ((8, 64, 112, 112), 32, brain),
        ((1, 64, 112, 112), 8, full),
        ((8, 2048, 7, 7), 32, half),
        ((8, 2048, 7, 7), 16, half),
        ((8, 2048, 4, 4), 1, half),
        ((8, 64, 111, 111), 8, half),
        ((256, 32, 7, 7), 32, brain),
    ):
        launch = plan_s0(torch.Size(shape), groups)
        arguments = (dtype, full, full, full, dtype, *launch.sizes, 1e-5)
        cases.append(CompileCase(f"S0 {shape} g{groups} {dtype}", s0_kernel, arguments, launch.constants))
    for shape, dtype in (
        ((8, 256, 56, 56), half),
        ((8, 64, 112, 112), full),
        ((1, 3, 224, 224), brain),
        ((8, 2048, 7, 7), half),
        ((8, 64, 90, 91), full),
        ((8, 3, 223, 223), half),
    ):
        launch = plan_b0(torch.Size(shape))
        tensors = (dtype, full, full, full, full, dtype)
        cases.append(CompileCase(f"B0 {shape} {dtype}", b0_kernel, (*tensors, *launch.sizes, 1e-3), launch.constants))
    return cases
