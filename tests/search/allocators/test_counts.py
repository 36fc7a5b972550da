"""Shares of counts: global thresholds on units, proportional counts, mass thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archfront.errors import InputError
from archfront.search.allocators.bisection import mass_threshold
from archfront.search.allocators.proportional import proportional_counts
from archfront.search.allocators.threshold import keep_counts, lower_hull, rescaled


def layers(*sizes: int, scales: list[float]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.abs(rng.normal(0, scale, size)) for size, scale in zip(sizes, scales, strict=True)]


def test_minimum_threshold_keeps_what_global_magnitude_empties() -> None:
    # A layer of weights a thousand times smaller than the others'.
    scores = layers(9000, 1000, 10000, scales=[1.0, 1e-3, 0.8])
    plain = keep_counts(scores, 0.98, floor=0)
    assert plain[1] == 0
    assert sum(plain) == 400
    kept = keep_counts(scores, 0.98)
    assert kept[1] == 10  # 0.05 % of the network, not of the layer
    assert sum(kept) == 400


def test_plain_global_magnitude_is_one_threshold() -> None:
    scores = layers(300, 200, 500, scales=[1.0, 0.5, 2.0])
    threshold = np.sort(np.concatenate(scores))[700 - 1]
    assert keep_counts(scores, 0.7, floor=0) == [int((layer > threshold).sum()) for layer in scores]


def test_layers_smaller_than_the_minimum_are_left_whole() -> None:
    scores = layers(50, 1000, 1000, scales=[1e-3, 1.0, 1.0])
    assert keep_counts(scores, 0.9, floor=60)[0] == 50


def test_floors_beyond_the_budget_are_refused_first() -> None:
    scores = layers(100, 100, scales=[1.0, 1.0])
    with pytest.raises(InputError, match=r"floor: 20 keeps 40 of 200 units.*sparsity of 0\.8 at most"):
        keep_counts(scores, 0.9, floor=20)
    assert keep_counts(scores, 0.8, floor=20) == [20, 20]


def test_where_scaling_cannot_reach_it_the_lowest_scores_go() -> None:
    # All that global magnitude prunes is in the first layer, and the second one's sparsity of 0 stays 0 times any.
    scores = [np.linspace(0, 1, 100), np.linspace(2, 3, 100)]
    assert keep_counts(scores, 0.5, floor=30) == [30, 70]


def test_what_rounding_leaves_goes_to_the_lowest_score_that_is_left() -> None:
    # The third layer keeps 2, so the others' 1 and 3 pruned units become 1.5 and 4.5, and one is left: 5 against 20.
    first, second = [0.0, 20, 21, 22, 23, 24, 25, 26], [1.0, 2, 3, 4, 5, 30, 31, 32]
    assert keep_counts([first, second, [-1.0] * 4], 0.4, floor=2) == [7, 3, 2]


def test_rescaling_goes_on_to_its_stop() -> None:
    sizes = np.array([1000, 2000, 4000, 300])
    shares = np.array([0.9995, 0.97, 0.9, 0.9])
    found, rounds = rescaled(shares, sizes, 20)
    target = float((shares * sizes).sum())
    assert target * (1 - 1e-9) <= float((found * sizes).sum()) <= target * (1 + 1e-12)
    assert found[0] == 1 - 20 / 1000
    assert found[2] / found[1] == pytest.approx(0.9 / 0.97)  # those that are not clamped keep their ratio
    assert rounds > 3


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 12), st.integers(0, 9))
def test_keep_counts_are_exact(sizes: list[int], sparsity: float, floor: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 5, size).astype(float) for size in sizes]
    prunable = sum(max(size - floor, 0) for size in sizes)
    target = int(np.ceil(sparsity * sum(sizes) - 1e-9))
    if target > prunable:
        with pytest.raises(InputError, match="leaves fewer"):
            keep_counts(scores, sparsity, floor)
        return
    kept = keep_counts(scores, sparsity, floor)
    assert sum(sizes) - sum(kept) == target
    assert all(min(floor, size) <= count <= size for count, size in zip(kept, sizes, strict=True))


def test_units_whose_scores_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"scores\.1"):
        keep_counts([np.ones(3), np.array([1.0, np.nan])], 0.5)


def test_lower_hull() -> None:
    cost = np.array([4.0, 1.0, 2.0, 3.0, np.inf])
    damage = np.array([0.0, 10.0, 9.0, 1.0, -5.0])
    assert lower_hull(cost, damage) == [1, 3, 0]


def test_proportional_counts() -> None:
    assert proportional_counts([1, 2, 3], [100, 100, 100], 60) == [10, 20, 30]
    assert proportional_counts([1, 1, 1], [9, 9, 9], 10) == [4, 3, 3]
    # The third is full at 10; its surplus goes to the others as 1 : 2.
    assert proportional_counts([1, 2, 30], [100, 100, 10], 40) == [10, 20, 10]
    # Above floors of 10 the 30 others go as 1 : 2.
    assert proportional_counts([1, 2], [100, 100], 50, floors=[10, 10]) == [20, 30]
    # ECoFLaP in the small: 50 % of two blocks of 100, none sparser than 60 %.
    assert proportional_counts([1, 1e9], [100, 100], 100, floors=[40, 40]) == [40, 60]
    assert proportional_counts([0, 5, 0], [4, 4, 8], 10) == [2, 4, 4]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 1e9), st.integers(0, 1000), st.floats(0, 1)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_proportional_counts_are_exact(sites: list[tuple[float, int, float]], share: float) -> None:
    scores = [score for score, _, _ in sites]
    caps = [cap for _, cap, _ in sites]
    floors = [int(cap * part) for _, cap, part in sites]
    total = sum(floors) + int(share * (sum(caps) - sum(floors)))
    counts = proportional_counts(scores, caps, total, floors)
    assert sum(counts) == total
    assert all(low <= count <= cap for low, count, cap in zip(floors, counts, caps, strict=True))
    free = [i for i in range(len(sites)) if counts[i] < caps[i]]
    for i in free:
        for j in free:
            if scores[i] < scores[j] or (scores[i] == scores[j] > 0):
                assert counts[i] - floors[i] <= counts[j] - floors[j] + 1


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (([1, 2], [5, 5], 11), "total"),
        (([1, 2], [5, 5], 3, [2, 2]), "total"),
        (([1, 2], [5, 5], 6, [2, 6]), "floors"),
        (([1, float("nan")], [5, 5], 6), "scores"),
        (([1, -2], [5, 5], 6), "scores"),
        (([1, 2, 3], [5, 5], 6), "scores"),
    ],
)
def test_counts_that_cannot_be(arguments: tuple[object, ...], field: str) -> None:
    with pytest.raises(InputError) as caught:
        proportional_counts(*arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_mass_threshold_equals_bisection() -> None:
    rng = np.random.default_rng(3)
    scores = [rng.lognormal(0, spread, 200) for spread in (0.2, 1.0, 2.0, 3.0)]

    def counts(share: float) -> list[int]:
        curves = [np.cumsum(-np.sort(-layer)) / layer.sum() for layer in scores]
        return [int(np.searchsorted(curve, share) + 1) for curve in curves]

    for total in (40, 400, 790):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle)
        assert sum(counts(low)) == total
        assert mass_threshold(scores, total) == counts(low)


def test_mass_threshold_with_floors() -> None:
    spiky, flat = np.array([100.0, 1, 1, 1]), np.ones(4)
    assert mass_threshold([spiky, flat], 5) == [1, 4]
    assert mass_threshold([spiky, flat], 5, floor=2) == [2, 3]
    assert mass_threshold([spiky, flat], 8) == [4, 4]
    with pytest.raises(InputError, match="total: 3 is not from 4 to 8"):
        mass_threshold([spiky, flat], 3, floor=2)
    with pytest.raises(InputError, match=r"scores\.1"):
        mass_threshold([spiky, np.zeros(3)], 3)
