"""Losses that let a compressed model learn from the model it was made of."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from archfront.errors import InputError


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0, weight: float = 0.5
) -> Tensor:
    """``weight T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - weight) CE``, means over the batch.

    ``T^2`` keeps the gradients of the first part as large as those of the second at any temperature.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student_logits, teacher_logits: ``(n, classes)``; no gradient goes to the teacher's.
        labels: ``(n,)``, classes.
        temperature: above 0.
        weight: of the teacher's part, 0 to 1.

    Raises:
        InputError: shapes that differ, a temperature or a weight out of range.
    """
    _check(student_logits, teacher_logits, temperature)
    if not 0 <= weight <= 1:
        raise InputError("distillation.weight", weight, "is no share", "Give 0 to 1.")
    wanted = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    given = functional.log_softmax(student_logits / temperature, dim=1)
    soft = functional.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
    return weight * soft + (1 - weight) * functional.cross_entropy(student_logits, labels)


def channel_wise_distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 / C sum_c KL(teacher's channel || student's)``, where a channel is the softmax over its places; batch mean.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021.

    Args:
        student, teacher: features ``(n, channels, height, width)``; no gradient goes to the teacher's. A student with
            other channels needs a 1x1 convolution first.
        temperature: above 0; the larger, the more places count.

    Raises:
        InputError: shapes that differ or are no features, or a temperature out of range.
    """
    _check(student, teacher, temperature)
    if student.dim() != 4:
        raise InputError("distillation.student", tuple(student.shape), "is no (n, c, h, w)", "Give feature maps.")
    wanted = functional.log_softmax(teacher.detach().flatten(2) / temperature, dim=2)
    given = functional.log_softmax(student.flatten(2) / temperature, dim=2)
    total = functional.kl_div(given, wanted, reduction="sum", log_target=True)
    return total * temperature**2 / (student.shape[0] * student.shape[1])


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        problem = f"is not the teacher's shape {tuple(teacher.shape)}"
        raise InputError("distillation.student", tuple(student.shape), problem, "Give both the same shape.")
    if temperature <= 0:
        raise InputError("distillation.temperature", temperature, "is no temperature", "Give more than 0.")
