"""The contract of a space, for every space of the table."""

import numpy as np
import pytest
from tests.support.space_contract import check_models, check_space

from archfront.spaces.registry import BUILT_IN, SPACES

CONDITIONAL: dict[str, object] = {
    "name": "choices",
    "columns": {"use_se": [False, True], "se_ratio": [4, 8], "depth": [1, 2, 3], "width3": [16, 32]},
    "when": {"se_ratio": {"use_se": [True]}, "width3": {"depth": [3]}},
}
CONFIGS: list[dict[str, object]] = [
    {"name": "fbnet"},
    {"name": "fbnet-tiny"},
    {"name": "nasbench201"},
    {"name": "nasbench201", "prune": False},
    {"name": "nasnet"},
    {"name": "nasnet", "operations": "darts_none", "blocks": 3, "combine": {"normal": [0, 3], "reduction": [4]}},
    {"name": "scaled"},
    {"name": "scaled", "family": "timm:regnetz_005", "rule": "dwr", "widths": [0.75, 1.0, 1.05]},
    {"name": "evonorm"},
    {"name": "skan", "widths": [16, 16]},
    {"name": "einspace"},
    {"name": "einspace", "resolution": 8, "in_channels": 1, "params": 20_000, "terminals": 40},
    {"name": "tabular"},
    {"name": "bits", "model": {"name": "cifar-resnet", "depth": 8}, "keep": {"conv1": 8}, "activations": [4, 8, 32]},
    {"name": "depth-bits", "groups": 3},
    {"name": "choices", "columns": {"bits": [2, 4, 8], "kind": ["a", "b"]}},
    CONDITIONAL,
    {"name": "joint", "parts": {"network": {"name": "fbnet-tiny"}, "training": CONDITIONAL}},
    {
        "name": "joint",
        "parts": {"network": {"name": "tabular"}, "training": CONDITIONAL, "norm": {"name": "evonorm"}},
        "when": {"norm": {"training.se_ratio": [8]}},
    },
    {
        "name": "joint",
        "parts": {"network": {"name": "skan"}, "training": CONDITIONAL, "norm": {"name": "evonorm"}},
        "when": {"norm": {"training.se_ratio": [8]}},
    },
    {"name": "bounded", "of": {"name": "fbnet-tiny"}, "macs": [2.0e6, 2.2e6], "params": [None, 1.5e5]},
    {"name": "bounded", "of": {"name": "nasbench201"}, "params": [3.0e5, 5.0e5]},
    {"name": "bounded", "of": {"name": "tabular"}, "params": [1000, 5000]},
]
BUILT: list[dict[str, object]] = [
    {"name": "fbnet-tiny"},
    {"name": "nasbench201", "channels": 4, "cells": 1},
    {"name": "nasnet", "filters": 4, "cells": 1, "stages": 2, "resolution": 16},
    {"name": "scaled", "family": "timm:mobilenetv3_small_050", "resolutions": [32, 48], "classes": 9, "resolution": 48},
    {"name": "evonorm", "width": 4, "resolution": 8},
    {"name": "evonorm", "anchor": "efficientnet", "width": 4, "resolution": 8},
    {"name": "skan", "resolution": 8, "widths": [8]},
    {"name": "skan", "kind": "conv", "resolution": 8, "widths": [4, 4]},
    {"name": "einspace", "resolution": 8, "in_channels": 1, "params": 20_000, "terminals": 40},
    {"name": "tabular"},
    {"name": "joint", "parts": {"training": CONDITIONAL, "network": {"name": "skan", "resolution": 8, "widths": [8]}}},
    {"name": "joint", "parts": {"network": {"name": "fbnet-tiny", "layers": 4}, "bits": {"name": "depth-bits"}}},
    {"name": "bounded", "of": {"name": "fbnet-tiny", "layers": 4}, "macs": [None, 3.0e5]},
]
NOT_SEARCHED = {"recorded"}


def test_every_space_of_the_table_is_checked() -> None:
    assert {str(config["name"]) for config in CONFIGS} | NOT_SEARCHED == set(BUILT_IN)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_contract(config: dict[str, object]) -> None:
    check_space(SPACES.build(config, "space"))


@pytest.mark.parametrize("config", BUILT, ids=str)
def test_models_run_and_train(config: dict[str, object]) -> None:
    space = SPACES.build(config, "space")
    check_models(space, space.sample_spread(np.random.default_rng(0), 4))
