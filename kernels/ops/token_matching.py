"""Matching of tokens in one Triton kernel: cosines, weights and the running best, with no matrix of scores in memory.

Each program has a block of sources of one image and goes through all targets. On a CPU the operator is its eager twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.reference import token_reduction as reference
from archfront.kernels.reference.token_reduction import split_tokens
from archfront.kernels.tuning import Setting, bucket, chosen

OPERATORS = ("token_match",)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Within an image the kernels count in int32.
MAX_IMAGE = 2**31
# Registers of a thread: all. Unbounded, ptxas aims at more programs at a time and spills a few bytes for it.
REGISTERS = 255


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(do_not_specialize=["length", "sources", "targets", "first_source", "step", "protected"])  # type: ignore[untyped-decorator]
def match_kernel(
    metric: tl.tensor,
    factors: tl.tensor,
    score: tl.tensor,
    index: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    first_source: tl.tensor,
    step: tl.tensor,
    protected: tl.tensor,
    power: tl.tensor,
    FACTORED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One block of sources of one image; pointers are to contiguous tensors.

    Source i is the token ``first_source + step * i``; target i is ``step * i``, and one further where ``step`` is 2.
    """
    blocks = tl.cdiv(sources, BLOCK_S)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    metric += image * length * channels
    factors += image * length
    row = program % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    has_row = row < sources
    source = first_source + row * step
    best = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK_S,), tl.int32)
    for start in range(0, targets, BLOCK_T):
        column = start + tl.arange(0, BLOCK_T)
        has_column = column < targets
        target = step - 1 + column * step
        product = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        source_square = tl.zeros((BLOCK_S,), tl.float32)
        target_square = tl.zeros((BLOCK_T,), tl.float32)
        for first_channel in range(0, channels, BLOCK_C):
            channel = first_channel + tl.arange(0, BLOCK_C)
            has_channel = channel < channels
            one = tl.load(
                metric + source[:, None] * channels + channel[None, :],
                has_row[:, None] & has_channel[None, :],
                other=0.0,
            )
            other = tl.load(
                metric + target[None, :] * channels + channel[:, None],
                has_column[None, :] & has_channel[:, None],
                other=0.0,
            )
            product = tl.dot(one, other, product, input_precision="ieee")
            source_square += tl.sum(one.to(tl.float32) * one.to(tl.float32), 1)
            target_square += tl.sum(other.to(tl.float32) * other.to(tl.float32), 0)
        # The smallest normal float32: a vector of zeros has a cosine of 0 with all.
        product *= tl.rsqrt(tl.maximum(source_square, 1.1754943508222875e-38))[:, None]
        product *= tl.rsqrt(tl.maximum(target_square, 1.1754943508222875e-38))[None, :]
        if FACTORED:
            # Rounding may leave a cosine below -1.
            closeness = tl.maximum((product + 1.0) * 0.5, 0.0)
            product = tl.exp2(power * tl.log2(closeness))
            product *= tl.load(factors + source, has_row, other=0.0)[:, None]
            product *= tl.load(factors + target, has_column, other=0.0)[None, :]
        allowed = (source >= protected)[:, None] & (has_column & (target >= protected))[None, :]
        # NaN is not equal to itself, and goes with none.
        product = tl.where(allowed & (product == product), product, float("-inf"))
        block_best, block_index = tl.max(product, 1, return_indices=True, return_indices_tie_break_left=True)
        # Not where equal: lower numbers came before.
        better = block_best > best
        best_index = tl.where(better, block_index + start, best_index)
        best = tl.where(better, block_best, best)
    place = image * sources + row
    tl.store(score + place, best, has_row)
    tl.store(index + place, best_index.to(tl.int64), has_row)


def run_kernel(
    metric: Tensor,
    factors: Tensor | None,
    score: Tensor,
    index: Tensor,
    *,
    protected: int,
    split: int,
    temperature: float,
    setting: Setting,
) -> None:
    """Launches the kernel, which overwrites all of ``score`` and ``index``; the caller has checked the arguments."""
    batch, length, channels = metric.shape
    if batch == 0:
        return
    sources, targets = split_tokens(length, split)
    grid = (batch * triton.cdiv(len(sources), setting["BLOCK_S"]),)
    sizes = (length, channels, len(sources), len(targets), sources.start, sources.step, protected)
    vectors = (metric if factors is None else factors, score, index)
    match_kernel[grid](
        metric, *vectors, *sizes, 1 / temperature, FACTORED=factors is not None, maxnreg=REGISTERS, **setting
    )


def check_halves(length: int, protected: int, split: int) -> None:
    """Raises ValueError where tokens cannot be split so."""
    if not 0 <= protected <= length:
        raise refusal("protected", protected, f"0 to n = {length}")
    if not 0 <= split < length:
        raise refusal("split", split, f"0 to n - 1 = {length - 1}")


def check_tokens(name: str, tokens: Tensor) -> None:
    """Raises ValueError unless ``(b, n, c)`` of a served dtype and size."""
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise refusal(f"{name}.shape", tuple(tokens.shape), "(b, n, c) with n and c of at least 1")
    if tokens.shape[1] * tokens.shape[2] >= MAX_IMAGE:
        raise refusal(f"{name}.shape", tuple(tokens.shape), f"n * c below {MAX_IMAGE}")
    check_dtype(name, tokens, tuple(DTYPES))


