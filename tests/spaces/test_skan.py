"""KAN networks with a basis per layer: what the bases are, equal parameters, and the selection of a basis."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline as ScipySpline
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.costs import count
from archfront.evaluators.datasets import load
from archfront.evaluators.skan_selection import Schedule, select
from archfront.spaces.skan import KanNetwork, SKan
from archfront.spaces.skan_bases import BASES, RANGE, BSpline, Chebyshev, Fourier, MexicanHat, basis
from archfront.spaces.skan_layers import Branch, KanLayer

GRID = torch.linspace(-RANGE, RANGE, 401)
X = torch.linspace(-1, 1, 256)[:, None]


def test_bases_are_what_their_names_say() -> None:
    spline = BSpline(9)
    inner = GRID[:-1]
    knots = spline.get_buffer("knots").double().numpy()
    expected = np.stack([ScipySpline(knots, np.eye(9)[i], 3)(inner.double().numpy()) for i in range(9)], axis=1)
    assert np.allclose(spline(inner).numpy(), expected, atol=1e-4)
    assert torch.allclose(spline(GRID * 3).sum(-1), torch.ones(401), atol=1e-4)
    angle = torch.acos((GRID / RANGE).clamp(-1, 1))
    assert torch.allclose(Chebyshev(6)(GRID), (angle[:, None] * torch.arange(6)).cos(), atol=1e-4)
    waves = Fourier(4)(GRID)
    assert torch.allclose(waves[:, 0], (GRID * math.pi / RANGE).sin(), atol=1e-5)
    assert torch.allclose(waves[:, 3], (GRID * 2 * math.pi / RANGE).cos(), atol=1e-5)
    wide = torch.linspace(-30, 30, 20_001)
    assert torch.allclose(MexicanHat(5)(wide).mean(0), torch.zeros(5), atol=1e-4)


@pytest.mark.parametrize("name", sorted(BASES))
def test_every_basis_is_independent_normalised_and_smooth_enough(name: str) -> None:
    values = basis(name, 8)(GRID)
    assert values.shape == (401, 8)
    assert math.isclose(float(values.square().mean()), 1, rel_tol=0.02)
    assert torch.linalg.matrix_rank(values.double(), rtol=1e-6) == 8
    far = basis(name, 8)(torch.tensor([-1e3, 1e3], requires_grad=True))
    assert torch.isfinite(far).all()


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_all_genotypes_have_equally_many_parameters(kind: str) -> None:
    space = SKan(kind=kind, widths=[6, 5], resolution=8, in_channels=1)  # type: ignore[arg-type]
    found = set()
    for name in space.pool:
        with torch.device("meta"):
            model = space.build([name] * 3)
        found.add(count(model, (1, 8, 8)).params)
    per_edge = 9 if kind == "conv" else 1
    sizes = [(1 if kind == "conv" else 64, 6, per_edge), (6, 5, per_edge), (5, 10, 1)]
    assert found == {sum(i * o * 8 * k + 2 * i + o for i, o, k in sizes)}


def test_a_mixture_is_the_weighted_sum_of_its_branches() -> None:
    torch.manual_seed(0)
    layer = KanLayer(["fourier", "relu"], 3, 2, 5).eval()
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([0.0, 1.0]))
    inputs = torch.randn(4, 3)
    share = 1 / (1 + math.e)
    standardised = layer.standardise(inputs)
    parts = [branch(standardised) for branch in layer.branches]
    torch.testing.assert_close(layer(inputs), share * parts[0] + (1 - share) * parts[1])
    layer.prune(1)
    torch.testing.assert_close(layer(inputs), parts[1])
    assert layer.names == ("relu",)
    assert "logits" not in dict(layer.named_parameters())


def test_a_convolution_applies_the_dense_functions_in_its_kernel() -> None:
    torch.manual_seed(0)
    dense, conv = Branch("gaussian", 3, 4, 5), Branch("gaussian", 3, 4, 5, kernel=1)
    with torch.no_grad():
        for mine, other in zip(conv.parameters(), dense.parameters(), strict=True):
            mine.copy_(other.reshape(mine.shape))
    images = torch.randn(2, 3, 6, 6)
    rows = dense(images.permute(0, 2, 3, 1).reshape(-1, 3)).reshape(2, 6, 6, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(conv(images), rows)


def chosen(targets: Tensor, seed: int) -> str:
    torch.manual_seed(seed)
    network = KanNetwork([tuple(BASES)], [], 8, convolved=False, inputs=1, classes=1)
    standardised = (targets - targets.mean()) / targets.std()
    found = select(network, X, standardised, schedule=Schedule(pruned=150), seed=seed)
    assert found.loss < 0.05
    assert math.isclose(sum(found.weights[0].values()), 1, rel_tol=1e-5)
    assert set(found.log_losses[0]) == set(BASES)
    [layer] = [m for m in found.network.modules() if isinstance(m, KanLayer)]
    assert [*layer.names] == found.genotype
    return found.genotype[0]


def test_waves_choose_fourier_and_a_local_bump_chooses_local_functions() -> None:
    waves = (10 * X + 0.5).sin()
    offset = ((X + 0.2) / 0.15).square()
    bump = (1 - offset) * (-offset / 2).exp()
    for seed in range(2):
        assert chosen(waves, seed) == "fourier"
        assert chosen(bump, seed) in ("gaussian", "mexican-hat")


def test_a_network_of_two_layers_is_selected_on_images() -> None:
    data = load({"name": "digits"}, 8, 1)
    images, labels = data.part("train")
    space = SKan(pool=["bspline", "gaussian", "relu"], widths=[12], resolution=8, in_channels=1)
    torch.manual_seed(0)
    schedule = Schedule(mixed=40, selective=120, pruned=60, learning_rate=0.005, batch=64)
    loss = nn.functional.cross_entropy
    found = select(space.build_mixed(), data.normalised(images), labels, loss=loss, schedule=schedule)
    images, labels = data.part("validation")
    assert (found.network(data.normalised(images)).argmax(1) == labels).float().mean() > 0.9
    # What was found is a genotype, and the pruned network is the one that the space builds of it.
    space.build(found.genotype).load_state_dict(found.network.state_dict())


def test_every_kind_of_bad_input_is_named() -> None:
    for settings, field in (
        ({"pool": ["fourie"]}, "fourier"),
        ({"pool": []}, r"space\.layer0"),
        ({"pool": ["relu", "relu"]}, "twice"),
        ({"widths": [4, 0]}, r"space\.widths\[1\]"),
        ({"functions": 3}, r"space\.functions"),
        ({"kind": "graph"}, r"space\.kind"),
    ):
        with pytest.raises(InputError, match=field):
            SKan(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="build_mixed"):
        select(SKan(resolution=4).build(["relu", "relu"]), torch.zeros(2, 3, 4, 4), torch.zeros(2, 10))
    with pytest.raises(InputError, match=r"schedule\.batch"):
        select(SKan(resolution=4).build_mixed(), X, X, schedule=Schedule(batch=1000))
    with pytest.raises(InputError, match=r"schedule\.mixed"):
        Schedule(mixed=0)
