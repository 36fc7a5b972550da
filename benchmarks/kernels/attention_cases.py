"""Attention by patterns of several densities, beside dense attention of torch's backends and compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from case import Case, Tuning, Variant, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from archfront.kernels.ops import pattern_attention as module
from archfront.kernels.ops import pattern_plan
from archfront.kernels.reference.attention_patterns import (
    Band,
    Dense,
    MultiDiagonal,
    Pattern,
    VerticalStripe,
    block_lists,
    masked_attention,
    pattern_attention_cost,
)

OPERATOR = "pattern_attention"
FLEX, CUDNN = "FlexAttention, compiled", "cuDNN SDPA"
_DTYPE = torch.bfloat16
_SAMPLED = 256
_LARGEST_MASK = 8192
# (b, h, l, d): DeiT-S and ViT at two resolutions, and video's lengths.
_SHORT = [(256, 6, 197, 64), (64, 12, 577, 64), (32, 12, 1024, 64), (32, 8, 1024, 128)]
_LONG = [(4, 16, 4096, 64), (4, 16, 4096, 128), (1, 16, 16384, 64), (1, 16, 16384, 128)]
_TINY = (1, 4, 70, 32)


class Values(NamedTuple):
    """All ``(b, h, l, d)``."""

    q: Tensor
    k: Tensor
    v: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """Long sequences first, from dense to 15 % of it; then short ones."""
    if device.type == "cpu":
        for name, patterns in {**_patterns(_TINY[2], 4, (0.5,), 10), "dense": (Dense(),) * 4}.items():
            yield _case(_TINY, name, patterns, 0, device)
        return
    for shape in _LONG:
        length, heads = shape[2], shape[1]
        yield _case(shape, "dense", (Dense(),) * heads, 0, device)
        for name, patterns in _patterns(length, heads, (0.15, 0.25, 0.5), 256).items():
            goal = length == 4096 and ("0.15" in name or "band" in name)
            yield _case(shape, name, patterns, 0 if goal else 1 if length == 4096 or "0.15" in name else 3, device)
    for shape in _SHORT:
        yield _case(shape, "dense", (Dense(),) * shape[1], 2, device)
        for name, patterns in _patterns(shape[2], shape[1], (0.25,), 14 if shape[2] == 197 else 32).items():
            yield _case(shape, name, patterns, 3, device)


def _patterns(length: int, heads: int, densities: Sequence[float], stride: int) -> dict[str, tuple[Pattern, ...]]:
    """Of every kind at each density, and heads of three kinds at the first."""
    found: dict[str, tuple[Pattern, ...]] = {}
    for density in densities:
        # A band of width w keeps (2 w + 1) / l, less what the ends cut off: (1 - (1 - w / l)^2).
        width = round(length * (1 - (1 - density) ** 0.5))
        random = torch.Generator().manual_seed(length)
        columns = torch.randperm(length, generator=random)[: max(1, round(length * density))].sort().values
        kinds: dict[str, Pattern] = {
            "band": Band(width),
            "diagonals": MultiDiagonal(stride, max(0, round((stride * density - 1) / 2))),
            "stripes": VerticalStripe(tuple(columns.tolist())),
        }
        found |= {f"{name} {density}": (pattern,) * heads for name, pattern in kinds.items()}
        if density == densities[0]:
            counts = (heads - heads // 2, heads // 4, heads // 2 - heads // 4)
            mixed = [p for p, count in zip(kinds.values(), counts, strict=True) for _ in range(count)]
            found[f"mixed {density}"] = tuple(mixed)
    return found


def mask_function(patterns: Sequence[Pattern], length: int, device: torch.device) -> Callable[..., Tensor]:
    """As FlexAttention takes it, written in its arithmetic; heads of one pattern are together, in order."""
    distinct = list(dict.fromkeys(patterns))
    if len(distinct) > 1:
        functions = [mask_function([pattern], length, device) for pattern in distinct]
        lasts = [max(head for head, own in enumerate(patterns) if own == pattern) for pattern in distinct]

        def mixed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            result = functions[-1](b, h, q, kv)
            for function, last in zip(functions[-2::-1], lasts[-2::-1], strict=True):
                result = torch.where(h <= last, function(b, h, q, kv), result)
            return result

        return mixed
    pattern = distinct[0]
    if isinstance(pattern, Band):
        return lambda _b, _h, q, kv: (q - kv).abs() <= pattern.width
    if isinstance(pattern, MultiDiagonal):
        return lambda _b, _h, q, kv: (q - kv + pattern.width) % pattern.stride <= 2 * pattern.width
    if isinstance(pattern, VerticalStripe):
        chosen = torch.zeros(length, dtype=torch.bool, device=device)
        chosen[torch.tensor(pattern.columns, device=device)] = True
        return lambda _b, _h, _q, kv: chosen[kv]
    return lambda _b, _h, q, _kv: q >= 0


def _case(
    shape: tuple[int, int, int, int], name: str, patterns: tuple[Pattern, ...], priority: int, device: torch.device
) -> Case:
    _, heads, length, width = shape
    dense = set(patterns) == {Dense()}

    def values(seed: int) -> Values:
        return Values(*(normal(shape, 3 * seed + place, device) for place in range(3)))

    # Made at the first call, after tuning.
    @cache
    def planned() -> pattern_plan.Plan:
        return pattern_plan.plan(patterns, length, width, _DTYPE, device)

    @cache
    def block_mask() -> Any:
        function = mask_function(patterns, length, device)
        of_heads = heads if len(set(patterns)) > 1 else None
        # Uncompiled, it makes the whole mask first.
        compiled = length > _LARGEST_MASK
        return create_block_mask(function, None, of_heads, length, length, device=device, _compile=compiled)

    rows = torch.arange(0, length, max(1, length // _SAMPLED), device=device)

    def exact(given: Values, seen: Sequence[Pattern] = patterns) -> Tensor:
        results = []
        # Of the first image, a head of each pattern: the other heads have other numbers alone.
        for head in (patterns.index(pattern) for pattern in dict.fromkeys(patterns)):
            q, k, v = (part[:1, head : head + 1].double() for part in given)
            mask = seen[head].allowed(rows[:, None], torch.arange(length, device=device))
            results.append(masked_attention(q[:, :, rows], k, v, mask, None, width**-0.5))
        return torch.cat(results, 1)

    def sampled(result: Tensor) -> Tensor:
        return result[:1, [patterns.index(pattern) for pattern in dict.fromkeys(patterns)]][:, :, rows]

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v)

    cost = pattern_attention_cost(shape, patterns, dtype=_DTYPE)
    whole = pattern_attention_cost(shape, (Dense(),) * heads, dtype=_DTYPE)
    of_all = "" if dense else ", dense"

    def exact_whole(given: Values) -> Tensor:
        return exact(given, (Dense(),) * heads)

    variants = [
        Variant(
            OPERATOR,
            lambda given: (*given, planned()),
            module.attend,
            exact,
            cost,
            "bf16",
            sampled,
            ours=True,
        ),
        Variant(
            FLEX,
            lambda given: (*given, block_mask()),
            lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask),
            exact,
            cost,
            "bf16",
            sampled,
            compiled=True,
        ),
        Variant(CUDNN + of_all, tuple, cudnn, exact_whole, whole, "bf16", sampled),
        Variant(
            f"SDPA default{of_all}",
            tuple,
            functional.scaled_dot_product_attention,
            exact_whole,
            whole,
            "bf16",
            sampled,
        ),
    ]
    density = sum(pattern.pairs(length) for pattern in patterns) / (heads * length**2)
    facts = {"b": shape[0], "h": heads, "length": length, "d": width, "pattern": name, "density": density}
    words = f"{' x '.join(map(str, shape))} {name} ({density:.0%})"
    tunings = [_tuning(patterns, length, width)]
    return Case(OPERATOR, words, _DTYPE, facts, values, variants, CUDNN if dense else FLEX, priority, tunings)


def _tuning(patterns: tuple[Pattern, ...], length: int, width: int) -> Tuning:
    diagonals = any(isinstance(pattern, MultiDiagonal) for pattern in patterns)
    kind = (width, length, _DTYPE, diagonals)

    @cache
    def lists(device: torch.device, block_m: int, block_n: int) -> Any:
        return block_lists(patterns, length, block_m, block_n).to(device)

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, setting: Any) -> None:
        listed = lists(q.device, setting["BLOCK_M"], setting["BLOCK_N"])
        launch = {"warps": setting["num_warps"], "stages": setting["num_stages"]}
        module.run_kernel(q, k, v, None, out, listed, scale=width**-0.5, **launch)

    return Tuning(
        OPERATOR,
        pattern_plan.tuning_key(*kind),
        pattern_plan.default_setting(*kind),
        pattern_plan.candidates(width, _DTYPE, diagonals),
        lambda given: (*given, torch.empty_like(given.q)),
        run,
    )
