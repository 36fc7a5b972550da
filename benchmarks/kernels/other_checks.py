"""What attention, token reduction and depthwise convolutions must compute: every pattern, odd lengths, sizes, NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import normal, short
from correctness import BRAIN, FULL, GATES, HALF, Check, hard, relative, settled
from torch import Tensor

from archfront.kernels.ops.depthwise import depthwise_scale_shift
from archfront.kernels.ops.pattern_attention import pattern_attention
from archfront.kernels.ops.token_matching import token_match
from archfront.kernels.ops.token_merging import token_gather, token_merge
from archfront.kernels.reference import attention_patterns as patterns
from archfront.kernels.reference import depthwise as depthwise_reference
from archfront.kernels.reference import token_reduction as reference
from archfront.kernels.reference.attention_patterns import Band, Dense, MultiDiagonal, Pattern, Skip, VerticalStripe

_ATTENTION_GATES = {**GATES, BRAIN: 1e-2}


def checks(device: torch.device) -> Iterator[Check]:
    """Small sizes on a CPU, where the twins are slow and known to be right."""
    small = device.type == "cpu"
    dtypes = (BRAIN, HALF, FULL)
    for length in (1, 37) if small else (1, 197, 577, 1024):
        for width in (32, 64, 128):
            for dtype in dtypes:
                # Sizes, as merged tokens have, with every other.
                yield _attention(length, width, dtype, width != 64, device)
    for shape, width, gone, split in [((2, 37, 24), 16, 5, 0), ((1, 12, 9), 8, 2, 5)]:
        yield from _tokens(shape, width, gone, split, dtypes, device)
    if not small:
        for shape, width, gone, split in [((64, 197, 384), 64, 13, 0), ((3, 577, 391), 64, 40, 300)]:
            yield from _tokens(shape, width, gone, split, dtypes, device)
    planes = [(2, 3, 7, 9), (1, 17, 1, 2)] if small else [(8, 144, 56, 56), (2, 37, 13, 29), (1, 17, 1, 2)]
    for dtype in (HALF, FULL):
        for plane in planes:
            for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
                yield _depthwise(plane, kernel, stride, dtype, device)


def _attention(length: int, width: int, dtype: torch.dtype, sized: bool, device: torch.device) -> Check:
    heads: list[Pattern] = [
        Dense(),
        Band(length // 8),
        MultiDiagonal(14, 1),
        MultiDiagonal(max(1, length // 3), 2, 1),
        VerticalStripe(tuple(range(0, length, 3))),
        Skip(),
        Band(0),
    ]

    def run() -> float:
        shape = (2, len(heads), length, width)
        q, k, v = (normal(shape, 20 + place, device, dtype) for place in range(3))
        size = 1 + normal((2, length), 23, device, FULL).abs().floor() if sized else None
        found = settled(lambda: pattern_attention(q, k, v, heads, size))
        exact = patterns.pattern_attention(q.double(), k.double(), v.double(), heads, size)
        return relative(found, exact)

    what = f"all patterns, length {length}, width {width}, {short(dtype)}{', sizes' * sized}"
    return Check("pattern_attention", what, _ATTENTION_GATES[dtype], run)


def _tokens(
    shape: tuple[int, int, int],
    width: int,
    gone: int,
    split: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Iterator[Check]:
    batch, length, _ = shape
    halves: dict[str, Any] = {"protected": 1, "split": split}

    def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, metric = (normal((batch, length, c), 30 + place, device, dtype) for place, c in enumerate((shape[2], width)))
        for part in (x, metric):
            part[..., ::17] *= 50
            part[:, 4::5] = 0
        vectors = [normal((batch, length), 34 + place, device, FULL) for place in range(2)]
        return x, metric, 1 + vectors[0].abs().floor(), vectors[1]

    def match(dtype: torch.dtype) -> float:
        _, metric, *_ = tokens(dtype)
        score, index = settled(lambda: token_match(metric, **halves))
        exact, _ = reference.token_match(metric.double(), **halves)
        sources, targets = reference.split_tokens(length, split)
        wide = metric.double() / metric.double().norm(dim=2, keepdim=True).clamp_min(1e-30)
        numbers = [torch.tensor(list(part), device=device) for part in (sources, targets)]
        pairs = (wide[:, numbers[0]] * wide[:, numbers[1]].gather(1, index[:, :, None].expand(-1, -1, width))).sum(2)
        served = exact > -torch.inf
        if not torch.equal(served, score > -torch.inf):
            return float("inf")
        # Of almost equal scores either one's index will do: the pair must be as good as the best.
        return max(relative(score[served], exact[served]), relative(pairs[served], exact[served]))

    def merge(dtype: torch.dtype) -> float:
        x, metric, size, _ = tokens(dtype)
        score, index = reference.token_match(metric, **halves)
        found, sizes = settled(lambda: token_merge(x, size, score, index, gone, **halves))
        exact, exact_sizes = reference.token_merge(x.double(), size, score, index, gone, **halves)
        return relative(found, exact) if torch.equal(sizes, exact_sizes) else float("inf")

    def gather(dtype: torch.dtype) -> float:
        x, _, _, score = tokens(dtype)
        score = score.round(decimals=1)
        worst = 0.0
        for ordered in (False, True):
            how: dict[str, Any] = {"protected": 1, "ordered": ordered}
            found, index = settled(lambda how=how: token_gather(x, score, length - gone - 1, **how))  # type: ignore[misc]
            exact, exact_index = reference.token_gather(x, score, length - gone - 1, **how)
            worst = max(worst, 0.0 if torch.equal(found, exact) and torch.equal(index, exact_index) else 1.0)
        return worst

    for dtype in dtypes:
        what = f"{' x '.join(map(str, shape))} split {split} {short(dtype)}"
        yield Check("token_match", what, GATES[FULL], lambda dtype=dtype: match(dtype))  # type: ignore[misc]
        yield Check("token_merge", what, GATES[dtype], lambda dtype=dtype: merge(dtype))  # type: ignore[misc]
        yield Check("token_gather", f"{what}, equal scores", 0.0, lambda dtype=dtype: gather(dtype))  # type: ignore[misc]


def _depthwise(
    plane: tuple[int, int, int, int], kernel: int, stride: int, dtype: torch.dtype, device: torch.device
) -> Check:
    def run() -> float:
        x = hard(normal(plane, 40, device, dtype))
        weight = normal((plane[1], 1, kernel, kernel), 41, device, dtype, 1 / kernel)
        scale, shift = (normal((plane[1],), seed, device, FULL) for seed in (42, 43))
        found = settled(lambda: depthwise_scale_shift(x, weight, scale, shift, stride=stride, relu=True))
        wide = (part.double() for part in (x, weight, scale, shift))
        return relative(found, depthwise_reference.depthwise_scale_shift(*wide, stride=stride, relu=True))

    what = f"{' x '.join(map(str, plane))} k{kernel} s{stride} {short(dtype)}"
    return Check("depthwise_scale_shift", what, GATES[dtype], run)
