"""GPTQ lowers the error that it minimises, for layers of every kind, and weighs tokens once."""

import math

import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.gptq import Order, gptq, hessian_of, layer_inputs
from archfront.spaces.policies.quantiser import Quantiser

ORDERS: tuple[Order, ...] = ("activation", "none")


def correlated(samples: int, width: int, seed: int) -> Tensor:
    """Of a few hidden causes, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(samples, width // 3, generator=generator)
    mixing = torch.randn(width // 3, width, generator=generator)
    return causes @ mixing + 0.3 * torch.randn(samples, width, generator=generator)


def weight_of(rows: int, columns: int, seed: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, quantised: Tensor, hessian: Tensor) -> float:
    difference = (weight - quantised).flatten(1).double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "quantiser",
    [Quantiser(2), Quantiser(3, False), Quantiser(4, False, "group", 16, "mse"), Quantiser(3, True, "tensor")],
)
def test_the_weighted_error_is_below_that_of_nearest_codes(quantiser: Quantiser, order: Order) -> None:
    weight, hessian = weight_of(20, 48), hessian_of(correlated(400, 48, 0))
    codes, parameters, quantised = gptq(weight, hessian, quantiser, block=16, order=order)
    nearest = quantiser.fake(weight)
    assert error(weight, quantised, hessian) < 0.6 * error(weight, nearest, hessian)
    # In the plain norm nothing beats the nearest codes.
    assert (weight - quantised).norm() > (weight - nearest).norm()
    assert torch.equal(quantised, quantiser.dequantise(codes, parameters))
    assert torch.equal(parameters.scale, quantiser.parameters(weight).scale)
    assert quantiser.low <= int(codes.min())
    assert int(codes.max()) <= quantiser.high


def test_the_order_by_activation_helps_unequal_inputs() -> None:
    inputs = correlated(400, 48, 0) * torch.logspace(-1, 1, 48)
    weight, hessian = weight_of(64, 48), hessian_of(inputs)
    ordered, plain = (error(weight, gptq(weight, hessian, Quantiser(3), order=order)[2], hessian) for order in ORDERS)
    assert ordered < plain


@pytest.mark.parametrize("order", ORDERS)
def test_an_identity_hessian_gives_the_nearest_codes(order: Order) -> None:
    quantiser = Quantiser(3, False, "group", 10)
    weight = weight_of(12, 35)
    codes, parameters, _ = gptq(weight, torch.eye(35) * 2, quantiser, order=order)
    assert torch.equal(codes, quantiser.codes(weight, parameters))


def test_blocks_change_nothing_but_rounding() -> None:
    weight, hessian = weight_of(10, 40).double(), hessian_of(correlated(300, 40, 1).double())
    first = gptq(weight, hessian, Quantiser(3), block=1)[0]
    for block in (7, 40, 128):
        assert torch.equal(gptq(weight, hessian, Quantiser(3), block=block)[0], first)


def test_two_columns_by_hand() -> None:
    """With one row and no damping: the second weight moves by the first one's error times H12 / H22."""
    weight, hessian = torch.tensor([[0.4, 1.5]]), torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    quantiser = Quantiser(2)
    codes, parameters, quantised = gptq(weight, hessian, quantiser, damping=0.0, order="none")
    scale = float(parameters.scale)
    first = round(0.4 / scale) * scale
    second = 1.5 + (0.4 - first) * 1.0 / 2.0
    assert scale == pytest.approx(1.0)
    assert quantised[0, 0] == pytest.approx(first)
    assert codes[0, 1] == min(round(second / scale), 1)


