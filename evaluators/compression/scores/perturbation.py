"""Scores of the change that quantisation makes to weights: its size, weighed by curvature or by the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from archfront.errors import InputError
from archfront.evaluators.compression.scores.logits import cross_entropy
from archfront.evaluators.compression.scores.score import Score, Subject, Vector, is_identity
from archfront.spaces.policies.site import Site, tied_groups


class Perturbation(Score):
    """Squared norm of the change of a site's weights, ``|Q_b(W) - W|^2``. Needs no data."""

    name: ClassVar[str] = "perturbation"

    def measure(self, subject: Subject) -> list[Vector]:
        return [_each(site, lambda change: float(change.square().sum()), subject) for site in weight_sites(subject)]


class Outliers(Score):
    """Share of weights that lie more than one deviation from their mean, times how much of their range a choice drops.

    Layer-Wise Quantization's ZD (policies.md, A2): the *lower* the share, the more important the layer; it is 0.317 for
    Gaussian weights. Damage is ``(1 - share) 2^-b``; that of sites that are tied adds up to the one of the share of all
    their weights, so that a decision about many layers weighs no more than one about few. Needs no data.
    """

    name: ClassVar[str] = "outliers"

    def measure(self, subject: Subject) -> list[Vector]:
        sites = weight_sites(subject)
        weights = [_weight(subject, site) for site in sites]
        shares = [float(((w - w.mean()).abs() > w.std()).float().mean()) for w in weights]
        found = [np.zeros(len(site.domain)) for site in sites]
        for group in tied_groups(sites):
            count = sum(weights[i].numel() for i in group)
            for i in group:
                found[i] = (1 - shares[i]) * (weights[i].numel() / count) * steps(sites[i])
        return found


@dataclass(frozen=True)
class Trace:
    """An estimate, and its standard error over the vectors (0 of a single one)."""

    mean: float
    error: float

    @property
    def at_least(self) -> float:
        """What a layer's damage goes by: none is harmless by chance."""
        return max(self.mean, self.error, 0.0)


class Hessian(Score):
    """Mean curvature of the loss at a site's weights times the squared norm of their change.

    HAWQ-V2 and V3: ``Tr(H_i) / n_i |Q_b(W_i) - W_i|^2``, the trace by Hutchinson's estimator, the mean of ``v^T H v``
    over vectors of +1 and -1. A mean below its standard error counts as that: few vectors give some layers of a deep
    network a trace of about 0 or less by chance, and whoever takes these for harmless gives them the fewest bits.

    Args:
        draws: vectors for each batch.

    Raises:
        InputError: no draw.
    """

    name: ClassVar[str] = "hessian"

    def __init__(self, *, draws: int = 8) -> None:
        if draws < 1:
            raise InputError("score.draws", draws, "is not positive", "Give 1 or more.")
        self.draws = draws

    def measure(self, subject: Subject) -> list[Vector]:
        sites = weight_sites(subject)
        traces = self.traces(subject)
        return [
            _each(
                site,
                lambda change, site=site: traces[site.module].at_least * float(change.square().sum()) / change.numel(),
                subject,
            )
            for site in sites
        ]

    def traces(self, subject: Subject) -> dict[str, Trace]:
        """Path -> trace of the Hessian of the mean loss with respect to its weight."""
        paths = [site.module for site in weight_sites(subject)]
        weights = [_parameter(subject, path) for path in paths]
        generator = torch.Generator().manual_seed(subject.seed)
        sums = torch.zeros(self.draws, len(paths), dtype=torch.float64)
        images = 0
        model = subject.network.model
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for batch, labels in _with_labels(subject):
                loss = cross_entropy(model(batch), labels)
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                for draw in range(self.draws):
                    vectors = [_signs(weight, generator) for weight in weights]
                    products = torch.autograd.grad(gradients, weights, vectors, retain_graph=True)
                    found = [float((v * hv).sum()) for v, hv in zip(vectors, products, strict=True)]
                    sums[draw] += torch.tensor(found, dtype=torch.float64) * len(batch)
                images += len(batch)
        each = sums / images
        errors = each.std(dim=0) / self.draws**0.5 if self.draws > 1 else torch.zeros(len(paths))
        estimates = map(Trace, each.mean(dim=0).tolist(), errors.tolist())
        return dict(zip(paths, estimates, strict=True))


