"""Attention by a pattern per head in one Triton kernel over lists of blocks: online softmax, sums in float32.

A launch serves the heads of one pattern; each of its programs has one block of queries of one head, and visits the
blocks of keys that are listed for it. On a CPU the operator computes what the lists say in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.pattern_plan import DTYPES, Plan, candidates, default_setting, kept_plan
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, refusal
from archfront.kernels.reference import attention_patterns as reference
from archfront.kernels.reference.attention_patterns import (
    BAND,
    DENSE,
    DIAGONALS,
    STRIPES,
    BlockLists,
    Pattern,
)
from archfront.kernels.tuning import Setting

OPERATORS = ("pattern_attention",)
WIDTHS = (32, 64, 128)
# Within a head the kernel counts in int32, and tokens in float32 too.
MAX_HEAD = 2**31
MAX_LENGTH = 2**21
# Registers of a thread: all. Unbounded, ptxas aims at more programs at a time and spills a few bytes for it;
# for float32, whose products are no matrix instructions, it is the bound that makes it spill.
REGISTERS = {torch.float32: None, torch.float16: 255, torch.bfloat16: 255}
_LOG2_E = log2(2.718281828459045)


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def remainder(
    token: tl.tensor,
    stride: tl.tensor,
) -> tl.tensor:
    """``token % stride`` by way of float32, whose quotients of tokens below 2**21 are off by one at most.

    Division of integers took so many registers that code for sm_100 spilled.
    """
    rest = token - (token.to(tl.float32) / stride).to(tl.int32) * stride
    return tl.where(rest < 0, rest + stride, tl.where(rest >= stride, rest - stride, rest))


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def ahead(
    step: tl.tensor,
    end: tl.tensor,
    indices: tl.tensor,
    order: tl.tensor,
    size: tl.tensor,
    length: tl.tensor,
    ORDERED: tl.constexpr,
    SIZED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where the block that a list has at ``step`` starts, its tokens (where there is no order, nothing) and biases.

    Block 0 beyond the list's end. Taken an iteration ahead: addresses that came of two loads in the same one would
    keep keys and values from being copied ahead, which their places in the shared memory of compiled code showed.
    """
    start = tl.load(indices + step, step < end, other=0) * BLOCK_N
    place = start + tl.arange(0, BLOCK_N)
    ordered = 0
    bias = 0.0
    if ORDERED:
        ordered = tl.load(order + place, place < length, other=0)
    if SIZED:
        token = place
        if ORDERED:
            token = ordered
        bias = tl.log2(tl.load(size + token, place < length, other=1.0))
    return start, ordered, bias


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(do_not_specialize=["head_count", "first_head", "first_list", "first_order", "stride", "width", "limit"])  # type: ignore[untyped-decorator]
def attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    size: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    indices: tl.tensor,
    starts: tl.tensor,
    partial: tl.tensor,
    order: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_row: tl.tensor,
    length: tl.tensor,
    head_count: tl.tensor,
    first_head: tl.tensor,
    first_list: tl.tensor,
    first_order: tl.tensor,
    scale: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
    ORDERED: tl.constexpr,
    SIZED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One block of queries of one head of one pattern; ``scale`` is of base 2, and the last stride of tensors is 1.

    ``first_head``, ``first_list`` and ``first_order`` are the group's place in ``heads``, its number, and its order's.
    """
    blocks = tl.cdiv(length, BLOCK_M)
    program = tl.program_id(0)
    block = program % blocks
    member = program // blocks
    batch = (member // head_count).to(tl.int64)
    head = tl.load(heads + first_head + member % head_count).to(tl.int64)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    out += batch * out_batch + head * out_head
    size += batch * length
    order += first_order * length

    channel = tl.arange(0, D)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = place < length
    token = place
    if ORDERED:
        token = tl.load(order + place, exists, other=0)
    query = tl.load(q + token[:, None] * q_row + channel[None, :], exists[:, None], other=0.0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    result = tl.zeros((BLOCK_M, D), tl.float32)

    begin = tl.load(starts + first_list * (blocks + 1) + block)
    end = tl.load(starts + first_list * (blocks + 1) + block + 1)
    middle = begin + tl.load(partial + first_list * blocks + block)
    start, ordered, bias = ahead(begin, end, indices, order, size, length, ORDERED, SIZED, BLOCK_N)
    for step in tl.range(begin, end):
        key_place = start + tl.arange(0, BLOCK_N)
        key_exists = key_place < length
        key_token = key_place
        if ORDERED:
            key_token = ordered
        key = tl.load(k + key_token[None, :] * k_row + channel[:, None], key_exists[None, :], other=0.0)
        logits = tl.dot(query, key, input_precision="ieee") * scale
        if SIZED:
            logits += bias[None, :]
        if step < middle:
            allowed = key_exists[None, :]
            if KIND == 3:
                allowed = (key_place < limit)[None, :]
            if KIND == 1 or KIND == 2:
                allowed = allowed & (tl.abs(token[:, None] - key_token[None, :]) <= limit)
            if KIND == 2:
                across = tl.abs(remainder(token, stride)[:, None] - remainder(key_token, stride)[None, :])
                allowed = allowed & (tl.minimum(across, stride - across) <= width)
            logits = tl.where(allowed, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet: minus infinity less itself would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(v + key_token[:, None] * v_row + channel[None, :], key_exists[:, None], other=0.0)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        top = higher
        start, ordered, bias = ahead(step + 1, end, indices, order, size, length, ORDERED, SIZED, BLOCK_N)
    # Zero where no key was seen; NaN of a broken model stays.
    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + token[:, None] * out_row + channel[None, :], result.to(out.dtype.element_ty), exists[:, None])


class Group(NamedTuple):
    """Six numbers of ``BlockLists.groups``."""

    heads: int
    kind: int
    stride: int
    width: int
    limit: int
    order: int


def run_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    out: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    warps: int,
    stages: int,
) -> None:
    """A launch for each group of heads, which overwrite all of ``out``; the caller has checked the arguments."""
    batch, count, length, depth = q.shape
    if batch == 0:
        return
    groups = [Group(*lists.groups[at : at + 6]) for at in range(0, len(lists.groups), 6)]
    served = sum(group.heads for group in groups)
    if served < count:
        out.index_fill_(1, lists.heads[served:].long(), 0)
    strides = (number for tensor in (q, k, v, out) for number in tensor.stride()[:3])
    tensors = (q, k, v, q if size is None else size, out, *lists[:5])
    common = (*tensors, *strides, length)
    first = 0
    for number, group in enumerate(groups):
        grid = (batch * group.heads * triton.cdiv(length, lists.block_m),)
        places = (group.heads, first, number, max(group.order, 0))
        attention_kernel[grid](
            *common,
            *places,
            scale * _LOG2_E,
            group.stride,
            group.width,
            group.limit,
            KIND=group.kind,
            ORDERED=group.order >= 0,
            SIZED=size is not None,
            D=depth,
            BLOCK_M=lists.block_m,
            BLOCK_N=lists.block_n,
            num_warps=warps,
            num_stages=stages,
            maxnreg=REGISTERS[q.dtype],
        )
        first += group.heads


def check(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise refusal("q.shape", tuple(q.shape), "(b, h, l, d) with h, l and d of at least 1")
    if q.shape[3] not in WIDTHS:
        raise refusal("q.shape", tuple(q.shape), f"(b, h, l, d) with d {', '.join(map(str, WIDTHS))}")
    if q.shape[2] >= MAX_LENGTH:
        raise refusal("q.shape", tuple(q.shape), f"(b, h, l, d) with l below {MAX_LENGTH}")
    check_dtype("q", q, tuple(DTYPES))
    for name, tensor in {"k": k, "v": v}.items():
        check_shape(name, tensor, q.shape, f"{tuple(q.shape)}, that of q,")
        check_dtype(name, tensor, (q.dtype,))
    if size is not None:
        check_shape("size", size, (q.shape[0], q.shape[2]), f"(b, l) = {(q.shape[0], q.shape[2])} of q")
        check_dtype("size", size, (torch.float32,))
        if not size.is_contiguous():
            raise refusal("size.stride()", size.stride(), "a contiguous tensor, such as .contiguous() returns,")
    for name, other in {"k": k, "v": v, "size": size}.items():
        if other is not None and other.device != q.device:
            raise refusal(f"{name}.device", other.device, f"{q.device}, where q is,")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        # Views of a fused projection are read where they are; a row must be together.
        if tensor.stride(3) != 1 or tensor.stride(2) * tensor.shape[2] >= MAX_HEAD:
            served = f"a last stride of 1, and below {MAX_HEAD} numbers from a head's first row to its last,"
            raise refusal(f"{name}.stride()", tensor.stride(), served)


def check_lists(q: Tensor, lists: BlockLists) -> None:
    """Raises ValueError where lists are of other heads or another length; what they list is not looked at."""
    count, length = q.shape[1], q.shape[2]
    groups, blocks = len(lists.groups) // 6, -(-length // lists.block_m)
    check_shape("heads", lists.heads, (count,), f"(h,) with h = {count} of q")
    check_shape("starts", lists.starts, (groups * (blocks + 1),), f"{groups} groups of {blocks} blocks and an end")
    check_shape("partial", lists.partial, (groups * blocks,), f"{groups} groups of {blocks} blocks")
    orders = max(lists.groups[5::6], default=-1) + 1
    check_shape("order", lists.order, (orders * length,), f"{orders} orders of {length} tokens")
    if len(lists.groups) % 6 or sum(lists.groups[::6]) > count:
        raise refusal("groups", lists.groups, f"six numbers for each group of the {count} heads")
    for name, tensor in zip(lists._fields[:5], lists[:5], strict=True):
        check_dtype(name, tensor, (torch.int32,))
        if tensor.device != q.device:
            raise refusal(f"{name}.device", tensor.device, f"{q.device}, where q is,")


def _empty_result(q: Tensor) -> Tensor:
    # Heads of a token side by side, as the projection that follows reads them.
    batch, heads, length, width = q.shape
    return q.new_empty((batch, length, heads, width)).transpose(1, 2)


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::pattern_attention", mutates_args=(), device_types="cuda")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    heads: Tensor,
    indices: Tensor,
    starts: Tensor,
    partial: Tensor,
    order: Tensor,
    groups: list[int],
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    scale: float,
) -> Tensor:
    lists = BlockLists(heads, indices, starts, partial, order, tuple(groups), block_m, block_n)
    check(q, k, v, size)
    check_lists(q, lists)
    out = _empty_result(q)
    # Triton launches on the current device, which need not be that of q.
    with torch.cuda.device(q.device):
        run_kernel(q, k, v, size, out, lists, scale=scale, warps=warps, stages=stages)
    return out


@_operator.register_kernel("cpu")
def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    heads: Tensor,
    indices: Tensor,
    starts: Tensor,
    partial: Tensor,
    order: Tensor,
    groups: list[int],
    block_m: int,
    block_n: int,
    warps: int,  # noqa: ARG001
    stages: int,  # noqa: ARG001
    scale: float,
) -> Tensor:
    lists = BlockLists(heads, indices, starts, partial, order, tuple(groups), block_m, block_n)
    check(q, k, v, size)
    check_lists(q, lists)
    out = _empty_result(q).zero_()
    for members, mask in reference.listed_masks(lists, q.shape[2]):
        rows = q[:, members], k[:, members], v[:, members]
        out[:, members] = reference.masked_attention(*rows, mask, size, scale).to(q.dtype)
    return out


@_operator.register_fake
def _shape_only(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    heads: Tensor,
    indices: Tensor,
    starts: Tensor,
    partial: Tensor,
    order: Tensor,
    groups: list[int],
    block_m: int,
    block_n: int,
    warps: int,  # noqa: ARG001
    stages: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> Tensor:
    check(q, k, v, size)
    check_lists(q, BlockLists(heads, indices, starts, partial, order, tuple(groups), block_m, block_n))
    return _empty_result(q)


@torch.compiler.disable(reason="modules.PatternAttention has its lists before it is compiled")  # type: ignore[no-untyped-call, untyped-decorator]
def _looked_up(patterns: Sequence[Pattern], q: Tensor) -> Plan:
    return kept_plan(tuple(patterns), q.shape[2], q.shape[3], q.dtype, q.device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """As ``pattern_attention``, with a plan made before: what a graph that is compiled or exported calls."""
    check_device(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lists = plan.lists
    tensors = (q, k, v, size, *lists[:5])
    result: Tensor = _operator(
        *tensors, list(lists.groups), lists.block_m, lists.block_n, plan.warps, plan.stages, scale
    )
    return result


def pattern_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    patterns: Sequence[Pattern],
    size: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As the reference of this name, for inference: no gradient is defined.

    The first call of a combination of patterns, length, width, dtype and device builds lists and keeps them. It
    breaks a graph that is compiled: ``archfront.kernels.modules.pattern_attention`` does not.

    Args:
        q, k, v: ``(b, h, l, d)``, float32, float16 or bfloat16, d 32, 64 or 128, on a GPU or a CPU; views of a fused
            projection too, since only the last axis must be contiguous.
        patterns: h of them.
        size: ``(b, l)`` float32, of how many tokens each key is the mean.
        scale: of the logits; ``d ** -0.5`` where not given.

    Returns:
        ``(b, h, l, d)`` of q's dtype, in memory ``(b, l, h, d)``; sums are float32, weights of values q's dtype.

    Raises:
        ValueError: a shape, dtype, layout or device that is not served, names it and what is; a pattern of tokens
            beyond the length.
    """
    check(q, k, v, size)
    if len(patterns) != q.shape[1]:
        raise refusal("len(patterns)", len(patterns), f"h = {q.shape[1]} of q")
    return attend(q, k, v, _looked_up(patterns, q), size, scale)


