from __future__ import annotations

import numpy as np
import pytest

from archfront.errors import InputError
from archfront.spaces.choices import Choices
from archfront.spaces.registry import SPACES


def test_numbers_in_rising_order_are_ordered() -> None:
    space = Choices(columns={"a": [1, 2.5, 4], "b": ["x", "y"], "c": [3, 1], "d": [8]})
    assert [column.ordered for column in space.columns] == [True, False, False, True]
    assert space.encode(space.from_json([[2.5, "y", 1, 8]])).tolist() == [[0.5, 0, 1, 0, 1, 0]]
    assert space.size == 12


def test_round_trip_and_rebuild() -> None:
    space = Choices(columns={"b": ["x", "y"], "a": [1, 2]})
    population = space.sample(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(space.from_json(space.to_json(population)), population)
    again = SPACES.build({"name": "choices", **space.config}, "space")
    assert again.digest == space.digest
    # Genotypes are positional, so another order of the decisions is another space.
    assert Choices(columns={"a": [1, 2], "b": ["x", "y"]}).digest != space.digest


def test_it_has_no_module_and_lists_its_decisions() -> None:
    space = Choices(columns={"a": [1, 2], "b": ["x"]})
    assert [(row.name, row.kind) for row in space.describe([2, "x"])] == [("a", "a 2"), ("b", "b x")]
    with pytest.raises(InputError, match="no torch module"):
        space.build([1, "x"])


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({}, r"space\.columns"),
        ({"a": []}, r"space\.a"),
        ({"a": [1, 1]}, r"space\.columns\.a"),
        ({"a": 3}, r"columns\.a"),
    ],
)
def test_bad_columns_are_named(columns: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        SPACES.build({"name": "choices", "columns": columns}, "space")
