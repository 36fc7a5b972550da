"""The contract of a space, for every space of the table."""

import numpy as np
import pytest
from tests.support.space_contract import check_models, check_space

from archfront.spaces.registry import SPACES

CONFIGS: list[dict[str, object]] = [
    {"name": "fbnet"},
    {"name": "fbnet-tiny"},
    {"name": "nasbench201"},
    {"name": "nasbench201", "prune": False},
    {"name": "choices", "columns": {"bits": [2, 4, 8], "kind": ["a", "b"]}},
]
BUILT: list[dict[str, object]] = [{"name": "fbnet-tiny"}, {"name": "nasbench201", "channels": 4, "cells": 1}]
NOT_SEARCHED = {"recorded"}


def test_every_space_of_the_table_is_checked() -> None:
    assert {str(config["name"]) for config in CONFIGS} | NOT_SEARCHED == set(SPACES.names())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_contract(config: dict[str, object]) -> None:
    check_space(SPACES.build(config, "space"))


@pytest.mark.parametrize("config", BUILT, ids=str)
def test_models_run_and_train(config: dict[str, object]) -> None:
    space = SPACES.build(config, "space")
    check_models(space, space.sample_spread(np.random.default_rng(0), 4))
