"""EvoNorm's rejection protocols: planted divergent programmes are rejected, published layers are not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.datasets import load
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.evaluators.evonorm_protocols import LARGEST, EvonormProtocols, worst_gradient_norm
from archfront.evaluators.registry import EVALUATORS
from archfront.spaces.evonorm import EvoNorm
from archfront.spaces.evonorm_anchors import Anchor
from archfront.spaces.evonorm_programmes import NAMED, Programme
from archfront.spaces.skan import SKan

SPACE = EvoNorm(width=8, resolution=8, in_channels=1, groups=4)
CONTEXT = EvaluationContext(space=SPACE, data={"name": "digits"})
RESNET = {"resnet": Anchor(kind="resnet", width=8)}
DIVERGENT = {
    "exponential of an exponential": Programme.of(("exp", "x"), ("exp", "n0")),
    "chain of squares": Programme.of(("square", "x"), ("square", "n0"), ("square", "n1")),
    "cube": Programme.of(("square", "x"), ("mul", "x", "n0")),
    "divided by zero": Programme.of(("div", "x", "zeros")),
    "reciprocal": Programme.of(("div", "v1", "x")),
    "divided by its logarithm": Programme.of(("log", "x"), ("div", "x", "n0")),
    "exponential weight": Programme.of(("exp", "x"), ("mul", "x", "n0")),
}
USELESS = {
    "constant": Programme.of(("tanh", "v1")),
    "one number per image": Programme.of(("mean_hwc", "x")),
}
UNNORMALISED = {
    "relu": Programme.of(("max", "x", "zeros")),
    "silu": Programme.of(("sigmoid", "x"), ("mul", "x", "n0")),
}


def judged(programme: Programme, seed: int = 7, **settings: Any) -> dict[str, float]:
    evaluator = EvonormProtocols(**{"anchors": RESNET, **settings})
    genotype = SPACE.genotype(programme)
    task = Task(number=0, genotype=genotype, key="", fidelity=0, repeat=0, seed=seed)
    [result] = evaluator.evaluate([task], CONTEXT)
    assert isinstance(result, Evaluated), result
    assert set(result.metrics) == {spec.name for spec in evaluator.metrics}
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert all(math.isfinite(value) for value in values.values())
    return values


@pytest.mark.parametrize("name", ["bn-relu", "evonorm-b0", "evonorm-s0"])
def test_published_layers_pass(name: str) -> None:
    found = judged(NAMED[name])
    assert found["rejected"] == 0
    assert found["accuracy_resnet"] > 60
    assert found["gradient_norm"] < 1e4


@pytest.mark.parametrize("name", sorted(DIVERGENT | USELESS))
def test_programmes_that_diverge_or_learn_nothing_are_rejected(name: str) -> None:
    found = judged((DIVERGENT | USELESS)[name])
    assert found["rejected"] == 1
    assert found["accuracy_resnet"] < 20
    # What is no number is no class either, although argmax takes it for the first.
    assert name != "exponential of an exponential" or found["accuracy_resnet"] == 0


@pytest.mark.parametrize("name", sorted(UNNORMALISED))
def test_what_learns_but_does_not_normalise_is_rejected_for_its_gradients(name: str) -> None:
    found = judged(UNNORMALISED[name])
    assert found["accuracy_resnet"] > 60
    assert found["gradient_norm"] > 1e8
    assert found["rejected"] == 1
    assert judged(UNNORMALISED[name], ascent_steps=1)["rejected"] == 0


def test_one_failing_anchor_rejects_and_all_are_reported() -> None:
    """Group moments of single channels before an average over places leave the ResNet nothing to classify by."""
    space = EvoNorm(width=8, resolution=8, in_channels=1)
    anchors = {"small": Anchor(width=4), "inverted": Anchor(kind="mobilenet", width=8)}
    evaluator = EvonormProtocols(anchors=anchors, quality_steps=30, steps=30, floor=55)
    task = Task(number=0, genotype=space.known["evonorm-s0"], key="", fidelity=0, repeat=0, seed=7)
    [result] = evaluator.evaluate([task], EvaluationContext(space=space, data={"name": "digits"}))
    assert isinstance(result, Evaluated)
    assert result.metrics["accuracy_small"].value < 55 < result.metrics["accuracy_inverted"].value
    assert result.metrics["rejected"].value == 1


def test_only_candidates_that_pass_are_trained_on() -> None:
    short = {"quality_steps": 20, "ascent_steps": 2, "floor": 0.0}
    first = judged(NAMED["evonorm-b0"], steps=20, **short)
    assert judged(NAMED["evonorm-b0"], steps=20, **short) == first
    assert judged(NAMED["evonorm-b0"], steps=20, seed=8, **short) != first
    longer = judged(NAMED["evonorm-b0"], steps=60, **short)
    assert longer["accuracy_resnet"] > first["accuracy_resnet"]
    rejected = judged(NAMED["evonorm-b0"], steps=60, **{**short, "floor": 100.0})
    assert rejected["rejected"] == 1
    assert rejected["accuracy_resnet"] == first["accuracy_resnet"]


class _Scaled(nn.Module):
    """Logits that are the convolution's output times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images).mean(dim=(2, 3)) * self.factor
        return logits


