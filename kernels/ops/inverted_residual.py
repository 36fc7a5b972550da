"""An inverted residual in one Triton kernel: none of the hidden channels goes through memory.

A program computes all channels of a tile of output pixels, chunk after chunk of the hidden ones. Triton shifts no
tensor against another, so the expansion of a pixel is computed anew for each tap that needs it: k * k / stride**2 times
its arithmetic, on matrix units, for a hidden tensor that is neither written nor read. That pays where channels are few
and planes are large; without an expansion nothing is computed twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import inverted_residual as reference

OPERATORS = ("inverted_residual",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = (3, 5)
STRIDES = (1, 2)
MAX_CHANNELS = 64
"""In and out; more would spill, and the expansion's repeated arithmetic outgrow the traffic it saves."""
MAX_HIDDEN = 2**16
# Inside an image the kernel counts in int32.
MAX_IMAGE = 2**30


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def inverted_residual_kernel(
    x: tl.tensor,
    expand: tl.tensor,
    expand_shift: tl.tensor,
    depthwise: tl.tensor,
    depthwise_shift: tl.tensor,
    project: tl.tensor,
    project_shift: tl.tensor,
    out: tl.tensor,
    channels_in: tl.tensor,
    hidden: tl.tensor,
    channels: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_height: tl.tensor,
    out_width: tl.tensor,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    EXPAND: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """A tile of output pixels of one image; BLOCK_I and BLOCK_O hold all channels in and out."""
    plane, out_plane = height * width, out_height * out_width
    blocks = tl.cdiv(out_plane, BLOCK_P)
    program = tl.program_id(0)
    pixel = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    # A batch may hold more than 2**31 numbers.
    image = (program // blocks).to(tl.int64)
    has_pixel = pixel < out_plane
    row = pixel // out_width * STRIDE - KERNEL // 2
    column = pixel % out_width * STRIDE - KERNEL // 2
    source = x + image * channels_in * plane
    entry, target = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    has_entry, has_target = entry < channels_in, target < channels
    total = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for start in tl.range(0, hidden, BLOCK_H, num_stages=1):
        channel = start + tl.arange(0, BLOCK_H)
        has_channel = channel < hidden
        if EXPAND:
            place = expand + channel[None, :] * channels_in + entry[:, None]
            weight = tl.load(place, has_entry[:, None] & has_channel[None, :], other=0.0)
            shift = tl.load(expand_shift + channel, has_channel, other=0.0)[None, :]
        middle = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
        # One loop that stays one: unrolled, the loads of all taps are held in registers at once.
        for tap in tl.range(KERNEL * KERNEL, num_stages=1):
            down, right = row + tap // KERNEL, column + tap % KERNEL
            inside = (down >= 0) & (down < height) & (right >= 0) & (right < width) & has_pixel
            spot = (down * width + right)[:, None]
            factor = tl.load(depthwise + channel * (KERNEL * KERNEL) + tap, has_channel, other=0.0).to(tl.float32)
            if EXPAND:
                mask = inside[:, None] & has_entry[None, :]
                value = tl.load(source + entry[None, :] * plane + spot, mask, other=0.0)
                wide = tl.dot(value, weight, input_precision="tf32x3") + shift
                # Not tl.maximum, which would turn NaN into zero; and padding is of zeros, not of shifts.
                wide = tl.where((wide < 0.0) | (inside[:, None] == 0), 0.0, wide)
            else:
                mask = inside[:, None] & has_channel[None, :]
                wide = tl.load(source + channel[None, :] * plane + spot, mask, other=0.0).to(tl.float32)
            middle += wide * factor[None, :]
        middle += tl.load(depthwise_shift + channel, has_channel, other=0.0)[None, :]
        middle = tl.where(middle < 0.0, 0.0, middle)
        place = project + target[None, :] * hidden + channel[:, None]
        back = tl.load(place, has_channel[:, None] & has_target[None, :], other=0.0)
        total = tl.dot(middle.to(x.dtype.element_ty), back, total, input_precision="tf32x3")

    total += tl.load(project_shift + target, has_target, other=0.0)[None, :]
    mask = has_pixel[:, None] & has_target[None, :]
    place = image * channels * out_plane + target[None, :] * out_plane + pixel[:, None]
    if RESIDUAL:
        # Stride 1 and as many channels: x lies as the result does.
        total += tl.load(x + place, mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask)


class Launch(NamedTuple):
    """What a call needs beside its tensors: ``kernel[grid](*tensors, *sizes, **constants)``."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int, int, int, int]
    constants: dict[str, int | bool]


def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    hidden: int,
    channels: int,
    kernel: int,
    stride: int,
    *,
    expand: bool,
    residual: bool,
) -> Launch:
    """The launch for an x of ``shape`` and ``dtype``."""
    count, channels_in, height, width = shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    # Matrix units take no fewer than 16.
    block_i = max(16, int(triton.next_power_of_2(channels_in)))
    block_o = max(16, int(triton.next_power_of_2(channels)))
    kind = {"KERNEL": kernel, "STRIDE": stride, "EXPAND": expand, "RESIDUAL": residual}
    # More numbers a warp would spill.
    many = max(block_i, block_o) > 32
    full = many and dtype.itemsize == 4
    block_p, block_h = 32 if full else 64, 16 if full and expand else 32
    grid = (count * triton.cdiv(out_height * out_width, block_p),)
    blocks = {"BLOCK_P": block_p, "BLOCK_I": block_i, "BLOCK_H": block_h, "BLOCK_O": block_o}
    sizes = (channels_in, hidden, channels, height, width, out_height, out_width)
    return Launch(grid, sizes, {**kind, **blocks, "num_warps": 8 if many else 4, "num_stages": 1})


def run_kernel(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    out: Tensor,
    *,
    stride: int,
    residual: bool,
) -> None:
    """Launches the kernel, which overwrites all of ``out``; the caller has checked the arguments."""
    if x.shape[0] == 0:
        return
    (channels, hidden), kernel = project.shape, depthwise.shape[-1]
    expands = expand is not None
    launch = plan(x.shape, x.dtype, hidden, channels, kernel, stride, expand=expands, residual=residual)
    # What is absent is not read.
    first = (x, depthwise_shift) if expand is None else (expand, expand_shift)
    tensors = (x, *first, depthwise, depthwise_shift, project, project_shift, out)
    inverted_residual_kernel[launch.grid](*tensors, *launch.sizes, **launch.constants)


def check(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    stride: int,
    residual: bool,
) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if x.ndim != 4 or 0 in x.shape[1:] or x.shape[1] > MAX_CHANNELS:
        raise refusal("x.shape", tuple(x.shape), f"(n, c, h, w) with c of 1 to {MAX_CHANNELS} and h, w of at least 1")
    check_dtype("x", x, DTYPES)
    channels_in = x.shape[1]
    if project.ndim != 2 or not 1 <= project.shape[0] <= MAX_CHANNELS or not 1 <= project.shape[1] <= MAX_HIDDEN:
        limits = f"o of 1 to {MAX_CHANNELS} and e of 1 to {MAX_HIDDEN}"
        raise refusal("project.shape", tuple(project.shape), f"(o, e) with {limits}")
    channels, hidden = project.shape
    if max(channels_in, channels) * x.shape[2] * x.shape[3] >= MAX_IMAGE:
        raise refusal("x.shape", tuple(x.shape), f"max(c, o) * h * w below {MAX_IMAGE}")
    weights = {"depthwise": depthwise, "project": project}
    shifts = {"depthwise_shift": depthwise_shift, "project_shift": project_shift}
    if expand is not None and expand_shift is not None:
        check_shape("expand", expand, (hidden, channels_in), f"(e, c) with e = {hidden} of project, c = {channels_in}")
        weights["expand"], shifts["expand_shift"] = expand, expand_shift
    elif expand is not expand_shift:
        raise refusal("expand, expand_shift", "one alone", "both or neither")
    elif hidden != channels_in:
        raise refusal("project.shape", tuple(project.shape), f"(o, c) with c = {channels_in} of x, without expand,")
    served = [(hidden, 1, k, k) for k in KERNELS]
    if tuple(depthwise.shape) not in served:
        raise refusal("depthwise.shape", tuple(depthwise.shape), " or ".join(map(str, served)))
    for name, shift in shifts.items():
        length = channels if name == "project_shift" else hidden
        check_shape(name, shift, (length,), f"({length},)")
        # Folded norms stay float32 beside a float16 x: rounded, they would shift whole channels.
        check_dtype(name, shift, (torch.float32,))
    for name, weight in weights.items():
        check_dtype(name, weight, (x.dtype,))
    if stride not in STRIDES:
        raise refusal("stride", stride, " or ".join(map(str, STRIDES)))
    if residual and (stride != 1 or channels != channels_in):
        given = f"True with stride {stride}, {channels_in} channels in and {channels} out"
        raise refusal("residual", given, "stride 1 with as many out as in")
    check_together(x, weights | shifts)


def _empty_result(x: Tensor, project: Tensor, stride: int) -> Tensor:
    count, _, height, width = x.shape
    return x.new_empty((count, project.shape[0], -(-height // stride), -(-width // stride)))


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::inverted_residual", mutates_args=(), device_types="cuda")
def _operator(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    *,
    stride: int,
    residual: bool,
) -> Tensor:
    operands = (expand, expand_shift, depthwise, depthwise_shift, project, project_shift)
    check(x, *operands, stride, residual)
    out = _empty_result(x, project, stride)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_kernel(x, *operands, out, stride=stride, residual=residual)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    *,
    stride: int,
    residual: bool,
) -> Tensor:
    operands = (expand, expand_shift, depthwise, depthwise_shift, project, project_shift)
    check(x, *operands, stride, residual)
    # The fake promises this layout, whatever a convolution of some torch release prefers.
    return reference.inverted_residual(x, *operands, stride=stride, residual=residual).contiguous()


@_operator.register_fake
def _shape_only(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    *,
    stride: int,
    residual: bool,
) -> Tensor:
    check(x, expand, expand_shift, depthwise, depthwise_shift, project, project_shift, stride, residual)
    return _empty_result(x, project, stride)


def inverted_residual(
    x: Tensor,
    expand: Tensor | None,
    expand_shift: Tensor | None,
    depthwise: Tensor,
    depthwise_shift: Tensor,
    project: Tensor,
    project_shift: Tensor,
    *,
    stride: int,
    residual: bool,
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    On a GPU the hidden tensor is rounded to x's dtype before the last convolution.

    Args:
        x: ``(n, c, h, w)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU; c at most 64.
        expand: ``(e, c)`` of x's dtype, or None where e is c and there is no first convolution.
        depthwise: ``(e, 1, k, k)`` of x's dtype, k 3 or 5.
        project: ``(o, e)`` of x's dtype, o at most 64.
        expand_shift, depthwise_shift, project_shift: ``(e,)``, ``(e,)`` and ``(o,)`` float32; the first None exactly
            where ``expand`` is.
        stride: 1 or 2.
        residual: whether to add x; with stride 1 and o = c alone.

    Returns:
        ``(n, o, ceil(h / stride), ceil(w / stride))`` of x's dtype; sums are float32.

    Raises:
        ValueError: a shape, dtype, stride, layout or device that is not served; names it and what is.
    """
    check_device(x)
    operands = (x, expand, expand_shift, depthwise, depthwise_shift, project, project_shift)
    result: Tensor = _operator(*operands, stride=stride, residual=residual)
    return result


def compile_cases() -> list[CompileCase]:
    """FBNet's and MobileNetV2's blocks, of each kernel and stride, with the most channels that are served, too."""
    full, half, brain = torch.float32, torch.float16, torch.bfloat16
    cases = []
    for shape, hidden, channels, kernel, stride, dtype in (
        ((8, 24, 56, 56), 144, 24, 3, 1, half),
        ((8, 24, 56, 56), 144, 32, 5, 2, brain),
        ((8, 32, 28, 28), 192, 32, 5, 1, half),
        ((8, 16, 112, 112), 96, 24, 3, 2, full),
        ((8, 64, 14, 14), 384, 64, 5, 1, full),
        ((8, 64, 14, 14), 384, 64, 3, 1, half),
        ((8, 64, 14, 14), 64, 64, 5, 1, full),
        ((8, 16, 112, 112), 16, 16, 3, 1, half),
        ((8, 33, 27, 27), 99, 41, 5, 1, full),
        ((8, 33, 27, 27), 99, 41, 5, 2, half),
        ((1, 1, 7, 7), 6, 1, 3, 1, half),
    ):
        expand, residual = hidden != shape[1], stride == 1 and channels == shape[1]
        launch = plan(torch.Size(shape), dtype, hidden, channels, kernel, stride, expand=expand, residual=residual)
        tensors = (dtype, dtype, full, dtype, full, dtype, full, dtype)
        name = f"{shape} e{hidden} o{channels} k{kernel} s{stride} {dtype}"
        arguments = (*tensors, *launch.sizes)
        cases.append(CompileCase(name, inverted_residual_kernel, arguments, launch.constants, matrix=True))
    return cases
