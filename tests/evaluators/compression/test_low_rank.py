"""Low-rank corrections are the best of their rank, and cost what they cost."""

import pytest
import torch

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.low_rank import (
    correction_bytes,
    low_rank_correction,
    quantised_factors,
)
from archfront.spaces.policies.low_bit import LowBitConv2d, LowBitLinear
from archfront.spaces.policies.quantiser import Quantiser


@pytest.mark.parametrize("rank", [0, 1, 5, 18])
def test_what_remains_are_the_smaller_singular_values(rank: int) -> None:
    weight = torch.randn(24, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    quantised = Quantiser(2).fake(weight)
    left, right = low_rank_correction(weight, quantised, rank)
    assert left.shape == (24, rank)
    assert right.shape == (rank, 18)
    error = (weight - quantised).flatten(1)
    remaining = (error - left @ right).double().square().sum()
    singular = torch.linalg.svdvals(error.double())
    assert float(remaining) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-5, abs=1e-5)
    # The square root of each singular value is on either side.
    torch.testing.assert_close(left.norm(dim=0).double(), singular[:rank].sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right.norm(dim=1).double(), singular[:rank].sqrt(), rtol=1e-4, atol=1e-5)


def test_quantised_factors_still_correct() -> None:
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(1))
    quantised = Quantiser(2).fake(weight)
    factors = low_rank_correction(weight, quantised, 4)
    errors = [
        float((weight - quantised - left @ right).norm())
        for left, right in (factors, *(quantised_factors(*factors, Quantiser(bits)) for bits in (8, 4)))
    ]
    assert errors[0] < errors[1] < errors[2] < float((weight - quantised).norm())
    assert errors[1] < 1.001 * errors[0]
    module = torch.nn.Linear(40, 32, bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    layer = LowBitLinear.from_float(module, Quantiser(2), correction=factors, factor_quantiser=Quantiser(4))
    left, right = quantised_factors(*factors, Quantiser(4))
    assert torch.equal(layer.dequantised(), quantised + left @ right)


@pytest.mark.parametrize("quantiser", [None, Quantiser(8), Quantiser(5, False, scale_type="float16")])
def test_bytes_are_those_of_the_layer(quantiser: Quantiser | None) -> None:
    module, weights = torch.nn.Conv2d(3, 10, 3), Quantiser(3)
    correction = low_rank_correction(module.weight, weights.fake(module.weight), 4)
    layer = LowBitConv2d.from_float(module, weights, correction=correction, factor_quantiser=quantiser)
    plain = LowBitConv2d.from_float(module, weights)
    assert layer.size_bytes() - plain.size_bytes() == correction_bytes(module.weight.shape, 4, quantiser)
    assert correction_bytes(module.weight.shape, 0, quantiser) == 0
    assert correction_bytes((10, 3, 3, 3), 4) == 2 * 4 * (10 + 27)


def test_wrong_ranks_and_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="Give 0 to 3"):
        low_rank_correction(torch.ones(3, 4), torch.ones(3, 4), 4)
    with pytest.raises(InputError, match="shape"):
        low_rank_correction(torch.ones(3, 4), torch.ones(4, 3), 1)
