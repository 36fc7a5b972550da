"""Scores against independent computations: an exact Hessian, true losses, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.support.small_models import RESNET, VIT, bits, digits
from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.evaluators.compression.scores.perturbation import Hessian, Outliers, Taylor, Trace, ZerothOrder
from archfront.evaluators.compression.scores.registry import SCORES
from archfront.evaluators.compression.scores.score import Score, Subject

WIDTHS = [2, 4, 32]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of(Compressible(bits("vit", weights=WIDTHS, activations="float"), digits(VIT), 32), 64)


@pytest.fixture(scope="module")
def convolutional() -> Subject:
    return Subject.of(Compressible(bits("resnet", weights=WIDTHS, activations="float"), digits(RESNET), 32), 64)


@pytest.mark.parametrize("name", SCORES.names())
def test_every_score(name: str, subject: Subject) -> None:
    """The contract: shapes, zeros for what changes nothing, the same for one seed, and fewer bits hurt more."""
    score = SCORES.build({"name": name}, "score")
    before = {n: t.clone() for n, t in subject.network.model.state_dict().items()}
    found = score.checked(subject)
    assert [row.shape for row in found] == [(3,)] * len(subject.sites)
    assert all(row[2] == 0 for row in found)
    assert np.mean([row[0] >= row[1] for row in found]) > 0.8
    assert all(np.array_equal(a, b) for a, b in zip(found, score.checked(subject), strict=True))
    after = subject.network.model.state_dict()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    assert all(p.grad is None for p in subject.network.model.parameters())


@pytest.mark.parametrize("name", SCORES.names())
def test_a_higher_score_is_a_larger_loss(name: str, convolutional: Subject) -> None:
    """Over all sites and widths. Among sites at one width, only curvature and the output itself say much here."""
    found = SCORES.build({"name": name}, "score").measure(convolutional)
    true = Distortion(of="loss").measure(convolutional)
    assert spearmanr(np.concatenate([r[:2] for r in found]), np.concatenate([r[:2] for r in true]))[0] > 0.3
    if name in ("hessian", "distortion"):
        assert spearmanr([r[0] for r in found], [r[0] for r in true])[0] > 0.3


def test_leave_one_in_is_the_true_loss(convolutional: Subject) -> None:
    """Against a network that is built with one site's bits, and run by itself."""
    space = convolutional.network.space
    found = Distortion(of="loss").measure(convolutional)
    images = torch.cat(list(convolutional.batches))
    for i in (0, 3, len(space.columns) - 1):
        genotype = [32] * len(space.columns)
        genotype[i] = 2
        with torch.no_grad():
            before, after = (
                functional.cross_entropy(model.eval()(images), convolutional.labels)
                for model in (space.source.build(), space.build(genotype))
            )
        assert found[i][0] == pytest.approx(float(after - before), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("of", ["mse", "sqnr", "kl", "cosine"])
def test_distortions_are_their_formulas(of: Any, convolutional: Subject) -> None:
    space = convolutional.network.space
    images = torch.cat(list(convolutional.batches))
    found = Distortion(of=of).measure(convolutional)
    with torch.no_grad():
        own = space.source.build()(images)
        genotypes = [[2 if k == i else 32 for k in range(len(space.columns))] for i in range(2)]
        logits = [space.build(genotype).eval()(images) for genotype in genotypes]
    p = own.softmax(1)
    values = {
        "mse": lambda x: ((x - own) ** 2).mean(),
        "sqnr": lambda x: 10 * torch.log10(((x - own) ** 2).sum() / (own**2).sum()),
        "kl": lambda x: (p * (p.log() - x.log_softmax(1))).sum(1).mean(),
        "cosine": lambda x: (1 - (x * own).sum(1) / x.norm(dim=1) / own.norm(dim=1)).mean(),
    }
    first, second = (float(values[of](x)) for x in logits)
    if of == "sqnr":  # a common shift in dB
        assert found[0][0] - found[1][0] == pytest.approx(first - second, abs=1e-3)
    else:
        assert (found[0][0], found[1][0]) == pytest.approx((first, second), rel=1e-3)


class _OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(x)))
        return logits


