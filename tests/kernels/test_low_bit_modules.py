"""The layers on low-bit operators: how close to ``nn.Linear``, their state, and corrections of low rank."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archfront.kernels.modules.low_bit_linear import Int8Linear, WeightOnlyLinear, low_rank_factors, quantise_groups
from archfront.kernels.ops.quantise_rows import gelu_quantise
from archfront.kernels.packing import LAYOUT_VERSION
from archfront.spaces.policies.quantiser import Quantiser


def sqnr_db(found: Tensor, truth: Tensor) -> float:
    """Signal over noise of quantisation, in decibels."""
    return float(10 * torch.log10(truth.double().square().sum() / (found.double() - truth.double()).square().sum()))


def linear(seed: int = 0, *, normal: bool = False, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(384, 200, bias=bias)
    if normal:
        nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_int8_is_close_to_float(activation: str, normal: bool) -> None:
    layer = linear(normal=normal)
    x = torch.randn(2, 17, 384)
    y = layer(x)
    wanted = {"none": y, "gelu": nn.functional.gelu(y), "relu": y.relu()}[activation]
    made = Int8Linear.from_linear(layer, activation=activation)
    assert made(x).shape == (2, 17, 200)
    assert sqnr_db(made(x), wanted) >= 30
    assert sqnr_db(made.half()(x.half()), wanted) >= 30


# Of normal weights the best 16 evenly spaced codes of one scale leave 20.2 dB; those that are symmetric a little less.
@pytest.mark.parametrize(("normal", "least"), [(False, 20), (True, 19.5)])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_four_bits_are_close_to_float(group: int, zero_point: bool, normal: bool, least: float) -> None:
    layer = linear(normal=normal)
    x = torch.randn(17, 384)
    made = WeightOnlyLinear.from_linear(layer, 4, group, zero_point=zero_point)
    assert sqnr_db(made(x), layer(x)) >= (20 if group < 128 else least)
    half = WeightOnlyLinear.from_linear(layer.half(), 4, group, zero_point=zero_point)
    assert half.scale.dtype == torch.float16
    assert sqnr_db(half(x.half()), layer.float()(x)) >= (20 if group < 128 else least)


def test_more_bits_smaller_groups_and_corrections_come_closer() -> None:
    layer = linear(normal=True)
    x = torch.randn(40, 384)

    def quality(bits: int, group: int, rank: int = 0) -> float:
        return sqnr_db(WeightOnlyLinear.from_linear(layer, bits, group, rank=rank)(x), layer(x))

    assert quality(8, 128) > 40 > quality(4, 128) > quality(3, 128) > quality(2, 128) > 5
    assert quality(2, 32) > quality(2, 64) > quality(2, 500)
    assert quality(2, 64, 64) > quality(2, 64, 8) > quality(2, 64)
    int8 = [sqnr_db(Int8Linear.from_linear(layer, rank=rank)(x), layer(x)) for rank in (0, 16)]
    assert int8[1] > int8[0]


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_what_a_correction_leaves_is_the_tail_of_the_singular_values(rank: int) -> None:
    layer = linear()
    weight = layer.weight.detach()
    plain = WeightOnlyLinear.from_linear(layer, 2, 64).dequantised(torch.float64)
    values = torch.linalg.svdvals(weight.double() - plain)
    made = WeightOnlyLinear.from_linear(layer, 2, 64, rank=rank)
    left = (weight.double() - made.dequantised(torch.float64)).square().sum()
    torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-5, atol=0)
    # The factors are applied to x, not multiplied into the weight.
    x = torch.randn(5, 384)
    torch.testing.assert_close(made(x), x @ made.dequantised(torch.float32).T + layer.bias, rtol=1e-4, atol=1e-5)


def test_a_rank_that_an_error_cannot_have_is_refused() -> None:
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank: {rank} is not served; 1 to 4 is"):
            low_rank_factors(torch.randn(9, 4), rank)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_from_elsewhere_give_that_weight(bits: int, symmetric: bool) -> None:
    """As GPTQ leaves them: from the search's own quantiser."""
    layer = linear()
    quantiser = Quantiser(bits=bits, symmetric=symmetric, granularity="group", group=64)
    weight = layer.weight.detach()
    parameters = quantiser.parameters(weight)
    codes = quantiser.codes(weight, parameters)
    zero = None if symmetric else parameters.zero_point
    made = WeightOnlyLinear.from_codes(codes, parameters.scale, zero, layer.bias, bits=bits, group=64)
    assert torch.equal(made.dequantised(torch.float32), quantiser.dequantise(codes, parameters))
    x = torch.randn(3, 384)
    torch.testing.assert_close(made(x), x @ quantiser.fake(weight).T + layer.bias)


