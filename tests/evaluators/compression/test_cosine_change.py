"""How much blocks turn their features: against cosines by hand, and the order in which blocks are lowered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.small_models import DECODER, bits, data_of
from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.cosine_change import CosineChange
from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.evaluators.compression.scores.perturbation import Hessian, Outliers, Taylor, ZerothOrder
from archfront.evaluators.compression.scores.score import Score, Subject
from archfront.search.allocators.quota import QuotaSort
from archfront.search.policy_allocation import allocate
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.site import Site


class Turning(nn.Module):
    """Two features of each token, turned by an angle."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        angle = math.radians(degrees / 2)
        half = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.first.weight, self.second.weight = nn.Parameter(half.clone()), nn.Parameter(3 * half)

    def forward(self, features: Tensor) -> Tensor:
        turned: Tensor = self.second(self.first(features))
        return turned


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.square, self.first = nn.Linear(2, 2), nn.Linear(3, 2)
        self.blocks = nn.ModuleList([Turning(60), Turning(90), Turning(10)])
        self.head = nn.Linear(2, 5)
        with torch.no_grad():
            self.square.weight.copy_(torch.eye(2))
            self.square.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.square(self.first(tokens))
        for block in self.blocks:
            features = block(features)
        logits: Tensor = self.head(features)
        return logits


def toy_subject() -> Subject:
    torch.manual_seed(0)
    layers = ["first", "square", *(f"blocks.{i}.{name}" for i in range(3) for name in ("first", "second")), "head"]
    sites = [Site(id=f"{path}:weights", kind="weight-bits", domain=(2, 4, 32), module=path) for path in layers]
    network: Any = SimpleNamespace(model=Toy().eval(), space=SimpleNamespace(sites=sites))
    return Subject(network=network, batches=[torch.randn(3, 4, 3), torch.randn(2, 4, 3)], labels=torch.zeros(5))


def test_importance_is_one_minus_the_cosine_of_what_goes_in_and_out() -> None:
    subject = toy_subject()
    found = CosineChange().importances(subject)
    turned = {f"blocks.{i}": 1 - math.cos(math.radians(angle)) for i, angle in enumerate((60, 90, 10))}
    # A layer alone that changes nothing, and those that change the number of features.
    assert found == pytest.approx({"first": 1, "square": 0, **turned, "head": 1}, abs=1e-5)
    damage = CosineChange().measure(subject)
    assert damage[3] == pytest.approx(0.5 * np.array([0.25, 0.0625, 0]), abs=1e-6)
    # What has no cosine comes before all that has.
    assert damage[0][0] == damage[-1][0] > damage[4][0]


def test_channels_of_convolutions_are_their_features() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    images = torch.randn(3, 2, 4, 5)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]])[:, :, None, None])
    site = Site(id="0:weights", kind="weight-bits", domain=(2, 32), module="0")
    network: Any = SimpleNamespace(model=model, space=SimpleNamespace(sites=[site]))
    found = CosineChange().importances(Subject(network=network, batches=[images], labels=torch.zeros(3)))
    assert found == pytest.approx({"0": 1})


@pytest.mark.parametrize("score", [CosineChange(), Outliers()])
def test_tied_layers_share_one_damage(score: Score) -> None:
    """So a block of many layers weighs no more than the head, which is one."""
    space = bits("decoder", weights=[2, 4], activations="float", tie="blocks")
    subject = Subject.of(Compressible(space, data_of("decoder"), 32), 32)
    damage = score.checked(subject)
    per_block = [
        sum(row[0] for row, site in zip(damage, space.sites, strict=True) if i in site.id) for i in ("s.0", "s.1")
    ]
    if isinstance(score, CosineChange):
        found = score.importances(subject)
        wanted = [found[f"blocks.{i}"] / 4 for i in range(2)]
    else:
        wanted = []
        for block in ("blocks.0.", "blocks.1."):
            layers = [m for p, m in subject.network.model.named_modules() if p.startswith(block)]
            weights = [m.weight.detach() for m in layers if isinstance(m, nn.Linear)]
            outside = sum(int(((w - w.mean()).abs() > w.std()).sum()) for w in weights)
            wanted.append((1 - outside / sum(w.numel() for w in weights)) / 4)
    assert per_block == pytest.approx(wanted)


