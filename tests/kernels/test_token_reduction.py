"""Token reduction: matching, merging and keeping against plain loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import GATES, guarded, poisoned, relative_error, worst_error
from torch import Tensor, nn

from archfront.kernels.modules.token_reduction import TokenMerge, TokenPrune
from archfront.kernels.ops import token_matching, token_merging
from archfront.kernels.ops.token_matching import token_match
from archfront.kernels.ops.token_merging import token_gather, token_merge
from archfront.kernels.reference import token_reduction as reference
from archfront.kernels.reference.token_reduction import information_factors, most_merged, split_tokens

BLOCKS = {"BLOCK_S": 16, "BLOCK_T": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
TILE = {"BLOCK_R": 4, "BLOCK_C": 16, "num_warps": 4}


def naive_match(
    metric: Tensor, factors: Tensor | None, protected: int, split: int, temperature: float = 1.0
) -> tuple[list[list[float]], list[list[int]]]:
    sources, targets = split_tokens(metric.shape[1], split)
    scores, indices = [], []
    for number, image in enumerate(metric.double().tolist()):
        score_row, index_row = [], []
        for source in sources:
            best, best_index = -math.inf, 0
            for place, target in enumerate(targets):
                if source < protected or target < protected:
                    continue
                a, b = image[source], image[target]
                norms = math.hypot(*a) * math.hypot(*b)
                score = sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 0.0
                if factors is not None:
                    pair = float(factors[number, source]) * float(factors[number, target])
                    score = max((score + 1) / 2, 0) ** (1 / temperature) * pair
                if score > best:
                    best, best_index = score, place
            score_row.append(best)
            index_row.append(best_index)
        scores.append(score_row)
        indices.append(index_row)
    return scores, indices


def naive_merge(
    x: Tensor, size: Tensor, score: Tensor, index: Tensor, r: int, protected: int, split: int, weight: Tensor
) -> tuple[Tensor, Tensor]:
    sources, targets = split_tokens(x.shape[1], split)
    results, sizes = [], []
    for number in range(x.shape[0]):
        free = [place for place, token in enumerate(sources) if token >= protected]
        merged = sorted(free, key=lambda place: (-float(score[number, place]), place))[:r]
        groups = {token: [token] for token in range(x.shape[1])}
        for place in merged:
            groups[targets[int(index[number, place])]] += groups.pop(sources[place])
        order = [t for t in range(protected) if t in groups]
        order += [t for t in sources if t >= protected and t in groups]
        order += [t for t in targets if t >= protected]
        rows = []
        for token in order:
            total = sum(float(weight[number, t]) for t in groups[token])
            mean = sum(x[number, t].double() * float(weight[number, t]) for t in groups[token])
            rows.append(mean / total if total else mean * 0)
        results.append(torch.stack(rows))
        sizes.append([sum(float(size[number, t]) for t in groups[token]) for token in order])
    return torch.stack(results), torch.tensor(sizes)


def by_match_kernel(
    metric: Tensor, factors: Tensor | None = None, protected: int = 1, split: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The interpreted kernel amid poison, with small blocks."""
    shape = (metric.shape[0], len(split_tokens(metric.shape[1], split)[0]))
    score, score_strayed = poisoned(shape, torch.float32)
    index, index_strayed = poisoned(shape, torch.int64)
    vector = None if factors is None else guarded(factors)[0]
    how: dict[str, Any] = {"protected": protected, "split": split, "temperature": temperature, "setting": BLOCKS}
    token_matching.run_kernel(guarded(metric)[0], vector, score, index, **how)
    assert not score_strayed()
    assert not index_strayed()
    return score, index


def by_merge_kernels(
    x: Tensor, size: Tensor, score: Tensor, index: Tensor, r: int, protected: int, split: int, weight: Tensor
) -> tuple[Tensor, Tensor]:
    out, strayed = poisoned((x.shape[0], x.shape[1] - r, x.shape[2]), x.dtype)
    out_size, size_strayed = poisoned((x.shape[0], x.shape[1] - r), torch.float32)
    tensors = (guarded(tensor)[0] for tensor in (x, size, weight, score, index))
    token_merging.run_merge(*tensors, out, out_size, r=r, protected=protected, split=split, setting=TILE)
    assert not strayed()
    assert not size_strayed()
    return out, out_size


def by_gather_kernels(x: Tensor, score: Tensor, keep: int, protected: int, ordered: bool) -> tuple[Tensor, Tensor]:
    out, strayed = poisoned((x.shape[0], protected + keep, x.shape[2]), x.dtype)
    index, index_strayed = poisoned((x.shape[0], protected + keep), torch.int64)
    how: dict[str, Any] = {"keep": keep, "protected": protected, "ordered": ordered, "setting": TILE}
    token_merging.run_gather(guarded(x)[0], guarded(score)[0], out, index, **how)
    assert not strayed()
    assert not index_strayed()
    return out, index


