"""Curvature of single sites, and what pairs of them lose together beyond that."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from archfront.evaluators.compression.scores.perturbation import Hessian
from archfront.evaluators.compression.scores.score import Score, Subject, Vector
from archfront.spaces.policies.policy_space import Variant


class AugmentedHessian(Score):
    """``d_i + 1/2 sum_j max(k_ij, 0)`` with ``d_i = 1/2 t_i |dW_i|^2`` and ``k_ij = dL(i, j) - dL(i) - dL(j)``.

    ``t_i`` is the mean curvature of the loss at the site's weights, ``dL`` the rise of the loss when one site or two
    of them take a choice; pairs are those of a site with the next ones, in the order in which they run. The paper's own
    formula is not published with its abstract; this is the reconstruction of policies.md, A3.

    Source: Schaefer et al., "Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training
    Quantization", 2023.

    Args:
        draws: vectors of Hutchinson's estimator for each batch.
        neighbours: how many sites behind a site are paired with it.
    """

    name: ClassVar[str] = "augmented-hessian"

    def __init__(self, *, draws: Annotated[int, Field(ge=1)] = 8, neighbours: Annotated[int, Field(ge=0)] = 2) -> None:
        self.draws, self.neighbours = draws, neighbours

    def measure(self, subject: Subject) -> list[Vector]:
        found = [row / 2 for row in Hessian(draws=self.draws).measure(subject)]
        for pair, terms in self.pair_terms(subject).items():
            for i in pair:
                found[i] = found[i] + np.maximum(terms, 0.0) / 2
        return found

    def pair_terms(self, subject: Subject) -> dict[tuple[int, int], Vector]:
        """``k_ij`` for each choice that both sites of a pair have at the same place of their domains."""
        space = subject.network.space
        sites = subject.sites
        alone: dict[tuple[int, ...], Variant] = {
            (i, c): space.alone(site, choice) for i, site in enumerate(sites) for c, choice in enumerate(site.domain)
        }
        untouched = space.untouched()
        pairs = [(i, j) for i in range(len(sites)) for j in range(i + 1, min(i + 1 + self.neighbours, len(sites)))]
        both: dict[tuple[int, ...], Variant] = {}
        for i, j in pairs:
            for c in range(min(len(sites[i].domain), len(sites[j].domain))):
                # Two decisions about one layer have no policy in common that is not one of theirs.
                second = {key: value for key, value in alone[j, c].items() if value != untouched[key]}
                both[i, j, c] = {**alone[i, c], **second}
        rises = _rises(subject, [untouched, *alone.values(), *both.values()])
        single = dict(zip(alone, rises[1:], strict=False))
        joint = dict(zip(both, rises[1 + len(alone) :], strict=True))
        return {
            (i, j): np.array(
                [
                    joint[i, j, c] - single[i, c] - single[j, c]
                    for c in range(min(len(sites[i].domain), len(sites[j].domain)))
                ]
            )
            for i, j in pairs
        }


def _rises(subject: Subject, policies: list[Variant]) -> list[float]:
    """The mean loss of each policy less that of the first."""
    sums = torch.zeros(len(policies), dtype=torch.float64)
    start = 0
    for batch in subject.batches:
        labels = subject.labels[start : start + len(batch)]
        start += len(batch)
        for row, logits in enumerate(subject.network.outputs(batch, policies)):
            sums[row] += float(functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum"))
    means = sums / subject.labels.numel()
    return [float(value) for value in means - means[0]]