def test_codes_that_do_not_fit_are_refused() -> None:
    codes, scale, zero = quantise_groups(torch.randn(9, 100), 4, 32, zero_point=True)
    assert zero is not None
    settings: dict[str, Any] = {"bits": 4, "group": 32}
    for wrong, message in (
        ((codes + 16, scale, zero), "codes: .* is not served; 0 to 15 is"),
        ((codes, scale[:, :3], zero), r"scale.shape: \(9, 3\) is not served; \(n, groups\) = \(9, 4\) is"),
        ((codes, scale, zero.T), r"zero.shape: \(4, 9\)"),
        ((codes, scale, zero + 16), "zero: .* whole 0 to 15 are"),
        ((codes, scale, zero + 0.5), "zero: "),
    ):
        with pytest.raises(ValueError, match=message):
            WeightOnlyLinear.from_codes(*wrong, None, **settings)
    with pytest.raises(ValueError, match="weight: None is not served with rank 2"):
        WeightOnlyLinear.from_codes(codes, scale, zero, None, rank=2, **settings)


def test_groups_of_zeros_and_of_tiny_numbers_are_finite() -> None:
    weight = torch.zeros(3, 64).half()
    weight[1] = 6e-8
    weight[2, 5] = 60000
    for zero_point in (False, True):
        codes, scale, zero = quantise_groups(weight, 4, 32, zero_point=zero_point)
        made = WeightOnlyLinear.from_codes(codes, scale, zero, None, bits=4, group=32)
        found = made.dequantised(torch.float32)
        assert found.isfinite().all()
        assert not found[0].any()
        assert abs(float(found[2, 5]) / 60000 - 1) < 0.1


def made_layers() -> list[tuple[nn.Module, nn.Module]]:
    """Layers with all that they may hold, beside empty ones of the same kind."""
    layer = linear()
    return [
        (Int8Linear.from_linear(layer, rank=3), Int8Linear(384, 200, rank=3)),
        (Int8Linear.from_linear(linear(bias=False)), Int8Linear(384, 200, bias=False)),
        (
            WeightOnlyLinear.from_linear(layer, 3, 64, zero_point=True, rank=3),
            WeightOnlyLinear(384, 200, 3, 64, zero_point=True, rank=3, dtype=torch.float32),
        ),
        (WeightOnlyLinear.from_linear(layer, 4, 1000), WeightOnlyLinear(384, 200, 4, 1000, dtype=torch.float32)),
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_state_comes_back(place: int) -> None:
    made, empty = made_layers()[place]
    assert not list(made.parameters())
    assert not any(buffer.requires_grad for buffer in made.buffers())
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 384)
    assert torch.equal(made(x), empty(x))
    assert repr(made) == repr(empty)


@pytest.mark.parametrize("place", [0, 2])
def test_a_state_of_another_layout_is_refused(place: int) -> None:
    made, empty = made_layers()[place]
    state = made.state_dict()
    state["layout"] = state["layout"].clone()
    state["layout"][0] = LAYOUT_VERSION + 1
    with pytest.raises(ValueError, match=f"layout version: {LAYOUT_VERSION + 1} is not served; {LAYOUT_VERSION} is"):
        empty.load_state_dict(state)
    other = nn.Sequential(WeightOnlyLinear(384, 200, 4, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"0.layout: \[.*\] is not served; \[4, 64, 0\]"):
        other.load_state_dict({f"0.{name}": value for name, value in made.state_dict().items()})


def test_a_cast_keeps_int8s_scales_and_casts_the_others() -> None:
    made = Int8Linear.from_linear(linear(), rank=2)
    before = made.scale.clone()
    made.half()
    assert made.scale.dtype == made.bias.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(made.scale, before)
    packed = WeightOnlyLinear.from_linear(linear(), 4, 64)
    x = torch.randn(3, 384)
    y = packed(x)
    assert packed(x.half()).dtype == torch.float16
    assert packed.half().scale.dtype == torch.float16
    torch.testing.assert_close(packed(x.half()).float(), y, rtol=0.02, atol=0.02)
    assert made.to("meta").scale.device.type == "meta"


def test_inputs_need_not_be_contiguous_and_may_be_quantised_already() -> None:
    layer = linear()
    x = torch.randn(384, 6).T
    for made in (Int8Linear.from_linear(layer), WeightOnlyLinear.from_linear(layer, 8, 64)):
        assert torch.equal(made(x), made(x.contiguous()))
        assert made(x[:0]).shape == (0, 200)
    made = Int8Linear.from_linear(layer)
    codes, scale = gelu_quantise(x.contiguous())
    assert sqnr_db(made.on_codes(codes, scale, torch.float32), layer(nn.functional.gelu(x))) >= 30


@pytest.mark.parametrize("kind", ["int8", "four bits"])
def test_layers_compile_and_export(kind: str) -> None:
    layer = linear()
    made = Int8Linear.from_linear(layer, rank=2) if kind == "int8" else WeightOnlyLinear.from_linear(layer, 4, 64)
    x = torch.randn(2, 5, 384)
    compiled: Any = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    exported = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    other = torch.randn(7, 5, 384)
    torch.testing.assert_close(exported.module()(other), made(other))
