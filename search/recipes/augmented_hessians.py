"""Augmented Hessians (Schaefer et al., 2023): curvature with dependencies between layers, and bisection on accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.pairs import AugmentedHessian
from archfront.search.allocators.bisection import Bisection
from archfront.search.recipes.recipe import Recipe


class AugmentedHessians(Recipe):
    """Precision after precision, bisection finds how many of the least sensitive layers can go lower while accuracy on
    training images stays within 1 %; a budget that is still exceeded is met by lowering on in the same order.

    The paper bounds accuracy alone and reports the latency that this saves.
    """

    name = "augmented-hessians"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 3, 4, 6, 8], "activations": "float"}
    images = 512

    def score(self) -> AugmentedHessian:
        return AugmentedHessian()

    def allocator(self) -> Bisection:
        return Bisection(tolerance=0.99)
