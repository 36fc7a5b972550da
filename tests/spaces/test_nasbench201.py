"""NAS-Bench-201's cells: how many there are, what they cost, and that equal keys mean equal functions."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from archfront.errors import InputError
from archfront.evaluators.costs import count
from archfront.spaces.nasbench201 import NasBench201
from archfront.spaces.registry import SPACES

EVERY = np.stack(np.meshgrid(*[np.arange(5)] * 6, indexing="ij"), axis=-1).reshape(-1, 6).astype(np.int16)
EXACT, SPACE = NasBench201(prune=False), NasBench201()
BEST = ["nor_conv_3x3", "nor_conv_3x3", "nor_conv_3x3", "skip_connect", "nor_conv_3x3", "nor_conv_1x1"]


def test_there_are_15625_strings_and_6466_functions() -> None:
    assert EXACT.size == len(EVERY) == 15625
    assert len(set(EXACT.keys(EVERY))) == 15625
    assert len(set(SPACE.keys(EVERY))) == 6466


def test_parameters_and_multiply_adds_are_the_published_ones() -> None:
    params, macs = EXACT.costs(EVERY)
    convs3, convs1 = (EVERY == 3).sum(axis=1), (EVERY == 2).sum(axis=1)
    assert (params == 73_306 + 243_040 * convs3 + 28_000 * convs1).all()
    # Multiply-adds of convolutions and the classifier, in the document's figures (M).
    assert np.allclose(macs / 1e6, 7.78304 + 35.38944 * convs3 + 3.93216 * convs1, atol=1e-5)
    assert NasBench201(prune=False, classes=100).costs(EVERY[:1])[0][0] == 79_156


@pytest.mark.parametrize(
    "space", [EXACT, SPACE, NasBench201(channels=8, cells=2, stages=2, resolution=9, in_channels=1)]
)
def test_the_closed_form_is_what_the_counter_finds(space: NasBench201) -> None:
    for row in EVERY[:: len(EVERY) // 12]:
        [genotype] = space.to_json(row[None])
        with torch.device("meta"):
            model = space.build(genotype)
        found = count(model, (space.in_channels, space.resolution, space.resolution))
        params, macs = space.costs(row[None])
        assert (found.params, found.macs) == (params[0], macs[0])


def test_equal_keys_compute_the_same_and_the_representative_is_the_cheapest() -> None:
    canonical = SPACE.canonical(EVERY)
    assert np.array_equal(SPACE.canonical(canonical), canonical)
    assert (SPACE.costs(EVERY)[0] <= EXACT.costs(EVERY)[0]).all()
    # Node 1 leads nowhere, so whatever stands on its edge does not matter.
    dead = [[op, "skip_connect", "none", "nor_conv_1x1", "none", "nor_conv_3x3"] for op in ("none", "nor_conv_3x3")]
    keys = SPACE.keys(SPACE.from_json(dead))
    assert keys[0] == keys[1]
    torch.manual_seed(0)
    first = SPACE.build(dead[0]).eval()
    torch.manual_seed(0)
    second = SPACE.build(dead[1]).eval()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(image), second(image))


def test_a_cell_of_nothing_is_zero_and_still_trains() -> None:
    model = SPACE.build(["none"] * 6)
    loss = model(torch.randn(4, 3, 32, 32)).square().sum()
    loss.backward()
    assert model.classifier.weight.grad is not None


def test_every_kind_of_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"space\.stages"):
        NasBench201(stages=7)
    with pytest.raises(InputError, match=r"space\.cells"):
        NasBench201(cells=0)
    with pytest.raises(InputError, match="nor_conv_3x3"):
        SPACE.from_json([["nor_conv_3x33", *BEST[1:]]])
    assert SPACES.build({"name": "nasbench201", "channels": 8}, "space").config["channels"] == 8


def test_our_keys_are_the_published_classes() -> None:
    root = os.environ.get("ARCHFRONT_DATA")
    if not root:
        pytest.skip("needs nasbench201/nb201_accuracy.parquet: set ARCHFRONT_DATA")
    table = pd.read_parquet(Path(root) / "nasbench201" / "nb201_accuracy.parquet")
    rows = table[[f"op_{i}_{j}" for i, j in ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))]].to_numpy(np.int16)
    keys = pd.Series(SPACE.keys(rows))
    assert keys.groupby(table["rep_arch_idx"]).nunique().max() == 1
    assert table["rep_arch_idx"].groupby(keys).nunique().max() == 1
    params = EXACT.costs(rows)[0] / 1e6
    assert np.allclose(params, table["c10_params_M"], atol=1e-3)
    assert SPACE.to_json(rows[[table["c10_test_200"].idxmax()]]) == [BEST]
