"""Quantisers against a search for the nearest code, straight-through gradients, and calibrated activations."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.policies.quantiser import ActivationQuantiser, Granularity, Quantiser

GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group")


def weight(*shape: int, seed: int = 0, shift: float = 0.1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


def parts(quantiser: Quantiser, values: Tensor) -> list[Tensor]:
    """The weights that share a scale, in the order of the scales."""
    if quantiser.granularity == "tensor":
        return [values.flatten()]
    rows = list(values.flatten(1))
    return (
        rows if quantiser.granularity == "channel" else [p for row in rows for p in torch.split(row, quantiser.group)]
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_scales_and_codes_are_those_of_the_formulas(bits: int, symmetric: bool, granularity: Granularity) -> None:
    quantiser = Quantiser(bits, symmetric, granularity, group=7)
    values = weight(5, 3, 2, 3)
    parameters = quantiser.parameters(values)
    assert parameters.scale.shape == {"tensor": (1, 1), "channel": (5, 1), "group": (5, 3)}[granularity]
    scales, zeros = parameters.scale.flatten().double(), parameters.zero_point.flatten()
    fake = quantiser.fake(values)
    for scale, zero, part, rounded in zip(scales, zeros, parts(quantiser, values), parts(quantiser, fake), strict=True):
        given = part.double().numpy()
        if symmetric:
            assert math.isclose(scale, 2 * np.abs(given).max() / (2**bits - 1), rel_tol=1e-6)
            codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
            assert zero == 0
        else:
            assert math.isclose(scale, (max(given.max(), 0) - min(given.min(), 0)) / (2**bits - 1), rel_tol=1e-6)
            codes = np.arange(2**bits)
            assert abs(float(zero) + min(given.min(), 0) / float(scale)) <= 0.5 + 1e-5
        levels = (codes - int(zero)) * float(scale)
        nearest = np.abs(given[:, None] - levels).min(1)
        assert np.allclose(np.abs(rounded.double().numpy() - given), nearest, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=24),
    rows=st.integers(1, 3),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    group=st.integers(1, 30),
    ranges=st.sampled_from(["minmax", "mse"]),
    half=st.booleans(),
)
def test_codes_stay_in_range_with_an_exact_zero(
    values: list[float],
    rows: int,
    bits: int,
    symmetric: bool,
    granularity: Granularity,
    group: int,
    ranges: Any,
    half: bool,
) -> None:
    quantiser = Quantiser(bits, symmetric, granularity, group, ranges, "float16" if half else "float32")
    whole = torch.tensor([values[i:] + values[:i] for i in range(rows)])
    if half:
        # Scales above float16's largest are refused.
        whole = whole / 20
    parameters = quantiser.parameters(whole)
    codes = quantiser.codes(whole, parameters)
    assert quantiser.low <= int(codes.min())
    assert int(codes.max()) <= quantiser.high
    assert bool((parameters.scale > 0).all())
    assert int(parameters.zero_point.min()) >= quantiser.low
    assert int(parameters.zero_point.max()) <= quantiser.high
    zero = torch.zeros_like(whole)
    assert torch.equal(quantiser.dequantise(quantiser.codes(zero, parameters), parameters), zero)
    scale, zero_point = (quantiser.spread(p, whole.shape) for p in (parameters.scale, parameters.zero_point))
    least, most = (quantiser.low - zero_point) * scale, (quantiser.high - zero_point) * scale
    error = (quantiser.dequantise(codes, parameters) - whole).abs()
    inside = (whole >= least) & (whole <= most)
    assert bool((error <= scale * 0.5001)[inside].all())
    if ranges == "minmax" and not half:
        assert bool((error <= scale * 0.5001).all())
    # Values that are on the grid stay where they are.
    on_grid = quantiser.dequantise(codes, parameters)
    assert torch.equal(quantiser.codes(on_grid, parameters), codes)


def test_a_group_of_a_whole_row_is_a_channel_and_the_last_may_be_shorter() -> None:
    values = weight(4, 10)
    assert torch.equal(Quantiser(3, False, "group", 10).fake(values), Quantiser(3, False).fake(values))
    assert torch.equal(Quantiser(3, False, "group", 99).fake(values), Quantiser(3, False).fake(values))
    grouped = Quantiser(3, False, "group", 4, "mse")
    by_hand = torch.cat([Quantiser(3, False, ranges="mse").fake(part) for part in torch.split(values, 4, dim=1)], 1)
    assert torch.equal(grouped.fake(values), by_hand)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_and_searched_ranges_lower_the_error(symmetric: bool, granularity: Granularity) -> None:
    values = weight(8, 96) * weight(8, 96).abs().sqrt()
    before = math.inf
    for bits in range(2, 9):
        errors = [
            float((Quantiser(bits, symmetric, granularity, 32, ranges).fake(values) - values).square().mean())
            for ranges in ("minmax", "mse")
        ]
        assert errors[0] < before
        assert errors[1] <= errors[0]
        before = errors[0]
        if bits <= 3:
            # Such weights have longer tails than normal ones.
            assert errors[1] < 0.95 * errors[0]


def test_a_searched_range_is_no_worse_wherever_a_scale_is_shared() -> None:
    for seed in range(5):
        values = weight(6, 50, seed=seed)
        errors = [
            (Quantiser(3, False, "group", 16, ranges).fake(values) - values).square() for ranges in ("minmax", "mse")
        ]
        for some, others in zip(*(torch.split(e, 16, 1) for e in errors), strict=True):
            assert bool((others.double().sum(1) <= some.double().sum(1)).all())


def test_float16_scales_are_stored_without_loss() -> None:
    values = weight(6, 20)
    scale = Quantiser(4, scale_type="float16").parameters(values).scale
    assert scale.dtype == torch.float32
    assert torch.equal(scale.half().float(), scale)
    assert not torch.equal(scale, Quantiser(4).parameters(values).scale)
    with pytest.raises(InputError, match="float16"):
        Quantiser(2, scale_type="float16").parameters(values * 1e6)
    tiny = Quantiser(4, scale_type="float16").parameters(values * 1e-12)
    assert torch.equal(tiny.scale, torch.full((6, 1), 2.0**-24))
    assert torch.isfinite(Quantiser(4).fake(values * 1e-44)).all()


def test_types_and_shapes_are_kept() -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        values = weight(4, 3, 2, 2).to(kind)
        assert Quantiser(4).fake(values).dtype == kind
        assert Quantiser(4).fake(values).shape == values.shape
    assert Quantiser(8).parameters(weight(4, 3).double()).scale.dtype == torch.float64
    assert torch.equal(Quantiser(4).fake(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_gradients_go_straight_through_but_not_where_a_weight_is_clipped() -> None:
    values = weight(3, 2000)
    values[0, 5], values[1, 6] = 7.0, -7.0
    values.requires_grad_()
    quantiser = Quantiser(4, ranges="mse")
    out = quantiser.straight_through(values)
    assert torch.equal(out, quantiser.fake(values))
    upstream = weight(3, 2000, seed=1)
    out.backward(upstream)  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad[0, 5] == values.grad[1, 6] == 0
    scale = quantiser.parameters(values).scale
    outside = (values / scale > quantiser.high + 0.5) | (values / scale < quantiser.low - 0.5)
    assert torch.equal(values.grad, upstream.masked_fill(outside, 0))
    assert 2 <= int(outside.sum()) < 60


@pytest.mark.parametrize(
    "settings_of",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.0},
        {"bits": True},
        {"bits": 4, "granularity": "row"},
        {"bits": 4, "ranges": "kl"},
        {"bits": 4, "group": 0},
        {"bits": 4, "scale_type": "float8"},
    ],
)
def test_wrong_settings_are_refused(settings_of: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^quantiser\."):
        Quantiser(**settings_of)


@pytest.mark.parametrize("values", [torch.zeros(0, 3), torch.zeros(()), torch.tensor([[math.nan]])])
def test_wrong_weights_are_refused(values: Tensor) -> None:
    with pytest.raises(InputError, match=r"^quantiser\.values"):
        Quantiser(4).parameters(values)


def calibrated(batches: list[Tensor], bits: int = 4, **settings_of: Any) -> ActivationQuantiser:
    quantiser = ActivationQuantiser(bits, **settings_of)
    for batch in batches:
        assert quantiser(batch) is batch
    quantiser.freeze()
    return quantiser


def test_activations_have_the_range_of_all_batches() -> None:
    batches = [weight(6, 3, 4, 4, seed=seed, shift=0.5) for seed in range(3)]
    whole = torch.cat(batches)
    got = calibrated(batches, 5)
    assert torch.allclose(got.scale, (whole.max() - whole.min()) / 31)
    assert torch.equal(got.zero_point.float(), torch.round(-whole.min() / got.scale))
    by_channel = calibrated(batches, 5, channel_axis=1)
    assert by_channel.scale.shape == (3,)
    for c in range(3):
        alone = calibrated([batch[:, c] for batch in batches], 5)
        assert torch.equal(by_channel(whole)[:, c], alone(whole[:, c]))
    symmetric = calibrated(batches, 5, symmetric=True)
    assert torch.allclose(symmetric.scale, whole.abs().max() * 2 / 31)
    assert int(symmetric.zero_point) == 0


def test_percentiles_are_those_of_the_values() -> None:
    batches = [weight(5, 100, seed=seed, shift=0.0) for seed in range(4)]
    values = np.concatenate([b.flatten().numpy() for b in batches])
    got = calibrated(batches, 8, ranges="percentile", percentile=99.0)
    high = np.percentile(values, 99.0, method="higher")
    low = np.percentile(values, 1.0, method="lower")
    assert math.isclose(float(got.scale), (high - low) / 255, rel_tol=1e-5)
    everything = calibrated(batches, 8, ranges="percentile", percentile=100.0)
    assert torch.equal(everything.scale, calibrated(batches, 8).scale)


def test_searched_ranges_of_activations_lower_the_error() -> None:
    batches = [weight(8, 64, seed=seed).relu().pow(3) for seed in range(3)]
    whole = torch.cat(batches)
    plain, searched = (calibrated(batches, 3, ranges=ranges) for ranges in ("minmax", "mse"))
    assert (searched(whole) - whole).square().mean() < 0.8 * (plain(whole) - whole).square().mean()
    by_channel = calibrated(batches, 3, ranges="mse", channel_axis=-1)
    assert (by_channel(whole) - whole).square().mean() < (searched(whole) - whole).square().mean()


def test_kept_values_are_a_bounded_uniform_sample_that_can_be_repeated() -> None:
    batches = [torch.full((1, 500), float(i)) for i in range(10)]
    first, again = (ActivationQuantiser(4, ranges="percentile", samples=1000) for _ in range(2))
    for quantiser in (first, again):
        for batch in batches:
            quantiser.observe(batch)
    assert first._kept is not None
    assert again._kept is not None
    assert torch.equal(first._kept[0], again._kept[0])
    assert first._kept[0].shape == (1, 1000)
    counts = first._kept[0].long().flatten().bincount(minlength=10)
    # Places in a batch are drawn anew for each: no batch keeps the same ones.
    assert len(set(counts.tolist())) > 1
    assert int(counts.min()) > 60
    assert int(counts.max()) < 140


def test_activation_gradients_stop_at_the_range() -> None:
    quantiser = calibrated([torch.tensor([-1.0, 3.0])], 4)
    values = torch.tensor([-2.0, -0.9, 0.0, 1.3, 2.9, 3.5], requires_grad=True)
    out = quantiser(values)
    out.backward(torch.arange(1.0, 7.0))
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 0]
    scale = float(quantiser.scale)
    assert out.tolist() == pytest.approx([-4 * scale, -3 * scale, 0, 5 * scale, 11 * scale, 11 * scale])


def test_a_frozen_state_loads_into_a_new_observer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), calibrated([weight(9, 4)], 3, channel_axis=1))
    other = nn.Sequential(nn.Linear(4, 4), ActivationQuantiser(3, channel_axis=1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(weight(5, 4, seed=2)), model(weight(5, 4, seed=2)))
    assert torch.equal(copy.deepcopy(model)(weight(5, 4, seed=2)), model(weight(5, 4, seed=2)))


def test_wrong_activations_and_settings_are_refused() -> None:
    with pytest.raises(InputError, match="calibration"):
        ActivationQuantiser(4).freeze()
    with pytest.raises(InputError, match="channel_axis"):
        ActivationQuantiser(4, channel_axis=2).observe(torch.ones(2, 2))
    with pytest.raises(InputError, match="percentile"):
        ActivationQuantiser(4, percentile=50)
    with pytest.raises(InputError, match="samples"):
        ActivationQuantiser(4, samples=0)
    with pytest.raises(InputError, match="ranges"):
        ActivationQuantiser(4, ranges="max")  # type: ignore[arg-type]
    other = ActivationQuantiser(4, channel_axis=1)
    other.observe(torch.ones(2, 3))
    with pytest.raises(InputError, match="channels"):
        other.observe(torch.ones(2, 4))
