"""Low-bit layers equal fake-quantised ones to the bit, survive their state dict, and are as large as computed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.policies.low_bit import LowBitConv2d, LowBitLinear, PackedTensor
from archfront.spaces.policies.packing import quantised_bytes
from archfront.spaces.policies.quantiser import BITS, Quantiser

QUANTISERS = [Quantiser(bits, symmetric) for bits in BITS for symmetric in (True, False)] + [
    Quantiser(3, True, "tensor"),
    Quantiser(3, False, "group", 5),
    Quantiser(4, False, "group", 8, "mse", "float16"),
]
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "padding": "same", "dilation": 2},
    {"padding": (2, 1), "padding_mode": "circular"},
    {"kernel_size": (1, 1)},
]


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(seed))


def convolution(**settings: Any) -> nn.Conv2d:
    torch.manual_seed(1)
    kernel_size = settings.pop("kernel_size", (3, 3))
    return nn.Conv2d(4, 6, kernel_size, **settings)


def faked(module: nn.Module, weight: Tensor) -> nn.Module:
    fake = copy.deepcopy(module)
    with torch.no_grad():
        fake.get_parameter("weight").copy_(weight)
    return fake


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=str)
def test_a_linear_layer_is_the_fake_quantised_one(quantiser: Quantiser) -> None:
    torch.manual_seed(0)
    module, inputs = nn.Linear(12, 7, bias=quantiser.symmetric), torch.randn(2, 5, 12)
    layer = LowBitLinear.from_float(module, quantiser)
    expected = faked(module, quantiser.fake(module.weight))(inputs)
    assert torch.equal(layer(inputs), expected)
    assert list(layer.parameters()) == []
    other = LowBitLinear(12, 7, quantiser, bias=quantiser.symmetric)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs), expected)
    assert layer.weight_codes.size_bytes() == quantised_bytes(module.weight.shape, quantiser)
    assert layer.size_bytes() == layer.weight_codes.size_bytes() + (7 * 4 if quantiser.symmetric else 0)


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_the_fake_quantised_one(settings: dict[str, Any], channels_last: bool) -> None:
    quantiser = Quantiser(3, False)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    module, inputs = convolution(**settings), images().contiguous(memory_format=memory)
    module = module.to(memory_format=memory)  # type: ignore[call-overload]
    layer = LowBitConv2d.from_float(module, quantiser)
    expected = faked(module, quantiser.fake(module.weight))(inputs)
    assert torch.equal(layer(inputs), expected)
    again = LowBitConv2d.from_float(convolution(**settings | {"groups": module.groups}), quantiser)
    again.weight_codes.packed.zero_()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantised(), layer.dequantised())
    assert torch.equal(copy.deepcopy(layer)(inputs), expected)


def test_codes_of_another_method_are_taken() -> None:
    module, quantiser = convolution(), Quantiser(4)
    parameters = quantiser.parameters(module.weight)
    codes = (quantiser.codes(module.weight, parameters) + 1).clamp(max=7)
    layer = LowBitConv2d.from_float(module, quantiser, codes=codes, parameters=parameters)
    assert torch.equal(layer.weight_codes.codes(), codes)
    assert torch.equal(layer(images()), faked(module, quantiser.dequantise(codes, parameters))(images()))


@pytest.mark.parametrize("factor_quantiser", [None, Quantiser(8), Quantiser(6, False)], ids=str)
def test_a_correction_is_added_to_the_weight(factor_quantiser: Quantiser | None) -> None:
    module, quantiser = convolution(), Quantiser(2)
    fake = quantiser.fake(module.weight)
    u, s, vh = torch.linalg.svd((module.weight - fake).detach().flatten(1), full_matrices=False)
    left, right = u[:, :2] * s[:2].sqrt(), s[:2].sqrt()[:, None] * vh[:2]
    layer = LowBitConv2d.from_float(module, quantiser, correction=(left, right), factor_quantiser=factor_quantiser)
    if factor_quantiser is None:
        left, right, size = left.half().float(), right.half().float(), 2 * 2 * (6 + 36)
    else:
        # In memory as the layer has it: the order of a product's sums depends on that.
        left, right = factor_quantiser.fake(left.T.contiguous()).T, factor_quantiser.fake(right.contiguous())
        size = quantised_bytes((2, 6), factor_quantiser) + quantised_bytes((2, 36), factor_quantiser)
    expected = faked(module, fake + (left @ right).reshape(fake.shape))(images())
    assert torch.equal(layer(images()), expected)
    plain = LowBitConv2d.from_float(module, quantiser)
    assert layer.size_bytes() == plain.size_bytes() + size
    float_out = module(images())
    assert (layer(images()) - float_out).square().mean() < 0.9 * (plain(images()) - float_out).square().mean()
    other = LowBitConv2d(4, 6, (3, 3), quantiser, rank=2, factor_quantiser=factor_quantiser)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(images()), expected)


def test_a_correction_of_rank_0_is_none() -> None:
    module = nn.Linear(5, 4)
    correction = (torch.zeros(4, 0), torch.zeros(0, 5))
    layer = LowBitLinear.from_float(module, Quantiser(4), correction=correction)
    assert layer.state_dict().keys() == LowBitLinear.from_float(module, Quantiser(4)).state_dict().keys()


def test_hooks_before_a_layer_go_with_it() -> None:
    module = convolution()
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0][..., ::2, ::2],))
    layer = LowBitConv2d.from_float(module, Quantiser(8))
    assert layer(images()).shape == module(images()).shape


def test_a_state_of_another_layout_is_refused() -> None:
    state = LowBitLinear.from_float(nn.Linear(12, 7), Quantiser(4)).state_dict()
    for other in (Quantiser(4, False), Quantiser(3), Quantiser(4, granularity="group")):
        with pytest.raises(InputError, match="layout"):
            LowBitLinear(12, 7, other).load_state_dict(state)


def test_what_does_not_belong_together_is_refused() -> None:
    module, quantiser = nn.Linear(12, 7), Quantiser(4)
    parameters = quantiser.parameters(module.weight)
    codes = quantiser.codes(module.weight, parameters)
    with pytest.raises(InputError, match="parameters"):
        LowBitLinear.from_float(module, quantiser, codes=codes)
    with pytest.raises(InputError, match="shapes"):
        LowBitLinear.from_float(module, quantiser, codes=codes[:, 1:], parameters=parameters)
    with pytest.raises(InputError, match="scale_type"):
        LowBitLinear.from_float(module, Quantiser(4, scale_type="float16"), codes=codes, parameters=parameters)
    with pytest.raises(InputError, match="do not fit 3 bits"):
        PackedTensor((7, 12), Quantiser(3)).store(codes, parameters)
    with pytest.raises(InputError, match="correction"):
        LowBitLinear.from_float(module, quantiser, correction=(torch.ones(6, 1), torch.ones(1, 12)))
    with pytest.raises(InputError, match="rank"):
        LowBitLinear(12, 7, quantiser, rank=8)
    with pytest.raises(InputError, match="component"):
        LowBitLinear(12, 7, quantiser, rank=1, factor_quantiser=Quantiser(8, granularity="group"))
