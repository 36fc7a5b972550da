"""Merging and keeping of tokens in Triton kernels, the same bits each time: no atomic sums, no sort, no wait.

Ranks are counted: how many scores come before each one. Places follow of ranks by counting too, and then each token of
the result gathers what it is the mean of. On a CPU the operators are their eager twins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archfront.kernels.ops.compile_case import CompileCase
from archfront.kernels.ops.serving import check_device, check_dtype, check_shape, check_together, refusal
from archfront.kernels.ops.token_matching import DTYPES, check_halves, check_tokens, check_vector, tuning_key
from archfront.kernels.reference import token_reduction as reference
from archfront.kernels.reference.token_reduction import most_merged, split_tokens
from archfront.kernels.tuning import Setting, chosen

OPERATORS = ("token_merge", "token_gather")
# Pairs of scores that a program compares at a time; 32 a thread.
BLOCK_I, BLOCK_J = 128, 32
_COUNTING = {"BLOCK_I": BLOCK_I, "BLOCK_J": BLOCK_J, "num_warps": 4}


@triton.jit  # type: ignore[untyped-decorator]  # triton ships no types
def ordered_bits(
    score: tl.tensor,
) -> tl.tensor:
    """Integers in the order of the float32 scores."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(do_not_specialize=["count", "first", "step", "protected"])  # type: ignore[untyped-decorator]