def test_the_network_under_attack_has_no_branch_of_zeros() -> None:
    """Weights inside a branch that is multiplied by 0 would have no gradient."""
    programme = NAMED["evonorm-b0"]
    found = judged(programme, quality_steps=1, steps=1, floor=100.0)["gradient_norm"]
    data = load({"name": "digits"}, 8, 1)
    images, labels = data.part("train")
    chosen = torch.from_numpy(np.random.default_rng([7, 0]).permutation(len(labels))[:32])
    norms = []
    for zero_init in (False, True):
        torch.manual_seed(7)
        model = SPACE.build_anchor(SPACE.genotype(programme), RESNET["resnet"], zero_init=zero_init)
        nn.functional.cross_entropy(model(data.normalised(images[chosen])), labels[chosen]).backward()
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all(weight.grad is not None and weight.grad.any() for weight in weights) is not zero_init
        norms.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).norm())
    assert math.isclose(found, float(norms[0]), rel_tol=1e-4)
    assert not math.isclose(found, float(norms[1]), rel_tol=1e-2)


def batches() -> Any:
    torch.manual_seed(0)
    batch = (torch.randn(8, 1, 3, 3) + 1, torch.arange(8) % 2)
    while True:
        yield batch


def test_the_ascent_raises_the_norm_and_stops_above_the_limit() -> None:
    def norm(steps: int, factor: float = 1.0, limit: float = 1e8) -> float:
        torch.manual_seed(1)
        return worst_gradient_norm(_Scaled(factor), batches(), steps=steps, rate=0.1, limit=limit)

    start = norm(0)
    torch.manual_seed(1)
    model = _Scaled(1.0)
    images, labels = next(batches())
    nn.functional.cross_entropy(model(images), labels).backward()
    assert math.isclose(start, float(model.conv.weight.grad.norm()), rel_tol=1e-5)  # type: ignore[union-attr]
    assert norm(20) > 1.2 * start
    # The limit is passed at the start: the ascent changes nothing.
    assert norm(20, limit=start / 2) == start
    assert norm(3, factor=float("inf")) == LARGEST


def test_every_kind_of_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="anchors"):
        EvonormProtocols(anchors={})
    with pytest.raises(InputError, match="quality_steps"):
        EvonormProtocols(steps=50)
    with pytest.raises(InputError, match=r"space\.name"):
        EvonormProtocols().check(EvaluationContext(space=SKan(resolution=8, in_channels=1), data={"name": "digits"}))
    with pytest.raises(InputError, match="batch"):
        EvonormProtocols(batch=4000).check(CONTEXT)
    EvonormProtocols().check(CONTEXT)
    config = {"name": "evonorm-protocols", "anchors": {"one": {"kind": "mobilenet", "width": 4}}}
    built = EVALUATORS.build(config, "evaluators")
    assert [spec.name for spec in built.metrics] == ["accuracy_one", "gradient_norm", "rejected"]
    with pytest.raises(InputError, match="momentum"):
        EVALUATORS.build({"name": "evonorm-protocols", "momentum": 2}, "evaluators")
