"""Relevance against its rules written out by loops, and its conservation.

Networks here have biases; conservation is of the input's relevance and what biases absorb, which is counted, but for
one network without any.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tests.support.small_models import RESNET, VIT, bits, digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import _get_current_function_mode_stack

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.relevance_rules import Attention, Rule, Rules
from archfront.evaluators.compression.scores.relevance import Relevance, propagate
from archfront.evaluators.compression.scores.score import Subject
from archfront.spaces.policies.quantiser import Quantiser
from archfront.spaces.policies.site import Site

WIDTHS = [2, 4, 32]
EXACT = Rules(epsilon=0)


@pytest.fixture(scope="module", params=["vit", "resnet"])
def subject(request: pytest.FixtureRequest) -> Subject:
    model = {"vit": VIT, "resnet": RESNET}[request.param]
    return Subject.of(Compressible(bits(request.param, weights=WIDTHS, activations="float"), digits(model), 32), 32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def initialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision, with statistics of its batch norms that matter, and negative scales among them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.double().state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.7, generator=generator)
    return model.eval()


def toy_subject(model: nn.Module, images: Tensor, labels: Tensor, *paths: str, batch: int = 4) -> Subject:
    """As much of a network with sites as this score looks at."""
    sites = [Site(id=f"{path}:weights", kind="weight-bits", domain=(2, 4, 32), module=path) for path in paths]
    space = SimpleNamespace(sites=sites, quantiser=bits("vit", weights=WIDTHS, activations="float").quantiser)
    network: Any = SimpleNamespace(model=model, space=space)
    return Subject(network=network, batches=list(torch.split(images, batch)), labels=labels)


@torch.no_grad()
def shared_by_loops(x: Tensor, weight: Tensor, bias: Tensor, relevance: Tensor, rules: Rules) -> Tensor:
    """Relevance of what a linear layer reads, from that of its output: the sums as papers write them."""
    found = torch.zeros_like(x)
    for j in range(len(weight)):
        contributions = [float(x[i] * weight[j, i]) for i in range(len(x))] + [float(bias[j])]
        sign = 1.0 if sum(contributions) >= 0 else -1.0
        if rules.rule == "gamma":
            contributions = [c + rules.gamma * (c if c * sign > 0 else 0.0) for c in contributions]
        for i in range(len(x)):
            found[i] += contributions[i] / (sum(contributions) + sign * rules.epsilon) * float(relevance[j])
    return found


@pytest.mark.parametrize(
    "rules", [EXACT, Rules(epsilon=0.3), Rules(rule="gamma", epsilon=0), Rules(rule="gamma", epsilon=0.2, gamma=2)]
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.3)])
def test_two_layers_by_loops(rules: Rules, activation: nn.Module) -> None:
    """With the second activation, relevance reaches negative outputs and comes from negative inputs too."""
    model = initialised(nn.Sequential(nn.Linear(5, 7), activation, nn.Linear(7, 3)))
    first, last = model.get_submodule("0"), model.get_submodule("2")
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    images = drawn(4, 5)
    found = propagate(model, images, ["0", "2"], rules)
    sums = {"0": 0.0, "2": 0.0}
    for n, x in enumerate(images):
        hidden = activation(first(x)).detach()
        logits = last(hidden).detach()
        relevance = torch.where(torch.arange(3) == logits.argmax(), logits, 0)
        sums["2"] += float(relevance.abs().sum())
        relevance = shared_by_loops(hidden, last.weight, last.bias, relevance, rules)
        sums["0"] += float(relevance.abs().sum())
        expected = shared_by_loops(x, first.weight, first.bias, relevance, rules)
        assert found.logits[n] == pytest.approx(float(logits.max()), rel=1e-9)
        assert torch.allclose(found.input[n], expected, rtol=1e-9, atol=1e-12)
    assert found.layers == pytest.approx(sums, rel=1e-9)


@pytest.mark.parametrize("attention", ["detached", "shared"])
@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_trained_networks_conserve_it(rule: Rule, attention: Attention, subject: Subject) -> None:
    """Input, biases, offsets of normalisations, class token and positions have the logit together."""
    rules = Rules(rule=rule, attention=attention, epsilon=1e-6)
    for image in torch.split(subject.batches[0][:4], 1):
        found = propagate(subject.network.model, image, [], rules)
        with torch.no_grad():
            logit = float(subject.network.model(image).max())
        assert abs(found.absorbed) > 0.01 * logit
        assert float(found.input.sum()) + found.absorbed == pytest.approx(logit, rel=0.01)


class Various(nn.Module):
    """A residual block with a gate, two batch norms that follow a convolution, and one that follows none."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.before, self.grouped, self.after = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(6)
        self.gate, self.head, self.activation = nn.Conv2d(6, 6, 1), nn.Linear(6 * 4, 4), activation

    def forward(self, images: Tensor) -> Tensor:
        features = functional.max_pool2d(self.activation(self.norm(self.stem(images))), 2)
        changed = self.after(self.grouped(functional.pad(self.before(features), (1, 1, 1, 1))))
        changed = changed * functional.hardsigmoid(self.gate(changed.mean((2, 3), keepdim=True)) - 0.5)
        features = functional.adaptive_avg_pool2d(self.activation(changed) / 2 + features[:, :, ::1], 2)
        logits: Tensor = self.head(torch.flatten(features, 1))
        return logits


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Hardswish(), nn.GELU(), nn.SiLU()])
def test_layers_of_convolutional_networks_conserve_it(rule: Rule, activation: nn.Module) -> None:
    model = initialised(Various(activation))
    images = drawn(3, 3, 8, 8)
    found = propagate(model, images, [], Rules(rule=rule, epsilon=1e-12))
    assert torch.allclose(found.logits, model(images).max(1)[0], rtol=1e-9)
    assert float(found.input.sum()) + found.absorbed == pytest.approx(float(found.logits.sum()), rel=1e-6)