def check_vector(name: str, vector: Tensor, tokens: Tensor) -> None:
    """Raises ValueError unless ``(b, n)`` of the tokens, and float32."""
    check_shape(name, vector, tokens.shape[:2], f"(b, n) = {tuple(tokens.shape[:2])}")
    check_dtype(name, vector, (torch.float32,))


def check(metric: Tensor, factors: Tensor | None, protected: int, split: int, temperature: float) -> None:
    """Raises ValueError where the kernel would compute something else than its twin, or nothing."""
    check_tokens("metric", metric)
    check_halves(metric.shape[1], protected, split)
    if not 0 < temperature < float("inf"):
        raise refusal("temperature", temperature, "a finite number above 0")
    if factors is not None:
        check_vector("factors", factors, metric)
    check_together(metric, {} if factors is None else {"factors": factors})


def _empty_result(metric: Tensor, split: int) -> tuple[Tensor, Tensor]:
    shape = (metric.shape[0], len(split_tokens(metric.shape[1], split)[0]))
    return metric.new_empty(shape, dtype=torch.float32), metric.new_empty(shape, dtype=torch.int64)


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::token_match", mutates_args=(), device_types="cuda")
def _operator(
    metric: Tensor, factors: Tensor | None, *, protected: int, split: int, temperature: float
) -> tuple[Tensor, Tensor]:
    check(metric, factors, protected, split, temperature)
    score, index = _empty_result(metric, split)
    key = tuning_key(metric.shape[1], metric.shape[2], metric.dtype)
    setting = chosen("token_match", key, default_setting(metric.dtype), metric.device)
    how = {"protected": protected, "split": split}
    # Triton launches on the current device, which need not be that of the metric.
    with torch.cuda.device(metric.device):
        run_kernel(metric, factors, score, index, **how, temperature=temperature, setting=setting)
    return score, index


@_operator.register_kernel("cpu")
def _on_cpu(
    metric: Tensor, factors: Tensor | None, *, protected: int, split: int, temperature: float
) -> tuple[Tensor, Tensor]:
    check(metric, factors, protected, split, temperature)
    return reference.token_match(metric, factors, protected=protected, split=split, temperature=temperature)


@_operator.register_fake
def _shape_only(
    metric: Tensor, factors: Tensor | None, *, protected: int, split: int, temperature: float
) -> tuple[Tensor, Tensor]:
    check(metric, factors, protected, split, temperature)
    return _empty_result(metric, split)


def token_match(
    metric: Tensor, factors: Tensor | None = None, *, protected: int = 1, split: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        metric: ``(b, n, c)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        factors: ``(b, n)`` float32.
        protected, split, temperature: see the reference.

    Returns:
        score: ``(b, sources)`` float32.
        index: ``(b, sources)`` int64, numbers among the targets.

    Raises:
        ValueError: a shape, dtype, count, layout or device that is not served; names it and what is.
    """
    check_device(metric)
    result: tuple[Tensor, Tensor] = _operator(
        metric, factors, protected=protected, split=split, temperature=temperature
    )
    return result


def default_setting(dtype: torch.dtype) -> Setting:
    """Where no table has a better one."""
    if dtype == torch.float32:
        # Exact float32 products have no matrix instructions and hold both operands in registers.
        return {"BLOCK_S": 32, "BLOCK_T": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_S": 64, "BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}


def candidates(dtype: torch.dtype) -> list[Setting]:
    """Settings worth measuring; all compile without spills for GPUs from sm_80 on."""
    if dtype == torch.float32:
        return [default_setting(dtype)]
    tiles = [(32, 64, 64, 4), (64, 32, 64, 4), (64, 64, 64, 4), (64, 64, 32, 4), (128, 64, 64, 8), (128, 32, 64, 8)]
    return [
        {"BLOCK_S": s, "BLOCK_T": t, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}
        for s, t, c, warps in tiles
        for stages in (2, 3)
    ]


def tuning_key(length: int, channels: int, dtype: torch.dtype) -> str:
    return f"{DTYPES[dtype]}-n{bucket(length)}-c{channels}"


def compile_cases() -> list[CompileCase]:
    """Metrics of a head's width and of a whole token's, both ways to split, under every candidate."""
    cases = []
    dtypes = (torch.float16, torch.bfloat16)
    shapes = [(197, 64, 0), (577, 128, 0), (4096, 64, 0), (577, 384, 300)]
    chosen_cases = [
        (shape, dtype, factored, default_setting(dtype))
        for shape in shapes
        for dtype in dtypes
        for factored in (False, True)
    ]
    chosen_cases += [((197, 64, 0), dtypes[i % 2], True, setting) for i, setting in enumerate(candidates(dtypes[0]))]
    chosen_cases += [((577, 384, 0), torch.float32, True, default_setting(torch.float32))]
    for (length, channels, split), dtype, factored, setting in chosen_cases:
        sources, targets = split_tokens(length, split)
        sizes = (length, channels, len(sources), len(targets), sources.start, sources.step, 1, 0.5)
        tensors = (dtype, torch.float32, torch.float32, torch.int64)
        name = f"n{length} c{channels} split {split} {dtype} factors {factored} {tuple(setting.values())}"
        constants = {"FACTORED": factored, "maxnreg": REGISTERS, **setting}
        cases.append(CompileCase(name, match_kernel, (*tensors, *sizes), constants, matrix=dtype != torch.float32))
    return cases
