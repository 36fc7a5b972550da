"""Scores of pairs, and of two groups: against losses of networks that are really built, and against their parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.support.small_models import RESNET, bits, digits
from torch.nn import functional

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.by_group import ByGroup
from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.evaluators.compression.scores.pairs import AugmentedHessian
from archfront.evaluators.compression.scores.perturbation import Hessian
from archfront.evaluators.compression.scores.score import Subject
from archfront.evaluators.training_loop import torch_threads


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with torch_threads(1):
        space = bits("resnet", weights=[2, 4, 32], activations="float")
        yield Subject.of(Compressible(space, digits(RESNET), 32), 48)


def loss(subject: Subject, low: dict[int, int]) -> float:
    """Of a network built with these sites at these bits, and all others in float."""
    space = subject.network.space
    genotype = [low.get(i, 32) for i in range(len(space.sites))]
    model = space.build(genotype).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in subject.batches])
    return float(functional.cross_entropy(logits, subject.labels))


def test_pair_terms_are_what_two_sites_lose_beyond_each_alone(subject: Subject) -> None:
    terms = AugmentedHessian(neighbours=2).pair_terms(subject)
    count = len(subject.sites)
    assert set(terms) == {(i, j) for i in range(count) for j in range(i + 1, min(i + 3, count))}
    for i, j in [(0, 1), (2, 4)]:
        for c, width in enumerate([2, 4, 32]):
            whole, one, other, both = (loss(subject, low) for low in ({}, {i: width}, {j: width}, {i: width, j: width}))
            assert terms[i, j][c] == pytest.approx(both - one - other + whole, abs=2e-4)
        assert terms[i, j][2] == 0


def test_dependencies_are_added_to_half_of_the_curvature(subject: Subject) -> None:
    score = AugmentedHessian(draws=2, neighbours=2)
    found, curvature, terms = score.measure(subject), Hessian(draws=2).measure(subject), score.pair_terms(subject)
    for i, row in enumerate(found):
        mine = [np.maximum(value, 0) for pair, value in terms.items() if i in pair]
        assert row == pytest.approx(curvature[i] / 2 + np.sum(mine, axis=0) / 2)
    alone = AugmentedHessian(draws=2, neighbours=0).measure(subject)
    assert all(row == pytest.approx(half / 2) for row, half in zip(alone, curvature, strict=True))


def test_each_group_has_its_own_score(subject: Subject) -> None:
    found = ByGroup(pool=["layer3.*", "linear:*"], first={"name": "distortion", "of": "loss"}).measure(subject)
    first, rest = Distortion(of="loss").measure(subject), Distortion(of="sqnr").measure(subject)
    for site, row, one, other in zip(subject.sites, found, first, rest, strict=True):
        inside = site.id.startswith(("layer3.", "linear:"))
        assert row == pytest.approx(one if inside else other)
    with pytest.raises(InputError, match=r"score\.pool"):
        ByGroup(pool=[])
    with pytest.raises(InputError, match=r"score\.first\.name"):
        ByGroup(first={"name": "distorsion"})
