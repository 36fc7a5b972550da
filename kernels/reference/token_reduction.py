"""Fewer tokens: matching them in pairs, merging the best pairs, and keeping those with the highest scores.

After Token Merging (ToMe, Bolya et al., arXiv 2210.09461), with the weights of MCTF (arXiv 2403.10030) as another
score, and what DiffRate (arXiv 2305.17997) needs: sorting by attention, and merging into the tokens before.

Tokens are split into sources, each of which is matched with one target. ``split`` 0 alternates, as ToMe: sources are
the tokens with even numbers, targets those with odd ones. Otherwise targets are the first ``split`` tokens and sources
all after them, as for MCTF's way back and for DiffRate. The first ``protected`` tokens (the class token, registers) are
neither merged nor merged into, whichever half they fall in.

Of equal scores the lowest number wins, everywhere. All counts are Python integers: shapes are known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from archfront.kernels.reference.cost import Cost


def split_tokens(length: int, split: int) -> tuple[range, range]:
    """The numbers of the sources and of the targets."""
    return (range(split, length), range(split)) if split else (range(0, length, 2), range(1, length, 2))


def most_merged(length: int, protected: int, split: int) -> int:
    """How many tokens can be merged at most: all unprotected sources, where any target is unprotected."""
    sources, targets = split_tokens(length, split)
    return sum(token >= protected for token in sources) if any(token >= protected for token in targets) else 0


def information_factors(
    attention: Tensor, size: Tensor, *, information_temperature: float = 20.0, size_temperature: float = 40.0
) -> Tensor:
    """MCTF's part of each token in the weight of a pair: uninformative and small tokens merge first.

    Each of ``1 / attention`` and ``1 / size``, divided by its maximum over the tokens, to the power of one over its
    temperature; the product of both.

    Args:
        attention: ``(b, n)``, the mean attention that each token receives.
        size: ``(b, n)``, how many tokens each one is.
        information_temperature, size_temperature: 0 leaves the part out, as with both the matching is ToMe's.

    Returns:
        ``(b, n)`` float32, above 0 and at most 1.
    """
    factors = torch.ones_like(attention, dtype=torch.float32)
    for values, temperature in ((attention, information_temperature), (size, size_temperature)):
        if temperature:
            positive = values.float().clamp_min(torch.finfo(torch.float32).tiny)
            factors = factors * (positive.amin(1, keepdim=True) / positive) ** (1 / temperature)
    return factors


def token_match(
    metric: Tensor, factors: Tensor | None = None, *, protected: int = 1, split: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """For each source the target that it goes best with.

    Scores are of float64 rounded to float32: equal tokens would differ in the last bits of a float32 product, whose
    order of sums depends on where in the matrix it stands, and the lowest number would not win.

    The score of a pair is the cosine of their angle; with ``factors`` it is MCTF's
    ``((cosine + 1) / 2) ** (1 / temperature) * factors[source] * factors[target]``. A vector of zeros is at a cosine of
    0 with all; NaN goes with none.

    Args:
        metric: ``(b, n, c)``, such as keys averaged over heads.
        factors: ``(b, n)``, see ``information_factors``.
        temperature: of the similarity, above 0; used with factors alone.

    Returns:
        score: ``(b, sources)`` float32, minus infinity for those that are protected or that go with none.
        index: ``(b, sources)`` int64, numbers among the targets: of the highest score, 0 where it is minus infinity.
    """
    sources, targets = split_tokens(metric.shape[1], split)
    wide = metric.double()
    inverse = wide.square().sum(2).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    rows, columns = slice(sources.start, None, sources.step), slice(targets.start, targets.stop, targets.step)
    score = wide[:, rows] @ wide[:, columns].mT * inverse[:, rows, None] * inverse[:, None, columns]
    if factors is not None:
        closeness = ((score + 1) / 2).clamp_min(0) ** (1 / temperature)
        score = closeness * factors[:, rows, None] * factors[:, None, columns]
    numbers = torch.arange(metric.shape[1], device=metric.device)
    none = (numbers[rows, None] < protected) | (numbers[columns] < protected)
    score = score.masked_fill(none | score.isnan(), -torch.inf).float()
    if not len(targets):
        empty = score.new_full(score.shape[:2], -torch.inf)
        return empty, torch.zeros_like(empty, dtype=torch.int64)
    # Of equal maxima argmax returns the first; max promises nothing.
    return score.amax(2), score.argmax(2)


def rank(score: Tensor, served: Tensor) -> Tensor:
    """How many served scores come before each one, ``(b, n)`` int64: higher ones, and equal ones of lower number.

    Ordered by bits: minus zero is below zero, and NaN of positive sign above infinity. What is not served is last.

    Args:
        score: ``(b, n)`` float32.
        served: ``(n,)`` bool.
    """
    bits = score.contiguous().view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    order = order.masked_fill(~served, torch.iinfo(torch.int64).min)
    # Of equal ones a stable sort keeps the lowest number first.
    return torch.argsort(torch.argsort(order, dim=1, descending=True, stable=True), dim=1)


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
    """Merges the r sources with the highest scores into their targets; means are taken in at least float32.

    The tokens that remain are, in this order: the protected ones, the sources that were not merged, the targets, each
    in the order they had. With r = 0 the result is x and size themselves. A token into which nothing is merged keeps
    its bits.

    Args:
        x: ``(b, n, c)``.
        size: ``(b, n)`` float32, of how many tokens each one is the mean.
        score, index: from ``token_match`` of as many tokens.
        r: at most ``most_merged(n, protected, split)``.
        weight: ``(b, n)`` float32 of the means; sizes where not given. A mean of no weight at all is zero.

    Returns:
        x: ``(b, n - r, c)`` of x's dtype.
        size: ``(b, n - r)`` float32, the sums of sizes.
    """
    if r == 0:
        return x, size
    batch, length, channels = x.shape
    sources, targets = split_tokens(length, split)
    source, target = (torch.tensor(list(numbers), device=x.device) for numbers in (sources, targets))
    wide = torch.promote_types(x.dtype, torch.float32)
    merged = (rank(score, source >= protected) < r) & (source >= protected)
    # Where each token goes: its place in the result.
    place = torch.empty(batch, length, dtype=torch.int64, device=x.device)
    stays = ~merged & (source >= protected)
    place[:, source] = protected + stays.cumsum(1) - 1
    first = protected + int((source >= protected).sum()) - r
    place[:, target] = first + (target >= protected).cumsum(0) - 1
    place[:, :protected] = torch.arange(protected, device=x.device)
    into = place[:, target].gather(1, index)
    place[:, source] = torch.where(merged, into, place[:, source])
    weight = size if weight is None else weight
    weighted = x.to(wide) * weight.to(wide)[:, :, None]
    total = torch.zeros(batch, length - r, dtype=wide, device=x.device).scatter_add(1, place, weight.to(wide))
    rows = place[:, :, None].expand(-1, -1, channels)
    mean = torch.zeros(batch, length - r, channels, dtype=wide, device=x.device).scatter_add(1, rows, weighted)
    mean = mean / total.masked_fill(total == 0, 1)[:, :, None]
    many = torch.zeros_like(place[:, : length - r]).scatter_add(1, place, torch.ones_like(place)) > 1
    own = torch.empty(batch, length - r, channels, dtype=x.dtype, device=x.device).scatter(1, rows, x)
    sizes = torch.zeros(batch, length - r, dtype=torch.float32, device=x.device).scatter_add(1, place, size)
    return torch.where(many[:, :, None], mean.to(x.dtype), own), sizes


def token_gather(
    x: Tensor, score: Tensor, keep: int, *, protected: int = 1, ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """The protected tokens, then those ``keep`` others with the highest scores.

    Args:
        x: ``(b, n, c)``.
        score: ``(b, n)`` float32, as class attention averaged over heads; of protected tokens not read.
        keep: at most ``n - protected``.
        ordered: whether the kept come from the highest score on, as for DiffRate, and not in the order they had.

    Returns:
        x: ``(b, protected + keep, c)``.
        index: ``(b, protected + keep)`` int64, the numbers that they had.
    """
    length = x.shape[1]
    numbers = torch.arange(length, device=x.device)
    others = rank(score, numbers >= protected)
    # Unserved ones are last, so the first ranks are those of the kept.
    kept = torch.argsort(others, dim=1, stable=True)[:, :keep]
    kept = kept if ordered else kept.sort(1).values
    index = torch.cat((numbers[:protected].expand(x.shape[0], -1), kept), 1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])), index


def token_match_cost(
    shape: tuple[int, int, int], *, split: int = 0, dtype: torch.dtype, weighted: bool = False
) -> Cost:
    """The least cost of ``token_match`` on a metric of ``shape`` ``(b, n, c)``.

    A product of sources and targets, the norms, two multiplications and a comparison a pair; two more with factors,
    whose power does not count.
    """
    batch, length, channels = shape
    sources, targets = (len(numbers) for numbers in split_tokens(length, split))
    pairs = sources * targets
    operations = pairs * (2 * channels + 3 + 2 * weighted) + 2 * length * channels
    vectors = 4 * length * weighted + (4 + 8) * sources
    return Cost(batch * operations, batch * (length * channels * dtype.itemsize + vectors))


def token_merge_cost(
    shape: tuple[int, int, int], r: int, *, split: int = 0, dtype: torch.dtype, weighted: bool = False
) -> Cost:
    """The least cost of ``token_merge`` on an x of ``shape`` ``(b, n, c)``: nothing with r = 0.

    Each merged token is multiplied by its weight and added; finding the r best is a comparison of all pairs.
    """
    if r == 0:
        return Cost(0, 0)
    batch, length, channels = shape
    sources = len(split_tokens(length, split)[0])
    operations = 2 * r * channels + sources * sources
    vectors = 4 * (length * (1 + weighted) + length - r) + (4 + 8) * sources
    return Cost(batch * operations, batch * ((2 * length - r) * channels * dtype.itemsize + vectors))


def token_gather_cost(shape: tuple[int, int, int], keep: int, *, protected: int = 1, dtype: torch.dtype) -> Cost:
    """The least cost of ``token_gather`` on an x of ``shape`` ``(b, n, c)``, of which only the kept is read."""
    batch, length, channels = shape
    kept = protected + keep
    moved = 2 * kept * channels * dtype.itemsize + 4 * length + 8 * kept
    return Cost(batch * length * length, batch * moved)