def test_blocks_are_lowered_in_the_order_of_their_importance() -> None:
    """Under tighter and tighter budgets, each one block more, the least important first, and the head never."""
    depth = 5
    space = Bits(model={**DECODER, "depth": depth}, weights=[2, 4], activations="float", tie="blocks")
    subject = Subject.of(Compressible(space, data_of("decoder"), 32), 32)
    with torch.no_grad():
        # Fresh blocks are much alike: these add to the stream what rises and falls with the depth.
        for i, factor in enumerate((4.0, 30.0, 1.0, 12.0, 2.0)):
            subject.network.model.get_submodule(f"blocks.{i}.mlp.fc2").weight.mul_(factor)  # type: ignore[operator]
    found = CosineChange().importances(subject)
    blocks = [f"blocks.{i}" for i in range(depth)]
    assert len({found[block] for block in blocks}) == depth
    order = sorted(blocks, key=lambda block: found[block])
    assert order != blocks != order[::-1]
    damage = CosineChange().checked(subject)
    top = space.bit_costs(space.from_json([[4] * (depth + 1)]))["model_mb"][0]
    each = 12 * 32 * 32 * 2 / 8 / 2**20
    for lowered in range(depth + 1):
        genotype, _ = allocate(space, damage, {"model_mb": top - lowered * each}, QuotaSort())
        low = {block for block, width in zip(blocks, genotype, strict=False) if width == 2}
        assert low == set(order[:lowered])
        assert genotype[-1] == 4


def test_choices_of_inputs_are_refused() -> None:
    space = bits("decoder", weights=[4], activations=[4, 8])
    subject = Subject.of(Compressible(space, data_of("decoder"), 16), 16)
    with pytest.raises(InputError, match="activation-bits, which a score of weights does not see"):
        CosineChange().measure(subject)


def test_losses_of_tokens_are_means_over_all_places() -> None:
    space = bits("decoder", weights=[2, 32], activations="float")
    subject = Subject.of(Compressible(space, data_of("decoder"), 16, batch=5), 8)
    tokens, labels = torch.cat(list(subject.batches)), subject.labels.flatten()
    with torch.no_grad():
        own = space.source.build()(tokens).flatten(0, 1)
        logits = space.build([2, *[32] * (len(space.columns) - 1)]).eval()(tokens).flatten(0, 1)
    rise = functional.cross_entropy(logits, labels) - functional.cross_entropy(own, labels)
    p = own.softmax(1)
    divergence = (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
    assert Distortion(of="loss").measure(subject)[0][0] == pytest.approx(float(rise), rel=1e-3)
    assert Distortion(of="kl").measure(subject)[0][0] == pytest.approx(float(divergence), rel=1e-3)
    assert Distortion(of="mse").measure(subject)[0][0] == pytest.approx(float((own - logits).square().mean()), rel=1e-3)


def test_scores_of_derivatives_take_the_logits_of_tokens() -> None:
    space = bits("decoder", weights=[2, 4, 32], activations="float")
    subject = Subject.of(Compressible(space, data_of("decoder"), 16, batch=4), 4)
    for score in (Hessian(draws=1), Taylor(), ZerothOrder()):
        found = score.checked(subject)
        assert np.mean([row[0] >= row[1] >= row[2] == 0 for row in found]) > 0.8
    # Its mean over many directions is the gradient's norm, as of images.
    slope = ZerothOrder(draws=60).slopes(subject)["head"]
    model = subject.network.model
    loss = functional.cross_entropy(model(subject.batches[0]).flatten(0, 1), subject.labels.flatten())
    weight = model.get_submodule("head").weight
    assert isinstance(weight, Tensor)
    [gradient] = torch.autograd.grad(loss, [weight])
    assert slope == pytest.approx(np.sqrt(2 / np.pi) * float(gradient.norm()), rel=0.3)
