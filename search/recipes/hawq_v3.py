"""HAWQ-V3 (Yao et al., ICML 2021): 4 and 8 bits by a linear programme over Hessian-weighed errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.perturbation import Hessian
from archfront.search.allocators.linear_programme import Milp
from archfront.search.recipes.recipe import Recipe


class HawqV3(Recipe):
    """Minimises ``sum_i Tr(H_i) / n_i |Q_b(W_i) - W_i|^2`` within the budget; layers that read one tensor are tied.

    The paper leaves the first convolution and the classifier at 8 bits (``keep`` of the job), and trains the result
    further, which this does not.
    """

    name = "hawq-v3"
    space: ClassVar[Mapping[str, Any]] = {"weights": [4, 8], "activations": "follow"}

    def score(self) -> Hessian:
        return Hessian(draws=8)

    def allocator(self) -> Milp:
        return Milp()
