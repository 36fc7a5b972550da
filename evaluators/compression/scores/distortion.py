"""Scores of what one compressed site does to the network's output, or to its own."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from archfront.evaluators.compression.scores.logits import cross_entropy, rows
from archfront.evaluators.compression.scores.score import Score, Subject, Vector

Measure = Literal["mse", "sqnr", "kl", "loss", "cosine"]


class Distortion(Score):
    """How far the logits move when one site alone is compressed, and all others are left as they are.

    Args:
        of: ``mse``: mean squared difference; ``sqnr``: ``-10 log10`` of signal over noise, in dB, shifted so that the
            least of all is 0; ``kl``: divergence of the class probabilities from the network's own; ``loss``: rise of
            the cross entropy, which may be negative; ``cosine``: 1 minus the cosine.
    """

    name: ClassVar[str] = "distortion"

    def __init__(self, *, of: Measure = "kl") -> None:
        self.of = of

    def measure(self, subject: Subject) -> list[Vector]:
        found = [np.zeros(len(site.domain)) for site in subject.sites]
        space = subject.network.space
        untouched = space.untouched()
        alone = {
            (i, c): space.alone(site, choice)
            for i, site in enumerate(subject.sites)
            for c, choice in enumerate(site.domain)
        }
        tried = [place for place, policy in alone.items() if policy != untouched]
        policies = [alone[place] for place in tried]
        if not tried:
            return found
        network = subject.network
        sums = np.zeros(len(tried))
        signal, start = 0.0, 0
        for batch in subject.batches:
            labels = subject.labels[start : start + len(batch)]
            start += len(batch)
            with torch.no_grad():
                own = network.model(batch)
            signal += float(own.square().sum())
            for k, logits in enumerate(network.outputs(batch, policies)):
                sums[k] += self._sum(own, logits, labels)
        values = sums / subject.labels.numel()
        if self.of == "sqnr":
            values = 10 * np.log10(np.maximum(sums, 1e-30) / max(signal, 1e-30))
            values -= values.min()
        for (i, c), value in zip(tried, values, strict=True):
            found[i][c] = value
        return found

    def _sum(self, own: Tensor, logits: Tensor, labels: Tensor) -> float:
        """Over the images of a batch, or the places of its sequences."""
        own, logits = rows(own), rows(logits)
        if self.of in ("mse", "sqnr"):
            squares = (logits - own).square()
            return float(squares.mean(1).sum() if self.of == "mse" else squares.sum())
        if self.of == "cosine":
            return float((1 - functional.cosine_similarity(logits, own, dim=1)).sum())
        if self.of == "loss":
            before, after = (cross_entropy(x, labels, reduction="sum") for x in (own, logits))
            return float(after - before)
        target = functional.log_softmax(own, 1)
        return float(functional.kl_div(functional.log_softmax(logits, 1), target, reduction="sum", log_target=True))