class _Toy:
    """As much of a network with sites as scores of weights look at."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = _OneLayer()
        full = bits("vit", weights=WIDTHS, activations="float")
        sites = [s for s in full.sites if s.id in ("blocks.0.mlp.fc1:weights", "head:weights")]
        names = ("hidden", "head")
        self.sites = [
            type(s)(id=f"{n}:weights", kind=s.kind, domain=s.domain, module=n)
            for s, n in zip(sites, names, strict=True)
        ]
        self.quantiser = full.quantiser
        self.space = self


@pytest.fixture
def toy() -> Subject:
    labels = torch.tensor([0, 1, 2, 0, 1])
    batches = list(torch.split(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), 3))
    return Subject(network=_Toy(), batches=batches, labels=labels)  # type: ignore[arg-type]


def exact_hessians(subject: Subject) -> dict[str, Tensor]:
    """Path -> Hessian of the mean loss in the weight, by differentiating twice each entry."""
    model, images = subject.network.model, torch.cat(list(subject.batches))
    found = {}
    for path in ("hidden", "head"):
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)

        def loss(flat: Tensor, path: str = path, shape: torch.Size = weight.shape) -> Tensor:
            logits = torch.func.functional_call(model, {f"{path}.weight": flat.view(shape)}, (images,))
            return functional.cross_entropy(logits, subject.labels)

        found[path] = torch.autograd.functional.hessian(loss, weight.detach().flatten())  # type: ignore[no-untyped-call]
    return found


def test_hutchinson_is_the_exact_trace(toy: Subject) -> None:
    exact = {path: float(hessian.trace()) for path, hessian in exact_hessians(toy).items()}
    traces = Hessian(draws=3000).traces(toy)
    assert {path: trace.mean for path, trace in traces.items()} == pytest.approx(exact, rel=0.05)
    assert all(abs(trace.mean - exact[path]) < 4 * trace.error for path, trace in traces.items())
    damage = Hessian(draws=3000).measure(toy)
    weight = toy.network.model.get_submodule("head").weight
    assert isinstance(weight, Tensor)
    change = toy.network.space.quantiser(2).fake(weight.detach()) - weight.detach()
    assert damage[1][0] == pytest.approx(exact["head"] / weight.numel() * float(change.square().sum()), rel=0.06)


def test_no_layer_is_harmless_by_chance(toy: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose trace is found to be negative has the damage of its standard error."""
    score = Hessian(draws=8)
    traces = score.traces(toy)
    damage = score.measure(toy)
    doubtful = Trace(-1.0, 0.5 * traces["head"].mean)
    monkeypatch.setattr(Hessian, "traces", lambda *_: {**traces, "head": doubtful})
    assert score.measure(toy)[1] == pytest.approx(damage[1] / 2)
    assert score.measure(toy)[0] == pytest.approx(damage[0])


def test_taylor_is_the_directional_derivative(toy: Subject) -> None:
    found = Taylor(form="signed").measure(toy)
    model = toy.network.model
    weight = model.get_submodule("head").weight
    assert isinstance(weight, Tensor)
    change = toy.network.space.quantiser(4).fake(weight.detach()) - weight.detach()
    sizes = [len(batch) for batch in toy.batches]
    expected = 0.0
    for batch, labels in zip(toy.batches, torch.split(toy.labels, sizes), strict=True):
        losses = []
        for step in (1e-3, -1e-3):
            logits = torch.func.functional_call(model, {"head.weight": weight.detach() + step * change}, (batch,))
            losses.append(float(functional.cross_entropy(logits, labels).detach()))
        expected += abs(losses[0] - losses[1]) / 2e-3 / len(toy.batches)
    assert found[1][1] == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_zeroth_order_is_the_gradient_norm(toy: Subject) -> None:
    """``E|z g| = sqrt(2 / pi) |g|`` for Gaussian z."""
    slopes = ZerothOrder(draws=3000).slopes(toy)
    images = torch.cat(list(toy.batches))
    loss = functional.cross_entropy(toy.network.model(images), toy.labels)
    for path, slope in slopes.items():
        weight = toy.network.model.get_submodule(path).weight
        [gradient] = torch.autograd.grad(loss, [weight], retain_graph=True)  # type: ignore[list-item]
        assert slope == pytest.approx(np.sqrt(2 / np.pi) * float(gradient.norm()), rel=0.06)


def test_gaussian_weights_have_the_known_share_of_outliers(toy: Subject) -> None:
    head = toy.network.model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(torch.randn(500, 200, generator=torch.Generator().manual_seed(0)))
    share = 1 - Outliers().measure(toy)[1][0] / 2.0**-2
    assert share == pytest.approx(0.3173, abs=0.005)


def test_what_a_score_cannot_see_and_what_is_not_finite() -> None:
    space = bits("vit", weights=[4, 8], activations=[4, 8])
    subject = Subject.of(Compressible(space, digits(VIT), 16), 16)
    with pytest.raises(InputError, match="activation-bits, which a score of weights does not see"):
        Hessian().measure(subject)
    assert all(np.isfinite(row).all() for row in Distortion().checked(subject))

    class Broken(Score):
        name = "broken"

        def measure(self, subject: Subject) -> list[Any]:
            return [np.array([np.nan, 0.0]) for _ in subject.sites]

    with pytest.raises(InputError, match=r"score\.broken\.patch_embed.*nan is the damage of 4"):
        Broken().checked(subject)

    class Short(Score):
        name = "short"

        def measure(self, subject: Subject) -> list[Any]:
            return [[0.0, 1.0]]

    with pytest.raises(InputError, match=r"score\.short.*one for each site"):
        Short().checked(subject)
    with pytest.raises(InputError, match=r"score\.draws"):
        Hessian(draws=0)
