"""Merging and keeping of tokens, beside ToMe's and top-k's algorithms written plainly in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from case import Case, Tuning, Variant, normal
from torch import Tensor

from archfront.kernels.ops import token_matching, token_merging
from archfront.kernels.ops.token_matching import token_match
from archfront.kernels.ops.token_merging import token_gather, token_merge
from archfront.kernels.reference import token_reduction as reference
from archfront.kernels.reference.cost import Cost

MERGE, GATHER = "token_match + token_merge", "token_gather"
TOME = "ToMe's algorithm, eager"
_DTYPE = torch.bfloat16
_PROTECTED = 1
# (b, n, c), width of the metric, tokens that go.
_SHAPES = [((256, 197, 384), 64, 13), ((64, 197, 384), 64, 13), ((1, 197, 384), 64, 13)]
_LONGER = [((64, 577, 768), 64, 32), ((4, 4096, 384), 64, 512)]
_TINY = [((2, 17, 24), 16, 3)]


class Values(NamedTuple):
    """Tokens, what they are compared by, their sizes, and scores to keep them by."""

    x: Tensor
    metric: Tensor
    size: Tensor
    score: Tensor


def cases(device: torch.device) -> Iterator[Case]:
    """DeiT-S at three batches first."""
    for shape, width, gone in _TINY if device.type == "cpu" else _SHAPES:
        yield _merging(shape, width, gone, 0, device)
        yield _keeping(shape, gone, 1, device)
    if device.type != "cpu":
        for shape, width, gone in _LONGER:
            yield _merging(shape, width, gone, 2, device)


def tome(x: Tensor, metric: Tensor, size: Tensor, gone: int) -> tuple[Tensor, Tensor]:
    """Section 3 of Token Merging (Bolya et al., arXiv 2210.09461) with its steps as torch operators: alternate tokens
    matched by cosine, the best ``gone`` edges kept, means weighted by size; the class token is not merged."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    scores[:, 0] = -torch.inf
    best, target = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)
    merged, staying = order[:, :gone], order[:, gone:].sort(1).values
    into = target.gather(1, merged)
    weighted = torch.cat((x * size[:, :, None].to(x.dtype), size[:, :, None].to(x.dtype)), 2)
    sources, targets = weighted[:, ::2], weighted[:, 1::2]
    width = weighted.shape[2]
    moved = sources.gather(1, merged[:, :, None].expand(-1, -1, width))
    summed = targets.scatter_add(1, into[:, :, None].expand(-1, -1, width), moved)
    kept = sources.gather(1, staying[:, :, None].expand(-1, -1, width))
    result = torch.cat((kept, summed), 1)
    return result[:, :, :-1] / result[:, :, -1:], result[:, :, -1]


def top_tokens(x: Tensor, score: Tensor, keep: int) -> Tensor:
    """The class token and the best others, in the order they had."""
    kept = score[:, _PROTECTED:].topk(keep, dim=1).indices.sort(1).values + _PROTECTED
    return torch.cat((x[:, :_PROTECTED], x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))), 1)