def test_hessians_are_the_weighted_sums() -> None:
    inputs, weights = correlated(30, 6, 2), torch.rand(30, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for x, r in zip(inputs.double(), weights.double(), strict=True):
        expected += 2 / 30 * r * x[:, None] * x[None, :]
    torch.testing.assert_close(hessian_of(inputs, weights).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(hessian_of(inputs), hessian_of(inputs, torch.ones(30)))


def test_token_weights_lower_the_error_of_the_tokens_that_weigh() -> None:
    inputs = torch.cat([correlated(60, 36, 4), 3 * correlated(600, 36, 5)])
    weights = torch.cat([torch.full((60,), 10.0), torch.full((600,), 0.1)])
    weight, weighted = weight_of(32, 36), hessian_of(inputs, weights)
    plain = gptq(weight, hessian_of(inputs), Quantiser(3))[2]
    aware = gptq(weight, weighted, Quantiser(3))[2]
    assert error(weight, aware, weighted) < 0.9 * error(weight, plain, weighted)
    important = hessian_of(inputs[:60])
    assert error(weight, aware, important) < error(weight, plain, important)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 3, "padding": "same"},
        {"groups": 6, "padding": 2, "dilation": 2},
        {"padding": (1, 2), "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolutions_are_products_with_their_unfolded_inputs(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, bias=False, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(8, 2, 9, 7, generator=generator)
    images = torch.einsum("nchw,cd->ndhw", causes, torch.randn(2, 6, generator=generator)).cumsum(3)
    images = images + 0.3 * torch.randn(8, 6, 9, 7, generator=generator)
    x = layer_inputs(layer, images)
    groups = layer.groups
    grouped = layer.weight.detach().reshape(groups, -1, x.shape[2])
    products = torch.einsum("gsd,god->sgo", x, grouped).flatten(1)
    expected = layer(images).detach()
    torch.testing.assert_close(products, expected.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-4)

    quantiser = Quantiser(3)
    codes, _, quantised = gptq(layer.weight, hessian_of(x), quantiser)
    assert codes.shape == layer.weight.shape
    errors = []
    for candidate in (quantised, quantiser.fake(layer.weight)):
        with torch.no_grad():
            layer.weight.copy_(candidate)
            errors.append(float((layer(images) - expected).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_never_occur_get_the_nearest_codes() -> None:
    inputs = correlated(100, 24, 6)
    inputs[:, [3, 17]] = 0
    weight = weight_of(8, 24)
    codes, parameters, _ = gptq(weight, hessian_of(inputs), Quantiser(4))
    nearest = Quantiser(4).codes(weight, parameters)
    assert torch.equal(codes[:, [3, 17]], nearest[:, [3, 17]])
    assert not torch.equal(codes, nearest)
    # Inputs of another unit change nothing, whatever never occurs.
    assert torch.equal(gptq(weight, hessian_of(inputs * 2**-10), Quantiser(4))[0], codes)
    assert torch.equal(gptq(weight, torch.zeros(24, 24), Quantiser(4))[0], nearest)


def test_damping_rises_until_the_decomposition_works() -> None:
    # Fewer samples than inputs, and one input twice.
    inputs = correlated(10, 24, 7)
    inputs[:, 1] = inputs[:, 0]
    weight, hessian = weight_of(8, 24), hessian_of(inputs)
    for damping in (0.0, 0.01):
        quantised = gptq(weight, hessian, Quantiser(3), damping=damping)[2]
        assert torch.isfinite(quantised).all()
        assert error(weight, quantised, hessian) < error(weight, Quantiser(3).fake(weight), hessian)
    indefinite = hessian - torch.eye(24)
    assert torch.isfinite(gptq(weight, indefinite, Quantiser(3))[2]).all()


def test_wrong_hessians_and_weights_of_tokens_are_refused() -> None:
    weight = weight_of(8, 24)
    with pytest.raises(InputError, match="hessian"):
        gptq(weight, torch.eye(23), Quantiser(3))
    with pytest.raises(InputError, match="hessian"):
        gptq(weight, torch.eye(24).expand(3, 24, 24), Quantiser(3))
    with pytest.raises(InputError, match="NaN"):
        gptq(weight, torch.full((24, 24), math.nan), Quantiser(3))
    with pytest.raises(InputError, match="damping"):
        gptq(weight, torch.eye(24), Quantiser(3), damping=-1)
    with pytest.raises(InputError, match="block"):
        gptq(weight, torch.eye(24), Quantiser(3), block=0)
    with pytest.raises(InputError, match="however much"):
        gptq(weight, torch.zeros(24, 24) + torch.diag(torch.tensor([1.0, -1.0] * 12)), Quantiser(3))
    with pytest.raises(InputError, match="token_weights"):
        hessian_of(torch.ones(4, 3), torch.ones(3))
    with pytest.raises(InputError, match="token_weights"):
        hessian_of(torch.ones(4, 3), torch.tensor([1.0, 1, 1, -1]))
    with pytest.raises(InputError, match="layer_inputs"):
        hessian_of(torch.ones(2, 2, 2, 2))