def test_without_biases_the_input_has_all_of_it() -> None:
    model = initialised(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=False), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 4, bias=False)
        )
    )
    found = propagate(model, drawn(3, 3, 8, 8), ["0", "4"], EXACT)
    assert found.absorbed == 0
    assert torch.allclose(found.input.sum((1, 2, 3)), found.logits, rtol=1e-9)
    assert found.layers["4"] == pytest.approx(float(found.logits.abs().sum()))


@pytest.mark.parametrize("rules", [Rules(epsilon=0.5), Rules(rule="gamma")])
def test_batch_norms_are_folded(rules: Rules) -> None:
    """As in the network in which they really are, with one scale at least that turns the sign."""
    convolution, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    model = initialised(nn.Sequential(convolution, norm, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)))
    assert (norm.weight < 0).any()
    folded = copy.deepcopy(model)
    assert isinstance(folded, nn.Sequential)
    folded[0], folded[1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()
    images = drawn(3, 3, 8, 8)
    one, other = (propagate(network, images, ["0", "4"], rules) for network in (model, folded))
    assert torch.allclose(one.input, other.input, rtol=1e-9, atol=1e-12)
    assert one.layers == pytest.approx(other.layers, rel=1e-9)
    assert one.absorbed == pytest.approx(other.absorbed, rel=1e-9)


def test_layer_norm_by_loops() -> None:
    """``R_i = x_i sum_j (d_ij - 1/n) g_j c_j / deviation``, ``c`` being relevance over value behind it."""
    model = initialised(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)))
    norm, head = model.get_submodule("0"), model.get_submodule("1")
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(head, nn.Linear)
    [x] = images = drawn(1, 5)
    best = int(model(images)[0].argmax())
    scales, weights = norm.weight.detach(), head.weight.detach()
    deviation = float((x.var(correction=0) + norm.eps).sqrt())
    expected = [
        sum(float(x[i] * ((i == j) - 1 / 5) * scales[j] * weights[best, j]) / deviation for j in range(5))
        for i in range(5)
    ]
    assert propagate(model, images, [], EXACT).input[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_softmax_by_loops() -> None:
    """AttnLRP's rule, ``R_i = x_i (R_i - s_i sum_j R_j)``."""
    model = initialised(nn.Sequential(nn.Softmax(-1), nn.Linear(5, 3)))
    head = model.get_submodule("1")
    assert isinstance(head, nn.Linear)
    [x] = images = drawn(1, 5)
    shares = x.softmax(0)
    relevance = shares * head.weight.detach()[model(images)[0].argmax()]
    expected = [float(x[i] * (relevance[i] - shares[i] * sum(relevance))) for i in range(5)]
    found = propagate(model, images, [], Rules(epsilon=0, attention="shared"))
    assert found.input[0].tolist() == pytest.approx(expected, rel=1e-9)


class Attending(nn.Module):
    """One head over 4 tokens of 6 numbers, fused or step by step."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused, self.silenced, self.fused = nn.Linear(6, 6), nn.Linear(6, 3), fused
        self.register_buffer("mask", torch.zeros(4, 4, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.reshape(-1, 4, 6)
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        mask = self.get_buffer("mask").masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value, mask)
        else:
            mixed = (query * 6**-0.5 @ key.transpose(-2, -1) + mask).softmax(-1) @ value
        logits: Tensor = self.head(mixed).mean(1) + self.silenced(mixed).mean(1) * 0
        return logits


PATHS = ["query", "key", "value", "head", "unused", "silenced"]


@pytest.mark.parametrize("attention", ["detached", "shared"])
def test_attention_shares_as_it_is_told(attention: Attention) -> None:
    rules = Rules(epsilon=0, attention=attention)
    images = drawn(3, 24)
    found = {fused: propagate(initialised(Attending(fused)), images, PATHS, rules) for fused in (True, False)}
    one, other = found[True], found[False]
    assert torch.allclose(one.input, other.input, rtol=1e-9, atol=1e-12)
    assert one.layers == pytest.approx(other.layers, rel=1e-9)
    assert one.absorbed == pytest.approx(other.absorbed, rel=1e-9)
    assert float(one.input.sum()) + one.absorbed == pytest.approx(float(one.logits.sum()), rel=1e-9)
    assert (one.layers["query"] > 0, one.layers["key"] > 0) == ((attention == "shared"),) * 2
    assert min(one.layers["value"], one.layers["head"]) > 0


def test_layers_that_do_not_matter_have_none() -> None:
    subject = toy_subject(initialised(Attending(True)), drawn(6, 24), torch.zeros(6, dtype=torch.long), *PATHS)
    found = Relevance().relevances(subject)
    assert (found["unused"], found["silenced"]) == (0, 0)
    rows = dict(zip(PATHS, Relevance().measure(subject), strict=True))
    assert not rows["unused"].any()
    assert (rows["head"][:2] > 0).all()


def test_damage_is_the_share_times_the_relative_error(subject: Subject) -> None:
    score = Relevance(rule="gamma")
    relevances = score.relevances(subject)
    total, quantiser = sum(relevances.values()), subject.network.space.quantiser
    assert len(set(relevances.values())) == len(subject.sites)
    for site, row in zip(subject.sites, score.measure(subject), strict=True):
        weight = subject.network.model.get_parameter(f"{site.module}.weight").detach()
        for bit, damage in zip((2, 4), row[:2], strict=True):
            change = (Quantiser.fake(quantiser(bit), weight) - weight).numpy().astype(float)
            error = (change**2).sum() / (weight.numpy().astype(float) ** 2).sum()
            assert damage == pytest.approx(relevances[site.module] / total * error, rel=1e-4)
        assert row[2] == 0


def test_the_mean_is_over_images_whatever_the_batches(subject: Subject) -> None:
    found = Relevance().relevances(subject)
    parts = [part for batch in subject.batches for part in torch.split(batch, 5)]
    again = Subject(network=subject.network, batches=parts, labels=subject.labels)
    assert Relevance().relevances(again) == pytest.approx(found, rel=1e-3)
    assert Relevance().relevances(subject) == found
    rows, repeated = Relevance().measure(subject), Relevance().measure(subject)
    assert all(np.array_equal(a, b) for a, b in zip(rows, repeated, strict=True))


@pytest.mark.parametrize("of", ["prediction", "label"])
def test_whose_logit_is_explained(of: Literal["prediction", "label"]) -> None:
    """The last layer's relevance is that logit's size."""
    model = initialised(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    images, labels = drawn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    logits = model(images).detach()
    wanted = logits.max(1)[0] if of == "prediction" else logits[range(6), labels]
    found = Relevance(of=of).relevances(toy_subject(model, images, labels, "2"))
    assert found["2"] == pytest.approx(float(wanted.abs().mean()), rel=1e-5)
    assert (labels != logits.argmax(1)).any()


def test_the_model_is_left_as_it_was(subject: Subject) -> None:
    model = copy.deepcopy(subject.network.model).train()
    first = next(iter(model.parameters())).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooked = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    propagate(model, subject.batches[0][:2], [site.module for site in subject.sites], Rules(rule="gamma"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()] == hooked
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not first.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not subject.batches[0].requires_grad
    assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]


class Unknown(nn.Module):
    def __init__(self, computed: Any) -> None:
        super().__init__()
        self.computed = computed

    def forward(self, features: Tensor) -> Tensor:
        changed: Tensor = self.computed(features)
        return changed


def _written_unread(features: Tensor) -> Tensor:
    changed = features * 1
    changed.add_(5)
    return changed


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Softplus(), "\"Softplus at '1'\" computes 'softplus', for which there is no rule"),
        (Unknown(lambda x: x**2), "Unknown at '1'\" computes 'pow'"),
        (Unknown(lambda x: x / x.norm()), "Unknown.*computes '.*norm'"),
        (Unknown(lambda x: 1 / x), "Unknown.*computes '(reciprocal|__rdiv__)'"),
        (Unknown(lambda x: functional.linear(x, x)), "Unknown.*has weights that depend on the input"),
        (nn.BatchNorm1d(5, track_running_stats=False), "BatchNorm1d.*statistics of the batch"),
        (nn.ConstantPad1d((1, 0), 2.0), "ConstantPad1d.*pads with 2.0"),
        (Unknown(_written_unread), "Sequential.*writes in place"),
        (Unknown(torch.sign), "Unknown.*computes 'sign'"),
        (Unknown(Tensor.detach), "Sequential.*logits of the shape"),
        (nn.Unflatten(1, (5, 1)), "Sequential.*logits of the shape"),
    ],
)
def test_what_it_cannot_pass_through_is_refused(module: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Identity(), module).double()
    subject = toy_subject(model, drawn(5, 5), torch.zeros(5, dtype=torch.long), "1", batch=5)
    with pytest.raises(InputError, match=message) as caught:
        Relevance().relevances(subject)
    assert caught.value.field == "score.relevance"
    assert not _get_current_function_mode_stack()  # type: ignore[no-untyped-call]


def test_options_and_sites_are_checked() -> None:
    with pytest.raises(InputError, match=r"score\.epsilon: -1 is negative"):
        Relevance(epsilon=-1)
    with pytest.raises(InputError, match=r"score\.gamma: inf is negative or not finite"):
        Relevance(gamma=float("inf"))
    site = Site(id="0:activations", kind="activation-bits", domain=(4, 32), module="0")
    subject = toy_subject(nn.Sequential(nn.Linear(5, 3)), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), "0")
    subject.sites = [site]
    with pytest.raises(InputError, match="activation-bits, which a score of weights does not see"):
        Relevance().measure(subject)