def compile_cases() -> list[CompileCase]:
    """ViT's and video's lengths: every kind of mask under the defaults, and the costliest under every candidate."""
    cases = []

    def case(length: int, width: int, dtype: torch.dtype, kind: int, ordered: bool, setting: Setting) -> None:
        integers = (torch.int32,) * 5
        heads = 12
        # Views of a fused projection; the result has a token's heads side by side.
        strides = (length * 3 * heads * width, width, 3 * heads * width) * 3 + (
            length * heads * width,
            width,
            heads * width,
        )
        rule = (14, 1, length) if kind == DIAGONALS else (1, 0, length // 8)
        arguments = (
            dtype,
            dtype,
            dtype,
            torch.float32,
            dtype,
            *integers,
            *strides,
            length,
            heads,
            0,
            0,
            0,
            0.125,
            *rule,
        )
        # Sizes of merged tokens cost registers; without them the kernel is a part of itself.
        constants = {
            "KIND": kind,
            "ORDERED": ordered,
            "SIZED": kind != DENSE,
            "D": width,
            "maxnreg": REGISTERS[dtype],
            **setting,
        }
        name = f"l{length} d{width} {dtype} kind {kind} ordered {ordered} {tuple(setting.values())}"
        cases.append(CompileCase(name, attention_kernel, arguments, constants, matrix=dtype != torch.float32))

    kinds = [(DENSE, False), (BAND, False), (DIAGONALS, True), (DIAGONALS, False), (STRIPES, True)]
    for length in (197, 577, 4096):
        for width in WIDTHS:
            for number, (kind, ordered) in enumerate(kinds):
                dtype = (torch.float16, torch.bfloat16)[(number + length) % 2]
                diagonals = kind == DIAGONALS
                case(length, width, dtype, kind, ordered, default_setting(width, length, dtype, diagonals))
    for width in WIDTHS:
        for diagonals, kind in ((True, DIAGONALS), (False, STRIPES)):
            for number, setting in enumerate(candidates(width, torch.float16, diagonals)):
                case(197, width, (torch.float16, torch.bfloat16)[number % 2], kind, True, setting)
        for kind, ordered in ((DENSE, False), (DIAGONALS, True), (STRIPES, True)):
            case(197, width, torch.float32, kind, ordered, default_setting(width, 197, torch.float32, True))
    return cases
