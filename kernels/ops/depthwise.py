"""Depthwise convolution with a folded batch norm and a ReLU in one Triton kernel.

Each program computes a tile of channels x output pixels of one image. On a CPU the operator is its eager twin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_together, refusal
from archfront.kernels.reference import depthwise as reference

OPERATORS = ("depthwise_scale_shift",)
KERNELS = (3, 5)
STRIDES = (1, 2)
DTYPES = (torch.float32, torch.float16)
# Inside a plane the kernel counts in int32, with room for the masked end of the last tile.
MAX_PLANE = 2**30
# Four results a thread of four warps: eight spilled, in ptxas for sm_80 and sm_90.
TILE = 512
MAX_PIXELS = 256


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def depthwise_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One tile; pointers are to contiguous tensors, the grid has one axis, and the blocks are powers of two."""
    out_pixels = out_height * out_width
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_P)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    pixel = program % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = program // pixel_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image = program // (pixel_blocks * channel_blocks)
    # A batch may hold more than 2**31 numbers.
    plane = (image.to(tl.int64) * channels + channel)[:, None]
    row = pixel // out_width * STRIDE - KERNEL // 2
    column = pixel % out_width * STRIDE - KERNEL // 2
    has_channel = channel < channels
    has_pixel = pixel < out_pixels

    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    # A loop over rows that stays one: unrolled, the loads of all taps are held in registers at once, and spill.
    for i in tl.range(KERNEL):
        for j in tl.static_range(KERNEL):
            inside = (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width) & has_pixel
            source = x + plane * (height * width) + ((row + i) * width + column + j)[None, :]
            value = tl.load(source, has_channel[:, None] & inside[None, :], other=0.0)
            tap = tl.load(weight + channel * (KERNEL * KERNEL) + i * KERNEL + j, has_channel, other=0.0)
            total += value.to(tl.float32) * tap.to(tl.float32)[:, None]

    factor = tl.load(scale + channel, has_channel, other=0.0)[:, None]
    total = total * factor + tl.load(shift + channel, has_channel, other=0.0)[:, None]
    if RELU:
        # Not tl.maximum, which would turn NaN into zero and hide a broken model.
        total = tl.where(total < 0.0, 0.0, total)
    target = out + plane * out_pixels + pixel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), has_channel[:, None] & has_pixel[None, :])


class Launch(NamedTuple):
    """What a call needs beside its tensors: ``kernel[grid](*tensors, *sizes, **constants)``."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int, int]
    constants: dict[str, int | bool]


def plan(shape: torch.Size, kernel: int, stride: int, relu: bool) -> Launch:
    """The launch for an x of ``shape``: wide tiles of pixels for large planes, of channels for small ones."""
    count, channels, height, width = shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    pixels = out_height * out_width
    block_p = min(triton.next_power_of_2(pixels), MAX_PIXELS)
    block_c = min(triton.next_power_of_2(channels), TILE // block_p)
    grid = (count * triton.cdiv(channels, block_c) * triton.cdiv(pixels, block_p),)
    constants = {"KERNEL": kernel, "STRIDE": stride, "RELU": relu, "BLOCK_C": block_c, "BLOCK_P": block_p}
    return Launch(grid, (channels, height, width, out_height, out_width), {**constants, "num_warps": 4})


def run_kernel(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, out: Tensor, *, stride: int, relu: bool
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    if x.shape[0] == 0:
        return
    launch = plan(x.shape, weight.shape[-1], stride, relu)
    depthwise_kernel[launch.grid](x, weight, scale, shift, out, *launch.sizes, **launch.constants)


def check(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise refusal("x.shape", tuple(x.shape), "(n, c, h, w) with c, h and w of at least 1")
    if x.dtype not in DTYPES:
        raise refusal("x.dtype", x.dtype, " or ".join(map(str, DTYPES)))
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    if pixels >= MAX_PLANE:
        raise refusal("x.shape", tuple(x.shape), f"h * w below {MAX_PLANE}")
    weights = [(channels, 1, k, k) for k in KERNELS]
    if tuple(weight.shape) not in weights:
        raise refusal("weight.shape", tuple(weight.shape), " or ".join(map(str, weights)))
    if stride not in STRIDES:
        raise refusal("stride", stride, " or ".join(map(str, STRIDES)))
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector.shape != (channels,):
            raise refusal(f"{name}.shape", tuple(vector.shape), f"(c,) with c = {channels} of x")
    # The folded norm stays float32 beside a float16 x: it is small, and rounding it would shift whole channels.
    wanted = {"weight": (weight, x.dtype), "scale": (scale, torch.float32), "shift": (shift, torch.float32)}
    for name, (tensor, dtype) in wanted.items():
        if tensor.dtype != dtype:
            raise refusal(f"{name}.dtype", tensor.dtype, f"{dtype} beside an x of {x.dtype}")
    check_together(x, {"weight": weight, "scale": scale, "shift": shift})


def _empty_result(x: Tensor, stride: int) -> Tensor:
    count, channels, height, width = x.shape
    return x.new_empty((count, channels, -(-height // stride), -(-width // stride)))


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::depthwise_scale_shift", mutates_args=(), device_types="cuda")
def _operator(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu: bool) -> Tensor:
    check(x, weight, scale, shift, stride)
    out = _empty_result(x, stride)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, weight, scale, shift, out, stride=stride, relu=relu)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu: bool) -> Tensor:
    check(x, weight, scale, shift, stride)
    y = reference.depthwise_scale_shift(x, weight, scale, shift, stride=stride, relu=relu)
    # The fake promises this layout, whatever a convolution of some torch release prefers.
    return y.contiguous()


@_operator.register_fake
def _shape_only(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu: bool) -> Tensor:  # noqa: ARG001
    check(x, weight, scale, shift, stride)
    return _empty_result(x, stride)


def depthwise_scale_shift(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu: bool
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(n, c, h, w)``, float32 or float16, contiguous, on a GPU or a CPU.
        weight: ``(c, 1, k, k)`` of x's dtype, k 3 or 5.
        scale, shift: ``(c,)``, float32 also beside a float16 x.
        stride: 1 or 2.
        relu: whether to clamp at zero; NaN stays NaN.

    Returns:
        ``(n, c, ceil(h / stride), ceil(w / stride))`` of x's dtype; sums are float32.

    Raises:
        ValueError: a shape, dtype, stride, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: Tensor = _operator(x, weight, scale, shift, stride=stride, relu=relu)
    return result


def compile_cases() -> list[CompileCase]:
    """FBNet's planes: large ones, and the last, whose tiles are wide in channels. The first two need most registers."""
    shapes: list[tuple[tuple[int, ...], int, int, torch.dtype]] = [
        ((1, 1104, 7, 7), 5, 1, torch.float32),
        ((8, 144, 56, 56), 5, 2, torch.float16),
        ((1, 96, 112, 112), 3, 2, torch.float32),
        ((8, 1104, 7, 7), 3, 1, torch.float16),
    ]
    cases = []
    for shape, kernel, stride, dtype in shapes:
        launch = plan(torch.Size(shape), kernel, stride, relu=True)
        tensors = (dtype, dtype, torch.float32, torch.float32, dtype)
        name = f"{shape} k{kernel} s{stride} {dtype}"
        cases.append(CompileCase(name, depthwise_kernel, (*tensors, *launch.sizes), launch.constants))
    return cases