def rank_kernel(
    score: tl.tensor,
    ranks: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    protected: tl.tensor,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Ranks of a block of scores among all ``count`` of an image, of tokens ``first + step * i``.

    Protected tokens do not count, and have the rank ``count``.
    """
    blocks = tl.cdiv(count, BLOCK_I)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    i = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    own = ordered_bits(tl.load(score + image * count + i, i < count, other=0.0))
    before = tl.zeros((BLOCK_I,), tl.int32)
    for start in range(0, count, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = ordered_bits(tl.load(score + image * count + j, j < count, other=0.0))
        served = (j < count) & (first + j * step >= protected)
        ahead = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (j[None, :] < i[:, None]))
        before += tl.sum((ahead & served[None, :]).to(tl.int32), 1)
    before = tl.where(first + i * step >= protected, before, count)
    tl.store(ranks + image * count + i, before, i < count)


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(
    do_not_specialize=[
        "sources",
        "targets",
        "first_source",
        "step",
        "protected",
        "free_sources",
        "protected_targets",
        "r",
    ]
)  # type: ignore[untyped-decorator]
def plan_kernel(
    ranks: tl.tensor,
    index: tl.tensor,
    origin: tl.tensor,
    begin: tl.tensor,
    number: tl.tensor,
    edges: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    first_source: tl.tensor,
    step: tl.tensor,
    protected: tl.tensor,
    free_sources: tl.tensor,
    protected_targets: tl.tensor,
    r: tl.tensor,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Where a block of sources, or of targets, of one image goes.

    ``origin`` is the token at each place of the result. The tokens merged into it are ``number`` of ``edges`` from
    ``begin`` on: edges are by target, then by source.
    """
    source_blocks = tl.cdiv(sources, BLOCK_I)
    blocks = source_blocks + tl.cdiv(targets, BLOCK_I)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    block = program % blocks
    ranks += image * sources
    index += image * sources
    rest = sources + targets - r
    origin += image * rest
    begin += image * rest
    number += image * rest
    edges += image * r
    zeros = tl.zeros((BLOCK_I,), tl.int32)
    if block < source_blocks:
        i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        token = first_source + i * step
        own = tl.load(index + i, i < sources, other=0).to(tl.int32)
        merged = tl.load(ranks + i, i < sources, other=sources) < r
        staying = tl.zeros((BLOCK_I,), tl.int32)
        slot = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, sources, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other = tl.load(index + j, j < sources, other=0).to(tl.int32)
            other_merged = tl.load(ranks + j, j < sources, other=sources) < r
            stays = (j < sources) & (other_merged == 0) & (first_source + j * step >= protected)
            earlier = j[None, :] < i[:, None]
            staying += tl.sum((stays[None, :] & earlier).to(tl.int32), 1)
            ahead = (other[None, :] < own[:, None]) | ((other[None, :] == own[:, None]) & earlier)
            slot += tl.sum((other_merged[None, :] & ahead).to(tl.int32), 1)
        place = tl.where(token < protected, token, protected + staying)
        stays = (i < sources) & (merged == 0)
        tl.store(origin + place, token, stays)
        tl.store(begin + place, zeros, stays)
        tl.store(number + place, zeros, stays)
        tl.store(edges + slot, token, (i < sources) & merged)
    else:
        i = (block - source_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        token = step - 1 + i * step
        ahead_count = tl.zeros((BLOCK_I,), tl.int32)
        own_count = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, sources, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other = tl.load(index + j, j < sources, other=0).to(tl.int32)
            other_merged = tl.load(ranks + j, j < sources, other=sources) < r
            ahead_count += tl.sum((other_merged[None, :] & (other[None, :] < i[:, None])).to(tl.int32), 1)
            own_count += tl.sum((other_merged[None, :] & (other[None, :] == i[:, None])).to(tl.int32), 1)
        place = tl.where(token < protected, token, protected + free_sources - r + i - protected_targets)
        tl.store(origin + place, token, i < targets)
        tl.store(begin + place, ahead_count, i < targets)
        tl.store(number + place, own_count, i < targets)


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(do_not_specialize=["count", "protected", "keep"])  # type: ignore[untyped-decorator]
def keep_kernel(
    ranks: tl.tensor,
    index: tl.tensor,
    count: tl.tensor,
    protected: tl.tensor,
    keep: tl.tensor,
    ORDERED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Where those of a block of tokens that are protected or among the first ``keep`` ranks go."""
    blocks = tl.cdiv(count, BLOCK_I)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    ranks += image * count
    index += image * (protected + keep)
    i = program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    own = tl.load(ranks + i, i < count, other=count)
    earlier = own
    if not ORDERED:
        earlier = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, count, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            kept = tl.load(ranks + j, j < count, other=count) < keep
            earlier += tl.sum((kept[None, :] & (j[None, :] < i[:, None])).to(tl.int32), 1)
    place = tl.where(i < protected, i, protected + earlier)
    tl.store(index + place, i.to(tl.int64), (i < count) & ((i < protected) | (own < keep)))


# These numbers align nothing: code of its own for 1 and for multiples of 16 would gain nothing.
@triton.jit(do_not_specialize=["length", "rest", "r"])  # type: ignore[untyped-decorator]
def gather_kernel(
    x: tl.tensor,
    size: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    out_size: tl.tensor,
    origin: tl.tensor,
    begin: tl.tensor,
    number: tl.tensor,
    edges: tl.tensor,
    length: tl.tensor,
    rest: tl.tensor,
    channels: tl.tensor,
    r: tl.tensor,
    MERGING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """A block of tokens of the result x a block of channels; without ``MERGING`` they are copies of their origins."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row_blocks = tl.cdiv(rest, BLOCK_R)
    program = tl.program_id(0)
    channel = program % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = program // channel_blocks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    image = (program // (channel_blocks * row_blocks)).to(tl.int64)
    x += image * length * channels
    exists = row < rest
    inside = exists[:, None] & (channel < channels)[None, :]
    token = tl.load(origin + image * rest + row, exists, other=0).to(tl.int32)
    value = tl.load(x + token[:, None] * channels + channel[None, :], inside, other=0.0)
    if MERGING:
        size += image * length
        weight += image * length
        edges += image * r
        first = tl.load(begin + image * rest + row, exists, other=0)
        count = tl.load(number + image * rest + row, exists, other=0)
        total_size = tl.load(size + token, exists, other=0.0)
        total = tl.load(weight + token, exists, other=0.0)
        mean = value.to(tl.float32) * total[:, None]
        for step in range(tl.max(count, 0)):
            more = step < count
            edge = tl.load(edges + first + step, more, other=0)
            share = tl.load(weight + edge, more, other=0.0)
            total += share
            total_size += tl.load(size + edge, more, other=0.0)
            merged = tl.load(x + edge[:, None] * channels + channel[None, :], inside & more[:, None], other=0.0)
            mean += merged.to(tl.float32) * share[:, None]
        mean = (mean / tl.where(total == 0.0, 1.0, total)[:, None]).to(value.dtype)
        # What nothing is merged into keeps its bits.
        value = tl.where((count > 0)[:, None], mean, value)
        tl.store(out_size + image * rest + row, total_size, exists & (program % channel_blocks == 0))
    tl.store(out + (image * rest + row)[:, None] * channels + channel[None, :], value, inside)


def _scratch(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=x.device)


def run_merge(
    x: Tensor,
    size: Tensor,
    weight: Tensor,
    score: Tensor,
    index: Tensor,
    out: Tensor,
    out_size: Tensor,
    *,
    r: int,
    protected: int,
    split: int,
    setting: Setting,
) -> None:
    """Launches three kernels, which overwrite all of ``out`` and ``out_size``; the caller has checked the arguments."""
    batch, length, channels = x.shape
    if batch == 0:
        return
    sources, targets = split_tokens(length, split)
    count, rest = len(sources), length - r
    ranks, edges = _scratch(x, batch, count), _scratch(x, batch, r)
    origin, begin, number = (_scratch(x, batch, rest) for _ in range(3))
    blocks = triton.cdiv(count, BLOCK_I)
    rank_kernel[(batch * blocks,)](score, ranks, count, sources.start, sources.step, protected, **_COUNTING)
    halves = (count, len(targets), sources.start, sources.step, protected)
    free = sum(token >= protected for token in sources)
    counts = (free, sum(token < protected for token in targets), r)
    planned = (ranks, index, origin, begin, number, edges)
    plan_kernel[(batch * (blocks + triton.cdiv(len(targets), BLOCK_I)),)](*planned, *halves, *counts, **_COUNTING)
    tensors = (x, size, weight, out, out_size, origin, begin, number, edges)
    gather_kernel[_gather_grid(out, setting)](*tensors, length, rest, channels, r, MERGING=True, **setting)


def run_gather(
    x: Tensor, score: Tensor, out: Tensor, index: Tensor, *, keep: int, protected: int, ordered: bool, setting: Setting
) -> None:
    """Launches three kernels, which overwrite all of ``out`` and ``index``; the caller has checked the arguments."""
    batch, length, channels = x.shape
    if batch == 0:
        return
    ranks = _scratch(x, batch, length)
    grid = (batch * triton.cdiv(length, BLOCK_I),)
    rank_kernel[grid](score, ranks, length, 0, 1, protected, **_COUNTING)
    keep_kernel[grid](ranks, index, length, protected, keep, ORDERED=ordered, **_COUNTING)
    # Nothing reads the sizes and edges, in whose places these are.
    tensors = (x, score, score, out, score, index, index, index, index)
    gather_kernel[_gather_grid(out, setting)](*tensors, length, protected + keep, channels, 0, MERGING=False, **setting)


def _gather_grid(out: Tensor, setting: Setting) -> tuple[int]:
    batch, rows, channels = out.shape
    return (batch * triton.cdiv(rows, setting["BLOCK_R"]) * triton.cdiv(channels, setting["BLOCK_C"]),)


def check_merge(
    x: Tensor, size: Tensor, weight: Tensor | None, score: Tensor, index: Tensor, r: int, protected: int, split: int
) -> None:
    """Raises ValueError where the kernels would compute something else than their twin, or nothing."""
    check_tokens("x", x)
    length = x.shape[1]
    check_halves(length, protected, split)
    most = most_merged(length, protected, split)
    if not 1 <= r <= most:
        raise refusal("r", r, f"1 to {most}, of n = {length} with {protected} protected and split {split},")
    vectors = {"size": size} if weight is None else {"size": size, "weight": weight}
    for name, vector in vectors.items():
        check_vector(name, vector, x)
    matches = (x.shape[0], len(split_tokens(length, split)[0]))
    for name, tensor, dtype in (("score", score, torch.float32), ("index", index, torch.int64)):
        check_shape(name, tensor, matches, f"(b, sources) = {matches}")
        check_dtype(name, tensor, (dtype,))
    check_together(x, {**vectors, "score": score, "index": index})


def _empty_merge(x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    rest = x.shape[1] - r
    return x.new_empty((x.shape[0], rest, x.shape[2])), x.new_empty((x.shape[0], rest), dtype=torch.float32)


# The checks are in the implementations, so that compiled and exported graphs keep them.
@torch.library.custom_op("archfront::token_merge", mutates_args=(), device_types="cuda")
def _merge(
    x: Tensor, size: Tensor, weight: Tensor | None, score: Tensor, index: Tensor, *, r: int, protected: int, split: int
) -> tuple[Tensor, Tensor]:
    check_merge(x, size, weight, score, index, r, protected, split)
    out, out_size = _empty_merge(x, r)
    tensors = (x, size, size if weight is None else weight, score, index, out, out_size)
    # Triton launches on the current device, which need not be that of x.
    with torch.cuda.device(x.device):
        run_merge(*tensors, r=r, protected=protected, split=split, setting=_setting("token_merge", x))
    return out, out_size


@_merge.register_kernel("cpu")
def _merge_on_cpu(
    x: Tensor, size: Tensor, weight: Tensor | None, score: Tensor, index: Tensor, *, r: int, protected: int, split: int
) -> tuple[Tensor, Tensor]:
    check_merge(x, size, weight, score, index, r, protected, split)
    return reference.token_merge(x, size, score, index, r, protected=protected, split=split, weight=weight)


@_merge.register_fake
def _merge_shape(
    x: Tensor, size: Tensor, weight: Tensor | None, score: Tensor, index: Tensor, *, r: int, protected: int, split: int
) -> tuple[Tensor, Tensor]:
    check_merge(x, size, weight, score, index, r, protected, split)
    return _empty_merge(x, r)


def token_merge(
    x: Tensor,
    size: Tensor,
    score: Tensor,
    index: Tensor,
    r: int,
    *,
    protected: int = 1,
    split: int = 0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(b, n, c)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        size, weight: ``(b, n)`` float32.
        score, index: of ``token_match``, float32 and int64; an index that names no target is an error unnoticed.
        r: a constant of the graph.
        protected, split: those of ``token_match``.

    Returns:
        x: ``(b, n - r, c)``; means are float32, and rounded once. With r = 0, x itself.
        size: ``(b, n - r)`` float32. With r = 0, size itself.

    Raises:
        ValueError: a shape, dtype, count, layout or device that is not served; names it and what is.
    """
    check_device(x)
    if r == 0:
        return x, size
    result: tuple[Tensor, Tensor] = _merge(x, size, weight, score, index, r=r, protected=protected, split=split)
    return result


def check_gather(x: Tensor, score: Tensor, keep: int, protected: int) -> None:
    """Raises ValueError where the kernels would compute something else than their twin, or nothing."""
    check_tokens("x", x)
    length = x.shape[1]
    check_halves(length, protected, 0)
    if not max(1 - protected, 0) <= keep <= length - protected:
        served = f"{max(1 - protected, 0)} to {length - protected}, of n = {length} with {protected} protected,"
        raise refusal("keep", keep, served)
    check_vector("score", score, x)
    check_together(x, {"score": score})


def _empty_gather(x: Tensor, keep: int, protected: int) -> tuple[Tensor, Tensor]:
    kept = (x.shape[0], protected + keep)
    return x.new_empty((*kept, x.shape[2])), x.new_empty(kept, dtype=torch.int64)


@torch.library.custom_op("archfront::token_gather", mutates_args=(), device_types="cuda")
def _gather(x: Tensor, score: Tensor, *, keep: int, protected: int, ordered: bool) -> tuple[Tensor, Tensor]:
    check_gather(x, score, keep, protected)
    out, index = _empty_gather(x, keep, protected)
    setting = _setting("token_gather", x)
    with torch.cuda.device(x.device):
        run_gather(x, score, out, index, keep=keep, protected=protected, ordered=ordered, setting=setting)
    return out, index


@_gather.register_kernel("cpu")
def _gather_on_cpu(x: Tensor, score: Tensor, *, keep: int, protected: int, ordered: bool) -> tuple[Tensor, Tensor]:
    check_gather(x, score, keep, protected)
    return reference.token_gather(x, score, keep, protected=protected, ordered=ordered)


@_gather.register_fake
def _gather_shape(x: Tensor, score: Tensor, *, keep: int, protected: int, ordered: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    check_gather(x, score, keep, protected)
    return _empty_gather(x, keep, protected)


def token_gather(
    x: Tensor, score: Tensor, keep: int, *, protected: int = 1, ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """As the reference of this name, for inference: no gradient is defined.

    Args:
        x: ``(b, n, c)``, float32, float16 or bfloat16, contiguous, on a GPU or a CPU.
        score: ``(b, n)`` float32.
        keep: a constant of the graph.
        protected, ordered: see the reference.

    Returns:
        x: ``(b, protected + keep, c)``.
        index: ``(b, protected + keep)`` int64.

    Raises:
        ValueError: a shape, dtype, count, layout or device that is not served; names it and what is.
    """
    check_device(x)
    result: tuple[Tensor, Tensor] = _gather(x, score, keep=keep, protected=protected, ordered=ordered)
    return result


def default_setting() -> Setting:
    """Where no table has a better one."""
    return {"BLOCK_R": 16, "BLOCK_C": 128, "num_warps": 4}


def candidates() -> list[Setting]:
    """Settings worth measuring; all compile without spills for GPUs from sm_80 on."""
    tiles = [(4, 256, 4), (8, 128, 4), (8, 256, 4), (16, 64, 4), (16, 128, 4), (16, 256, 8), (32, 64, 4), (32, 128, 8)]
    return [{"BLOCK_R": rows, "BLOCK_C": channels, "num_warps": warps} for rows, channels, warps in tiles]


def _setting(operator: str, x: Tensor) -> Setting:
    return chosen(operator, tuning_key(x.shape[1], x.shape[2], x.dtype), default_setting(), x.device)


def compile_cases() -> list[CompileCase]:
    """Counting at each length, gathering at each width under every candidate."""
    short, wide = torch.int32, torch.int64
    cases = []
    for length in (197, 577, 4096):
        sources, targets = (len(numbers) for numbers in split_tokens(length, 0))
        ranked = (torch.float32, short, sources, 0, 2, 1)
        cases.append(CompileCase(f"ranks n{length}", rank_kernel, ranked, _COUNTING))
        halves = (sources, targets, 0, 2, 1, sources - 1, 0, 16)
        planned = (short, wide, short, short, short, short, *halves)
        cases.append(CompileCase(f"places n{length}", plan_kernel, planned, _COUNTING))
        for ordered in (False, True):
            kept = (short, wide, length, 1, length // 2)
            constants = {"ORDERED": ordered, **_COUNTING}
            cases.append(CompileCase(f"kept n{length} ordered {ordered}", keep_kernel, kept, constants))
    tried = [(width, merging, default_setting()) for width in (64, 128, 384) for merging in (False, True)]
    tried += [(384, merging, setting) for merging in (False, True) for setting in candidates()]
    for width, merging, setting in tried:
        for dtype in DTYPES:
            vectors = (dtype, torch.float32, torch.float32, dtype, torch.float32)
            places = (short,) * 4 if merging else (wide,) * 4
            constants = {"MERGING": merging, **setting}
            name = f"gather c{width} {dtype} merging {merging} {tuple(setting.values())}"
            case = CompileCase(name, gather_kernel, (*vectors, *places, 197, 184, width, 13), constants)
            cases.append(case)
    return cases
