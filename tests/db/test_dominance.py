"""Dominance against brute force, with ties and duplicates; hypervolumes that are known."""

from __future__ import annotations

import itertools

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from archfront.db.dominance import Points, crowding_distance, hypervolume, nondominated, nondominated_ranks

# Few values, so that ties and duplicates are the rule.
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0])


def matrices(values: st.SearchStrategy[float], rows: int, objectives: int) -> st.SearchStrategy[Points]:
    shapes = st.tuples(st.integers(0, rows), st.integers(1, objectives))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


POINTS = matrices(VALUES, 12, 4)
WITH_INFINITIES = matrices(st.one_of(VALUES, st.sampled_from([-np.inf, np.inf])), 12, 4)
CELLS = matrices(st.integers(0, 4).map(float), 8, 3)


def dominates(first: Points, second: Points) -> bool:
    return bool((first <= second).all() and (first < second).any())


def brute_front(points: Points) -> list[bool]:
    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("kind", ["uniform", "ties", "sphere", "infinite", "alike"])
@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_a_large_set_is_thinned_out_without_loss(objectives: int, kind: str) -> None:
    rng = np.random.default_rng(objectives)
    points = rng.random((40_000, objectives))
    if kind == "ties":
        points = np.round(points * 30)
    elif kind == "sphere":
        points = -np.abs(points - 1) / np.linalg.norm(points - 1, axis=1, keepdims=True)
    elif kind == "infinite":
        points[rng.random(points.shape) < 0.1] = -np.inf
    elif kind == "alike":
        points[:] = points[0]
    # Dense ranks keep the order, and are finite.
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in points.T], axis=1).astype(np.float64)
    expected = np.asarray(moocore.is_nondominated(ranks, keep_weakly=True), dtype=bool)
    assert np.array_equal(nondominated(points), expected)


def test_a_very_large_set_is_dealt_out_without_loss() -> None:
    rng = np.random.default_rng(0)
    points = np.round(rng.dirichlet(np.ones(3), 250_000) * 500) / 500
    assert np.array_equal(nondominated(points), moocore.is_nondominated(points, keep_weakly=True))


@given(POINTS)
@settings(max_examples=150, deadline=None)
def test_nondominated_is_brute_force(points: Points) -> None:
    assert nondominated(points).tolist() == brute_front(points)


def peeled(points: Points) -> list[int]:
    expected = np.full(len(points), -1)
    rank = 0
    while (left := np.flatnonzero(expected < 0)).size:
        expected[left[brute_front(points[left])]] = rank
        rank += 1
    return [int(r) for r in expected]


@given(POINTS)
@settings(max_examples=150, deadline=None)
def test_ranks_are_fronts_peeled_off(points: Points) -> None:
    assert nondominated_ranks(points).tolist() == peeled(points)


@given(WITH_INFINITIES)
@settings(max_examples=150, deadline=None)
def test_infinities_are_ordered_like_numbers(points: Points) -> None:
    assert nondominated(points).tolist() == brute_front(points)
    assert nondominated_ranks(points).tolist() == peeled(points)


@given(CELLS)
@settings(max_examples=150, deadline=None)
def test_hypervolume_counts_unit_cells(points: Points) -> None:
    """On integer points below an integer reference the volume is a number of unit cells."""
    objectives = points.shape[1]
    cells = itertools.product(range(4), repeat=objectives)
    dominated = sum(any((point <= cell).all() for point in points) for cell in map(np.array, cells))
    # A coordinate of 4 does not lie below the reference; such a point adds nothing.
    assert hypervolume(points, [4.0] * objectives) == pytest.approx(dominated)


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([(1, 3), (2, 2), (3, 1)], (4, 4), 6),
        ([(1, 2, 3), (2, 3, 1), (3, 1, 2)], (4, 4, 4), 13),
        ([(1, 1), (1, 1)], (2, 3), 2),
        ([(5, 1)], (4, 4), 0),
        ([(4, 1)], (4, 4), 0),
        ([(3,), (1,)], (4,), 3),
    ],
)
def test_known_hypervolumes(points: list[tuple[float, ...]], reference: tuple[float, ...], volume: float) -> None:
    assert hypervolume(np.array(points, dtype=np.float64), reference) == pytest.approx(volume)


def test_nothing_has_no_volume_and_no_front() -> None:
    empty = np.empty((0, 2))
    assert hypervolume(empty, (1, 1)) == 0
    assert nondominated(empty).tolist() == []
    assert nondominated_ranks(empty).tolist() == []
    assert crowding_distance(empty).tolist() == []


def test_crowding_by_hand() -> None:
    front = np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [2.0, 1.0]])
    # Sums of the neighbours' gaps over extents of 4: (2 - 0 + 4 - 1) / 4, (4 - 1 + 2 - 0) / 4.
    assert crowding_distance(front).tolist() == [np.inf, 1.25, np.inf, 1.25]


def test_crowding_of_equal_points_is_not_a_number_never() -> None:
    distance = crowding_distance(np.ones((5, 2)))
    assert not np.isnan(distance).any()
    assert np.isinf(distance).sum() == 2