def assert_match(
    found: tuple[Tensor, Tensor], metric: Tensor, factors: Tensor | None, *, protected: int, split: int, **more: float
) -> None:
    scores, indices = naive_match(metric, factors, protected, split, **more)
    expected = torch.tensor(scores, dtype=torch.float64).view(found[0].shape)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert found[1].tolist() == indices


def assert_merged(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert relative_error(found[0], expected[0]) <= GATES[found[0].dtype]
    assert worst_error(found[0], expected[0]) <= 10 * GATES[found[0].dtype]
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "channels", "protected", "split"),
    # Odd and even; more than a block of all; registers; the way back; one token, and two; DeiT's, narrow.
    [
        (37, 24, 1, 0),
        (40, 16, 0, 0),
        (19, 33, 3, 0),
        (30, 8, 2, 13),
        (21, 5, 1, 20),
        (1, 4, 0, 0),
        (2, 4, 1, 0),
        (197, 4, 1, 0),
    ],
)
def test_matching_is_right(length: int, channels: int, protected: int, split: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Plain loops take their time.
    batch = 2 if length < 100 else 1
    metric = torch.randn(batch, length, channels).to(dtype)
    factors = torch.rand(batch, length) + 0.01
    how: dict[str, int] = {"protected": protected, "split": split}
    for some in (None, factors):
        for call in (by_match_kernel, reference.token_match, token_match):
            assert_match(call(metric, some, **how), metric, some, **how)
    found = by_match_kernel(metric, factors, **how, temperature=0.25)
    assert_match(found, metric, factors, **how, temperature=0.25)
    assert_match(token_match(metric, factors, **how, temperature=0.25), metric, factors, **how, temperature=0.25)


@given(st.data(), st.integers(2, 24), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_of_equal_scores_the_lowest_number_wins(data: Any, length: int, protected: int) -> None:
    """Axes and their opposites: sums are exact, and ties many."""
    protected = min(protected, length)
    split = data.draw(st.integers(0, length - 1))
    axes = data.draw(st.lists(st.integers(-3, 3), min_size=length, max_size=length))
    metric = torch.zeros(1, length, 4)
    for token, axis in enumerate(axes):
        metric[0, token, abs(axis)] = math.copysign(2.0, axis) if axis else 0.0
    how: dict[str, int] = {"protected": protected, "split": split}
    for call in (by_match_kernel, reference.token_match):
        assert_match(call(metric, None, **how), metric, None, **how)


def test_equal_tokens_zeros_outliers_and_nan() -> None:
    torch.manual_seed(1)
    equal = torch.randn(8).expand(1, 20, 8).contiguous()
    for call in (by_match_kernel, token_match):
        score, index = call(equal, None, protected=1, split=0)
        assert score[0, 0] == -torch.inf
        assert (score[0, 1:] - 1).abs().max() < 1e-6
        assert (index == 0).all()
        score, index = call(torch.zeros(1, 20, 8), None, protected=1, split=0)
        assert (score[0, 1:] == 0).all()
        assert (index == 0).all()
        far = torch.randn(1, 20, 8).half()
        far[..., 3] *= 50
        far[0, 6] = 0
        assert_match(call(far, None, protected=1, split=0), far, None, protected=1, split=0)
        far[0, 4], far[0, 7] = torch.nan, torch.nan
        score, index = call(far, None, protected=1, split=0)
        assert score[0, 2] == -torch.inf
        assert (index != 3).all()
        assert score[0, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "channels", "r", "protected", "split"),
    [
        (37, 24, 5, 1, 0),
        (40, 16, 20, 0, 0),
        (19, 33, 8, 3, 0),
        (30, 8, 17, 2, 13),
        (21, 5, 1, 1, 20),
        (2, 3, 1, 0, 0),
        (197, 4, 13, 1, 0),
    ],
)
def test_merging_is_right(length: int, channels: int, r: int, protected: int, split: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, metric = torch.randn(2, length, channels).to(dtype), torch.randn(2, length, 6)
    size, weight = torch.randint(1, 6, (2, length)).float(), torch.rand(2, length)
    how: dict[str, int] = {"protected": protected, "split": split}
    score, index = token_match(metric, **how)
    for some in (size, weight):
        expected = naive_merge(x, size, score, index, r, protected, split, some)
        assert_merged(by_merge_kernels(x, size, score, index, r, protected, split, some), expected)
        assert_merged(reference.token_merge(x, size, score, index, r, **how, weight=some), expected)
        assert_merged(token_merge(x, size, score, index, r, **how, weight=some), expected)
    assert torch.equal(token_merge(x, size, score, index, r, **how)[1], expected[1])


@given(st.data(), st.integers(3, 30), st.integers(0, 2), st.integers(1, 15))
@settings(max_examples=20, deadline=None)
def test_merging_obeys_any_scores_and_targets(data: Any, length: int, protected: int, r: int) -> None:
    """Few values, so that ties abound; many sources for one target."""
    split = data.draw(st.sampled_from([0, length // 2]))
    most = most_merged(length, protected, split)
    if most == 0:
        return
    sources, targets = split_tokens(length, split)
    values = st.sampled_from([-math.inf, -1.5, -0.0, 0.25, 2.0, math.inf])
    score = torch.tensor([data.draw(st.lists(values, min_size=len(sources), max_size=len(sources)))])
    score = torch.where(torch.tensor(list(sources)) < protected, -torch.inf, score)
    allowed = st.sampled_from([place for place, token in enumerate(targets) if token >= protected])
    index = torch.tensor([data.draw(st.lists(allowed, min_size=len(sources), max_size=len(sources)))])
    x, size = torch.arange(length * 3.0).view(1, length, 3), torch.ones(1, length)
    arguments = (x, size, score, index, min(r, most), protected, split, size)
    expected = naive_merge(*arguments)
    for found in (by_merge_kernels(*arguments), token_merge(*arguments[:5], protected=protected, split=split)):
        assert_merged(found, expected)


def test_what_nothing_is_merged_into_keeps_its_bits_and_its_place() -> None:
    torch.manual_seed(3)
    x, size = torch.randn(1, 9, 5), torch.tensor([[3.0, 7, 3, 7, 3, 7, 3, 7, 3]])
    score = torch.tensor([[-torch.inf, 0.1, 0.9, 0.2, 0.3]])
    index = torch.tensor([[0, 0, 2, 0, 0]])
    for out, sizes in (
        by_merge_kernels(x, size, score, index, 1, 1, 0, size),
        token_merge(x, size, score, index, 1),
    ):
        # The class token, unmerged sources, targets; token 4 is in 5.
        assert torch.equal(out[0, [0, 1, 2, 3, 4, 5, 7]], x[0, [0, 2, 6, 8, 1, 3, 7]])
        torch.testing.assert_close(out[0, 6], 0.7 * x[0, 5] + 0.3 * x[0, 4])
        assert sizes.tolist() == [[3, 3, 3, 3, 7, 7, 10, 7]]


def test_merging_nothing_is_the_identity() -> None:
    x, metric = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    size = torch.rand(2, 9)
    score, index = token_match(metric)
    for call in (token_merge, reference.token_merge):
        out, sizes = call(x, size, score, index, 0)
        assert out is x
        assert sizes is size
    assert TokenMerge(0)(x, metric)[0] is x


def test_weights_of_zero_give_zero() -> None:
    x, size = torch.randn(1, 4, 3), torch.ones(1, 4)
    score, index = torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[0, 0]])
    arguments = (x, size, score, index, 1, 1, 0, torch.zeros(1, 4))
    expected = torch.stack((x[0, 0], torch.zeros(3), x[0, 3]))
    assert torch.equal(by_merge_kernels(*arguments)[0][0], expected)
    assert torch.equal(token_merge(*arguments[:5], weight=arguments[7])[0][0], expected)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("length", "keep", "protected"), [(37, 11, 1), (20, 20, 0), (20, 0, 2), (5, 2, 3), (1, 1, 0)])
def test_keeping_is_right(length: int, keep: int, protected: int, ordered: bool) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, length, 18).half()
    # Few values: ties. Those of protected tokens are the highest, and not read.
    score = torch.randint(0, 5, (2, length)).float() - 2
    score[:, :protected] = torch.inf
    for out, index in (
        by_gather_kernels(x, score, keep, protected, ordered),
        token_gather(x, score, keep, protected=protected, ordered=ordered),
    ):
        for image in range(2):
            best = sorted(range(protected, length), key=lambda token: (-float(score[image, token]), token))[:keep]
            kept = [*range(protected), *(best if ordered else sorted(best))]
            assert index[image].tolist() == kept
            assert torch.equal(out[image], x[image, kept])


def test_ranks_are_by_bits() -> None:
    score = torch.tensor([[0.0, -0.0, -torch.inf, torch.inf, torch.nan, 1e-45, -1e-45, 0.0]])
    x = torch.arange(8.0).view(1, 8, 1)
    # NaN, infinity, a denormal, then zero.
    assert by_gather_kernels(x, score, 4, 0, True)[1].tolist() == [[4, 3, 5, 0]]
    assert token_gather(x, score, 8, protected=0, ordered=True)[1].tolist() == [[4, 3, 5, 0, 7, 1, 6, 2]]
    assert by_gather_kernels(x, score, 8, 0, True)[1].tolist() == [[4, 3, 5, 0, 7, 1, 6, 2]]


def test_more_tokens_than_a_block_counts_at_a_time() -> None:
    torch.manual_seed(5)
    length = 2 * token_merging.BLOCK_I + 60
    score, index = torch.randn(1, length // 2), torch.randint(0, length // 2, (1, length // 2))
    score[0, 0] = -torch.inf
    x, size = torch.randn(1, length, 2), torch.ones(1, length)
    index.clamp_min_(1)
    arguments = (x, size, score, index, 90, 1, 0, size)
    assert_merged(by_merge_kernels(*arguments), naive_merge(*arguments))
    kept = by_gather_kernels(x, torch.arange(length).float()[None], 150, 1, False)[1]
    assert kept.tolist() == [[0, *range(length - 150, length)]]


def test_an_empty_batch() -> None:
    x, vector = torch.zeros(0, 8, 4), torch.zeros(0, 8)
    score, index = by_match_kernel(x)
    assert score.shape == index.shape == token_match(x)[0].shape == (0, 4)
    assert by_merge_kernels(x, vector, score, index, 2, 1, 0, vector)[0].shape == (0, 6, 4)
    assert token_merge(x, vector, score, index, 2)[1].shape == (0, 6)
    assert by_gather_kernels(x, vector, 3, 1, False)[1].shape == token_gather(x, vector, 3)[1].shape == (0, 4)


def test_the_same_inputs_give_the_same_bits() -> None:
    torch.manual_seed(6)
    x, size = torch.randn(1, 33, 20).half(), torch.rand(1, 33)
    runs = []
    for _ in range(2):
        score, index = by_match_kernel(x, size)
        runs.append((score, index, *by_merge_kernels(x, size, score, index, 12, 1, 0, size)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_factors_are_mctfs() -> None:
    attention, size = torch.tensor([[0.1, 0.4, 0.2]]), torch.tensor([[2.0, 1.0, 4.0]])
    expected = (0.1 / attention) ** (1 / 20) * (1 / size) ** (1 / 40)
    torch.testing.assert_close(information_factors(attention, size), expected)
    assert (information_factors(attention, size, information_temperature=0, size_temperature=0) == 1).all()
    assert information_factors(torch.zeros(1, 3), size).isfinite().all()


def test_without_temperatures_mctf_matches_as_tome() -> None:
    torch.manual_seed(7)
    metric = torch.randn(2, 21, 8)
    ones = information_factors(torch.rand(2, 21), torch.ones(2, 21), information_temperature=0, size_temperature=0)
    assert torch.equal(token_match(metric, ones)[1], token_match(metric)[1])


def test_mctfs_two_ways() -> None:
    """Alternating tokens, then the targets of that back into what remains of the sources."""
    torch.manual_seed(8)
    x = torch.randn(1, 20, 6)
    out, size = TokenMerge(3)(x, x)
    # Ten targets are last: the first seven, class token included, are targets now.
    out, size = TokenMerge(4, split=7)(out, out, size)
    assert out.shape == (1, 13, 6)
    assert size.sum() == 20
    assert torch.equal(out[0, 0], x[0, 0])
    torch.testing.assert_close((out * size[:, :, None]).sum(1), x.sum(1))


def test_diffrates_order_then_its_plain_mean() -> None:
    """Sort by attention, prune the tail, and let each of the lowest join what it is most similar to."""
    torch.manual_seed(9)
    x, attention = torch.randn(2, 12, 6), torch.rand(2, 12)
    kept, index = TokenPrune(8, ordered=True)(x, attention)
    assert torch.equal(attention.gather(1, index[:, 1:]), attention[:, 1:].sort(1, descending=True).values[:, :8])
    out, size = TokenMerge(3, split=6)(kept, kept, weight=torch.ones(2, 9))
    assert out.shape == (2, 6, 6)
    assert (size.sum(1) == 9).all()
    cosine = nn.functional.cosine_similarity(kept[:, 6:, None], kept[:, None, 1:6], dim=-1)
    joined = cosine.argmax(2) + 1
    for image in range(2):
        for target in range(1, 6):
            group = [target, *(6 + place for place in range(3) if joined[image, place] == target)]
            torch.testing.assert_close(out[image, target], kept[image, group].mean(0))
