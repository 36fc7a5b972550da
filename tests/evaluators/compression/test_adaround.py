"""Learned rounding beats the nearest codes on a small trained network, and ends with codes next to the weights."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.adaround import (
    annealed_beta,
    reconstruct,
    rectified_sigmoid,
    rounding_regulariser,
)
from archfront.spaces.policies.quantiser import ActivationQuantiser, Quantiser


class Residual(nn.Module):
    """A block as of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.quantise: nn.Module = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.quantise(self.norms[0](self.first(features)).relu())
        second: Tensor = self.norms[1](self.second(hidden))
        return (second + features).relu()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Residual, Tensor]:
    """The stem and the block of a network that tells apart stripes of four directions, and images."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 4
    place = torch.arange(8.0)
    across, down = place[None, :].expand(8, 8), place[:, None].expand(8, 8)
    waves = torch.stack([across, down, across + down, across - down])[labels] * 1.5 + torch.rand(256, 1, 1) * 6
    images = (waves.sin() + 0.7 * torch.randn(256, 8, 8))[:, None]
    stem, block = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()), Residual(8)
    model = nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        chosen = slice(step % 4 * 64, step % 4 * 64 + 64)
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    assert float((model(images).argmax(1) == labels).float().mean()) > 0.9
    return stem, block, images


@pytest.mark.parametrize("bits", [2, 3])
def test_a_block_comes_closer_than_with_nearest_codes(trained: tuple[nn.Module, Residual, Tensor], bits: int) -> None:
    stem, block, images = trained
    quantiser = Quantiser(bits, ranges="mse")
    with torch.no_grad():
        of_float = stem(images)
        of_quantised = Quantiser(6, False, "tensor").fake(of_float)
    rounded = copy.deepcopy(block).train()
    modes = [m.training for m in rounded.modules()]
    quantisers = {"first": quantiser, "second": quantiser}
    before = copy.deepcopy(block.state_dict())
    result = reconstruct(
        block, rounded, of_float, of_quantised, quantisers, steps=250, learning_rate=0.02, regularisation=0.01
    )
    assert result.mse < 0.7 * result.nearest_mse

    # Both figures are those of the block as a user would compute them.
    assert [m.training for m in rounded.modules()] == modes
    rounded.eval()
    with torch.no_grad():
        targets = block(of_float)
        assert result.mse == pytest.approx(float((rounded(of_quantised) - targets).square().mean()), rel=1e-4)
        nearest = copy.deepcopy(block)
        for conv in (nearest.first, nearest.second):
            conv.weight.copy_(quantiser.fake(conv.weight))
        assert result.nearest_mse == pytest.approx(float((nearest(of_quantised) - targets).square().mean()), rel=1e-4)

    changed = 0.0
    for path in quantisers:
        weight = block.get_parameter(f"{path}.weight").detach()
        found = result.layers[path]
        assert torch.equal(rounded.get_parameter(f"{path}.weight"), quantiser.dequantise(found.codes, found.parameters))
        floor = torch.floor(weight / found.parameters.scale.reshape(-1, 1, 1, 1))
        allowed = torch.stack([floor, floor + 1]).clamp(quantiser.low, quantiser.high)
        assert bool((found.codes == allowed).any(0).all())
        changed += float((found.codes != quantiser.codes(weight, found.parameters)).float().mean())
    assert changed > 0.02
    assert all(torch.equal(t, before[n]) for n, t in block.state_dict().items())
    assert all(torch.equal(t, before[n]) for n, t in rounded.state_dict().items() if "norms" in n)
    assert all(p.requires_grad and p.grad is None for p in rounded.parameters())


def test_quantised_inputs_are_made_up_for() -> None:
    """Float targets and quantised inputs: what the layers before lost, here a fifth of all, is won back in part."""
    torch.manual_seed(1)
    layer = nn.Linear(16, 12)
    inputs = torch.randn(256, 5)[:, torch.arange(16) % 5] + 0.1 * torch.randn(256, 16)
    quantised = 0.8 * inputs
    results = []
    for given in (quantised, inputs):
        rounded = copy.deepcopy(layer)
        reconstruct(layer, rounded, inputs, given, {"": Quantiser(3)}, steps=300, learning_rate=0.02)
        with torch.no_grad():
            results.append(float((rounded(quantised) - layer(inputs)).square().mean()))
    assert results[0] < 0.6 * results[1]


def test_activations_may_be_quantised_inside(trained: tuple[nn.Module, Residual, Tensor]) -> None:
    stem, block, images = trained
    features = stem(images).detach()
    rounded = copy.deepcopy(block)
    observer = ActivationQuantiser(4)
    rounded.quantise = observer
    rounded(features)
    observer.freeze()
    quantisers = {"first": Quantiser(3), "second": Quantiser(3, False, "group", 16)}
    result = reconstruct(block, rounded, features, features, quantisers, steps=400, learning_rate=0.02)
    assert result.mse < result.nearest_mse


def test_the_same_seed_gives_the_same_codes() -> None:
    torch.manual_seed(2)
    layer, inputs = nn.Linear(16, 12), torch.randn(256, 16)
    settings = {"": Quantiser(3)}
    codes = [
        reconstruct(layer, copy.deepcopy(layer), inputs, inputs, settings, steps=40, learning_rate=0.1, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(codes[0].layers[""].codes, codes[1].layers[""].codes)
    assert not torch.equal(codes[0].layers[""].codes, codes[2].layers[""].codes)


def test_the_relaxation_is_that_of_the_paper() -> None:
    v = torch.tensor([-50.0, -2.0, 0.0, 1.0, 50.0])
    expected = [0.0, 1.2 / (1 + torch.e**2) - 0.1, 0.5, 1.2 / (1 + torch.e**-1) - 0.1, 1.0]
    assert rectified_sigmoid(v).tolist() == pytest.approx(expected, abs=1e-6)
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert float(rounding_regulariser(h, 2)) == pytest.approx(0.75 + 1)
    assert float(rounding_regulariser(h, 20)) == pytest.approx(1 - 0.5**20 + 1)
    assert annealed_beta(19, 100, 0.2, (20, 2)) is None
    assert annealed_beta(20, 100, 0.2, (20, 2)) == 20
    assert annealed_beta(60, 100, 0.2, (20, 2)) == pytest.approx(11)
    assert annealed_beta(99, 100, 0.2, (20, 2)) == pytest.approx(2.225)


def test_wrong_settings_are_refused() -> None:
    block, inputs = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)
    quantiser = Quantiser(3)
    with pytest.raises(InputError, match="Known: '0'"):
        reconstruct(block, block, inputs, inputs, {"1": quantiser})
    with pytest.raises(InputError, match="name no layer"):
        reconstruct(block, block, inputs, inputs, {})
    with pytest.raises(InputError, match="inputs"):
        reconstruct(block, block, inputs, inputs[1:], {"0": quantiser})
    with pytest.raises(InputError, match="steps"):
        reconstruct(block, block, inputs, inputs, {"0": quantiser}, steps=0)
    with pytest.raises(InputError, match="warm_up"):
        reconstruct(block, block, inputs, inputs, {"0": quantiser}, warm_up=1)
