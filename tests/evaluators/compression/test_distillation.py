"""Distillation losses against their formulas, written out."""

import math

import pytest
import torch
from torch import Tensor

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.distillation import channel_wise_distillation, distillation_loss


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def divergence(teacher: list[float], student: list[float], temperature: float) -> float:
    wanted, given = softmax(teacher, temperature), softmax(student, temperature)
    return sum(p * math.log(p / q) for p, q in zip(wanted, given, strict=True))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_logits(temperature: float, weight: float) -> None:
    student, teacher, labels = random(5, 4, seed=0), random(5, 4, seed=1), torch.tensor([0, 3, 1, 1, 2])
    kl = sum(divergence(t, s, temperature) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)) / 5
    ce = -sum(math.log(softmax(s, 1)[k]) for s, k in zip(student.tolist(), labels.tolist(), strict=True)) / 5
    got = distillation_loss(student, teacher, labels, temperature, weight)
    assert float(got) == pytest.approx(weight * temperature**2 * kl + (1 - weight) * ce, rel=1e-5)


def test_channels() -> None:
    student, teacher = random(3, 2, 4, 5, seed=0), random(3, 2, 4, 5, seed=1)
    pairs = zip(teacher.flatten(2).flatten(0, 1).tolist(), student.flatten(2).flatten(0, 1).tolist(), strict=True)
    expected = 3.0**2 / 2 * sum(divergence(t, s, 3.0) for t, s in pairs) / 3
    assert float(channel_wise_distillation(student, teacher, 3.0)) == pytest.approx(expected, rel=1e-5)
    # Adding a constant to a channel moves no saliency.
    shifted = student + random(3, 2, 1, 1, seed=2)
    assert float(channel_wise_distillation(shifted, student, 3.0)) == pytest.approx(0, abs=1e-5)


def test_only_the_student_learns() -> None:
    student, teacher = random(3, 4, seed=0).requires_grad_(), random(3, 4, seed=1).requires_grad_()
    distillation_loss(student, teacher, torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None
    features, of_teacher = random(2, 3, 2, 2, seed=0).requires_grad_(), random(2, 3, 2, 2, seed=1).requires_grad_()
    channel_wise_distillation(features, of_teacher).backward()  # type: ignore[no-untyped-call]
    assert of_teacher.grad is None
    assert features.grad is not None


def test_wrong_inputs_are_refused() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(InputError, match="teacher's shape"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 4), labels)
    with pytest.raises(InputError, match="temperature"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 3), labels, 0)
    with pytest.raises(InputError, match="weight"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 3), labels, 1, 1.5)
    with pytest.raises(InputError, match="feature maps"):
        channel_wise_distillation(torch.ones(2, 3), torch.ones(2, 3))