def _tokens(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _values(shape: tuple[int, int, int], width: int, device: torch.device) -> Any:
    batch, length, _ = shape

    def values(seed: int) -> Values:
        x = normal(shape, 4 * seed, device)
        metric = normal((batch, length, width), 4 * seed + 1, device)
        size = 1 + normal((batch, length), 4 * seed + 2, device, torch.float32).abs().floor()
        return Values(x, metric, size, normal((batch, length), 4 * seed + 3, device, torch.float32))

    return values


def _merging(shape: tuple[int, int, int], width: int, gone: int, priority: int, device: torch.device) -> Case:
    batch, length, channels = shape

    def ours(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return token_merge(x, size, *token_match(metric), gone)

    def exact(given: Values) -> Tensor:
        # Which of two almost equal scores is higher is the matching's error, and checked with it.
        score, index = token_match(given.metric)
        return reference.token_merge(given.x.double(), given.size, score, index, gone)[0]

    def exact_tome(given: Values) -> Tensor:
        return tome(given.x.double(), given.metric.double(), given.size.double(), gone)[0]

    def plain(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return tome(x, metric, size, gone)

    matching = reference.token_match_cost((batch, length, width), dtype=_DTYPE)
    merging = reference.token_merge_cost(shape, gone, dtype=_DTYPE)
    # Scores and indices need not leave the chip between the two.
    between = 2 * 12 * batch * len(reference.split_tokens(length, 0)[0])
    cost = Cost(matching.operations + merging.operations, matching.bytes + merging.bytes - between)
    variants = [
        Variant(MERGE, lambda given: given[:3], ours, exact, cost, "bf16", _tokens, ours=True),
        Variant(TOME, lambda given: given[:3], plain, exact_tome, cost, "bf16", _tokens),
        Variant(
            "ToMe's algorithm, compiled",
            lambda given: given[:3],
            plain,
            exact_tome,
            cost,
            "bf16",
            _tokens,
            compiled=True,
        ),
    ]
    facts = {"b": batch, "length": length, "c": channels, "gone": gone}
    name = f"{batch} x {length} x {channels}, {gone} merged"
    key = token_matching.tuning_key(length, width, _DTYPE)
    settings = token_matching.default_setting(_DTYPE), token_matching.candidates(_DTYPE)
    tunings = [
        Tuning("token_match", key, *settings, _match_arguments, _match),
        _gather_tuning("token_merge", shape, gone),
    ]
    return Case(MERGE, name, _DTYPE, facts, _values(shape, width, device), variants, TOME, priority, tunings)


def _keeping(shape: tuple[int, int, int], gone: int, priority: int, device: torch.device) -> Case:
    batch, length, channels = shape
    keep = length - _PROTECTED - gone

    def ours(x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        return token_gather(x, score, keep, protected=_PROTECTED)

    def plain(x: Tensor, score: Tensor) -> Tensor:
        return top_tokens(x, score, keep)

    def exact(given: Values) -> Tensor:
        return reference.token_gather(given.x.double(), given.score, keep, protected=_PROTECTED)[0]

    def arguments(given: Values) -> tuple[Any, ...]:
        return given.x, given.score

    cost = reference.token_gather_cost(shape, keep, protected=_PROTECTED, dtype=_DTYPE)
    eager = "topk and gather, eager"
    variants = [
        Variant(GATHER, arguments, ours, exact, cost, "bf16", _tokens, ours=True),
        Variant(eager, arguments, plain, exact, cost, "bf16", _tokens),
        Variant("topk and gather, compiled", arguments, plain, exact, cost, "bf16", _tokens, compiled=True),
    ]
    facts = {"b": batch, "length": length, "c": channels, "gone": gone}
    name = f"{batch} x {length} x {channels}, {keep} kept"
    tunings = [_gather_tuning(GATHER, shape, gone)]
    return Case(GATHER, name, _DTYPE, facts, _values(shape, 64, device), variants, eager, priority, tunings)


def _match_arguments(given: Values) -> tuple[Any, ...]:
    sources = len(reference.split_tokens(given.metric.shape[1], 0)[0])
    results = (given.metric.new_empty(len(given.metric), sources, dtype=d) for d in (torch.float32, torch.int64))
    return given.metric, None, *results


def _match(*arguments: Any) -> None:
    halves: dict[str, Any] = {"protected": _PROTECTED, "split": 0, "temperature": 1.0}
    token_matching.run_kernel(*arguments[:-1], **halves, setting=arguments[-1])


def _gather_tuning(operator: str, shape: tuple[int, int, int], gone: int) -> Tuning:
    """Of the last kernel of both operators, timed with those before it, which have no settings."""
    batch, length, channels = shape
    kept = length - gone

    def merge_arguments(given: Values) -> tuple[Any, ...]:
        out, sizes = given.x.new_empty(batch, kept, channels), given.size.new_empty(batch, kept)
        return given.x, given.size, given.size, *reference.token_match(given.metric), out, sizes

    def merge(*arguments: Any) -> None:
        token_merging.run_merge(*arguments[:-1], r=gone, protected=_PROTECTED, split=0, setting=arguments[-1])

    def keep_arguments(given: Values) -> tuple[Any, ...]:
        out = given.x.new_empty(batch, kept, channels)
        return given.x, given.score, out, given.x.new_empty(batch, kept, dtype=torch.int64)

    def keep(*arguments: Any) -> None:
        how: dict[str, Any] = {"keep": kept - _PROTECTED, "protected": _PROTECTED, "ordered": False}
        token_merging.run_gather(*arguments[:-1], **how, setting=arguments[-1])

    prepare, run = (merge_arguments, merge) if operator == "token_merge" else (keep_arguments, keep)
    key = token_matching.tuning_key(length, channels, _DTYPE)
    return Tuning(operator, key, token_merging.default_setting(), token_merging.candidates(), prepare, run)
