"""A score of how much of the network's decision passes a site."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.relevance_rules import Attention, RelevanceTracer, Rule, Rules
from archfront.evaluators.compression.scores.score import Score, Subject, Vector, is_identity
from archfront.spaces.policies.site import Site


class Relevance(Score):
    """A layer's share of relevance times the relative error of its quantised weights, ``s_i |Q_b(W) - W|^2 / |W|^2``.

    LRP-QViT (policies.md, A4). Relevance is the sum of absolute relevance of the layer's output, by layer-wise
    relevance propagation, averaged over the images; ``s_i`` is it over the sum of all sites. A layer that the
    logits do not depend on has none. With attention ``detached`` neither has one that feeds queries or keys alone:
    choose ``shared`` where these are layers of their own.

    Args:
        rule: of linear layers and convolutions, ``epsilon`` or ``gamma``.
        epsilon: added to the size of each denominator.
        gamma: how much more contributions count that have the sign of the output.
        of: whose logit is explained: the network's own ``prediction``, or the ``label``.
        attention: whether attention weights are ``detached``, or are ``shared`` relevance with.

    Raises:
        InputError: a number that is negative or not finite.
    """

    name: ClassVar[str] = "relevance"

    def __init__(
        self,
        *,
        rule: Rule = "epsilon",
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        of: Literal["prediction", "label"] = "prediction",
        attention: Attention = "detached",
    ) -> None:
        for field, number in (("epsilon", epsilon), ("gamma", gamma)):
            if not 0 <= number < math.inf:
                raise InputError(f"score.{field}", number, "is negative or not finite", "Give 0 or more.")
        self.rules = Rules(rule=rule, epsilon=epsilon, gamma=gamma, attention=attention)
        self.of = of

    def measure(self, subject: Subject) -> list[Vector]:
        for site in subject.sites:
            if site.kind != "weight-bits":
                problem = f"is a choice of {site.kind}, which a score of weights does not see"
                raise InputError("score", site.id, problem, "Choose 'distortion', or activations: follow or float.")
        found = self.relevances(subject)
        # Where nothing is relevant, nothing is damaged.
        whole = sum(found.values()) or 1.0
        return [found[site.module] / whole * _relative_errors(subject, site) for site in subject.sites]

    def relevances(self, subject: Subject) -> dict[str, float]:
        """Path of each site's layer -> mean over the images of its absolute relevance, in units of a logit.

        Raises:
            InputError: the network computes something for which there is no rule; names the module.
        """
        paths = list(dict.fromkeys(site.module for site in subject.sites))
        sums = dict.fromkeys(paths, 0.0)
        labels = torch.split(subject.labels, [len(batch) for batch in subject.batches])
        for batch, targets in zip(subject.batches, labels, strict=True):
            wanted = targets if self.of == "label" else None
            for path, value in propagate(subject.network.model, batch, paths, self.rules, wanted).layers.items():
                sums[path] += value
        return {path: value / len(subject.labels) for path, value in sums.items()}


@dataclass(frozen=True, kw_only=True)
class Propagated:
    """Relevance of a batch; ``input.sum() + absorbed`` is ``logits.sum()`` as ``epsilon`` goes to 0.

    Attributes:
        logits: that are explained, ``(n,)``.
        input: relevance of the images, of their shape.
        layers: path -> sum of absolute relevance of the layer's output, over the batch; behind a batch norm that it is
            folded with. 0 for a layer that does not matter to the logits.
        absorbed: by all that is added and does not depend on the images: biases, offsets of normalisations, class
            token, positions, and what remains of a sigmoid or softmax beside its tangent.
    """

    logits: Tensor
    input: Tensor
    layers: Mapping[str, float]
    absorbed: float


def propagate(
    model: nn.Module, images: Tensor, layers: Collection[str], rules: Rules, targets: Tensor | None = None
) -> Propagated:
    """Relevance of one logit of each image; the model itself is left alone.

    Args:
        model: ``(n, channels, height, width)`` images to ``(n, classes)`` logits; evaluated as it is in that mode.
        layers: paths of layers to look at.
        targets: classes, ``(n,)``; by default those that the network predicts.

    Raises:
        InputError: the network computes something for which there is no rule (names the module), or not logits.
    """
    if not images.is_floating_point():
        problem = "reads tokens, of which no relevance is known"
        raise InputError("score.relevance", type(model).__name__, problem, "Choose the score 'distortion'.")
    network = copy.deepcopy(model).eval().requires_grad_(False)
    own = network(images)
    images = images.detach().clone().requires_grad_()
    tracer = RelevanceTracer(network, rules)
    with torch.enable_grad(), tracer:
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.requires_grad:
        problem = "does not give logits of the shape (images, classes) that depend on its input"
        raise InputError("score.relevance", type(model).__name__, problem, "Choose the score 'perturbation'.")
    if not torch.allclose(logits, own, rtol=0.01, atol=1e-3, equal_nan=True):
        problem = "writes in place what the rules compute anew, and so has other logits under them"
        raise InputError("score.relevance", type(model).__name__, problem, "Choose the score 'perturbation'.")
    if targets is None:
        targets = logits.detach().argmax(1)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    outputs = [(path, output) for path in layers for output in tracer.outputs.get(path, [])]
    looked_at = [images, *(output for _, output in outputs), *tracer.constants]
    slopes = torch.autograd.grad(chosen.sum(), looked_at, allow_unused=True)
    relevance = [t.detach() * (torch.zeros_like(t) if g is None else g) for t, g in zip(looked_at, slopes, strict=True)]
    sums = dict.fromkeys(layers, 0.0)
    for (path, _), found in zip(outputs, relevance[1 : 1 + len(outputs)], strict=True):
        sums[path] += float(found.abs().sum(dtype=torch.float64))
    absorbed = 0.0
    for constant, found in zip(tracer.constants, relevance[1 + len(outputs) :], strict=True):
        # Minus infinity, in a mask of attention, has a slope of 0 and absorbs nothing.
        absorbed += float(found[constant.isfinite()].sum(dtype=torch.float64))
    return Propagated(logits=chosen.detach(), input=relevance[0], layers=sums, absorbed=absorbed)


def _relative_errors(subject: Subject, site: Site) -> Vector:
    """``|Q_b(W) - W|^2 / |W|^2`` of each choice."""
    weight = subject.network.model.get_submodule(site.module).weight
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    size = max(float(weight.square().sum()), torch.finfo(weight.dtype).tiny)
    changes = [
        0.0 if is_identity(b) else float((subject.quantiser(int(b)).fake(weight) - weight).square().sum())
        for b in site.domain
    ]
    return np.array(changes) / size
