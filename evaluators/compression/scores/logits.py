"""Logits of images, and of tokens in sequences, as rows of one table."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional


def rows(logits: Tensor) -> Tensor:
    """``(n, classes)`` as they are; ``(n, places, classes)`` as ``(n * places, classes)``."""
    return logits.flatten(0, -2)


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Over all labels, ``(n,)`` or ``(n, places)``, of logits with an axis of classes behind theirs."""
    return functional.cross_entropy(rows(logits), labels.flatten(), reduction=reduction)
