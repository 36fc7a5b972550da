"""Gradient-based mixed precision with BRECQ's block reconstruction, after "Challenging the Status Quo" (2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.perturbation import Taylor
from archfront.search.allocators.linear_programme import Milp
from archfront.search.recipes.recipe import Recipe


class Brecq(Recipe):
    """Minimises ``sum |g dW|``, the first-order change of the loss entry by entry, within the budget; then the rounding
    of each block's weights is learned (Li et al., "BRECQ", 2021).

    The paper's own formula of importance is not published with its abstract. BRECQ takes 20,000 steps a block; these
    are 1,000.
    """

    name = "brecq"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4, 8], "activations": "float"}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ({"name": "adaround", "of": "blocks", "steps": 1000},)

    def score(self) -> Taylor:
        return Taylor(form="absolute")

    def allocator(self) -> Milp:
        return Milp()