class Taylor(Score):
    """First-order change of the loss by a site's change.

    Args:
        form: ``absolute``: ``sum |g dW|``; ``signed``: ``|sum g dW|``; ``squared``: ``(sum g dW)^2``; each with the
            gradient of every batch, averaged over the batches.
    """

    name: ClassVar[str] = "taylor"

    def __init__(self, *, form: Literal["absolute", "signed", "squared"] = "absolute") -> None:
        self.form = form

    def measure(self, subject: Subject) -> list[Vector]:
        sites = weight_sites(subject)
        found = [np.zeros(len(site.domain)) for site in sites]
        weights = [_parameter(subject, site.module) for site in sites]
        for batch, labels in _with_labels(subject):
            loss = cross_entropy(subject.network.model(batch), labels)
            gradients = torch.autograd.grad(loss, weights)
            for row, site, gradient in zip(found, sites, gradients, strict=True):
                row += _each(site, lambda change, g=gradient: self._of(change * g), subject) / len(subject.batches)
        return found

    def _of(self, products: Tensor) -> float:
        if self.form == "absolute":
            return float(products.abs().sum())
        total = float(products.sum())
        return abs(total) if self.form == "signed" else total**2


class ZerothOrder(Score):
    """Gradient norm of a site by two losses, ``|L(W + e z) - L(W - e z)| / 2e``, times the norm of its change.

    ECoFLaP (policies.md, C7): no backward pass. ``z`` is Gaussian, the same for both signs.

    Args:
        epsilon: step.
        draws: of z.

    Raises:
        InputError: a number that is not positive.
    """

    name: ClassVar[str] = "zeroth-order"

    def __init__(self, *, epsilon: float = 1e-3, draws: int = 1) -> None:
        for field, number in (("epsilon", epsilon), ("draws", draws)):
            if not number > 0:
                raise InputError(f"score.{field}", number, "is not positive", "Give more than 0.")
        self.epsilon, self.draws = epsilon, draws

    def measure(self, subject: Subject) -> list[Vector]:
        slopes = self.slopes(subject)
        return [
            _each(site, lambda change, s=slopes[site.module]: s * float(change.norm()), subject)
            for site in weight_sites(subject)
        ]

    def slopes(self, subject: Subject) -> dict[str, float]:
        """Path -> mean absolute slope of the loss along random directions."""
        found = {}
        generator = torch.Generator().manual_seed(subject.seed)
        with torch.no_grad():
            for site in weight_sites(subject):
                weight = _parameter(subject, site.module)
                kept, total = weight.clone(), 0.0
                for _ in range(self.draws):
                    step = torch.randn(weight.shape, generator=generator) * self.epsilon
                    losses = []
                    for sign in (1, -1):
                        weight.copy_(kept + sign * step)
                        losses.append(_loss(subject))
                    total += abs(losses[0] - losses[1]) / (2 * self.epsilon)
                weight.copy_(kept)
                found[site.module] = total / self.draws
        return found


def weight_sites(subject: Subject) -> list[Site]:
    """All sites, if they are of weights.

    Raises:
        InputError: one is not.
    """
    for site in subject.sites:
        if site.kind != "weight-bits":
            problem = f"is a choice of {site.kind}, which a score of weights does not see"
            raise InputError("score", site.id, problem, "Choose 'distortion', or activations: follow or float.")
    return list(subject.sites)


def steps(site: Site) -> Vector:
    """``2^-b`` of each choice ``b`` of bits, 0 for none: ``(choices,)``."""
    return np.array([0.0 if is_identity(bits) else 2.0 ** -int(bits) for bits in site.domain])


def _weight(subject: Subject, site: Site) -> Tensor:
    return _parameter(subject, site.module).detach()


def _parameter(subject: Subject, path: str) -> nn.Parameter:
    weight = subject.network.model.get_submodule(path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _each(site: Site, price: object, subject: Subject) -> Vector:
    """A price of the change that each choice makes to a site's weight."""
    assert callable(price)
    weight = _weight(subject, site)
    prices = [0.0 if is_identity(b) else price(subject.quantiser(int(b)).fake(weight) - weight) for b in site.domain]
    return np.array(prices, dtype=np.float64)


def _with_labels(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    sizes = [len(batch) for batch in subject.batches]
    return list(zip(subject.batches, torch.split(subject.labels, sizes), strict=True))


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1


def _loss(subject: Subject) -> float:
    losses = [
        float(cross_entropy(subject.network.model(batch), labels, reduction="sum"))
        for batch, labels in _with_labels(subject)
    ]
    return sum(losses) / subject.labels.numel()
