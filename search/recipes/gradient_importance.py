"""Gradient-based importance for post-training quantisation, in the line of "Challenging the Status Quo" (2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.perturbation import Taylor
from archfront.search.allocators.linear_programme import Milp
from archfront.search.recipes.recipe import Recipe


class GradientImportance(Recipe):
    """Minimises ``sum |g dW|``, the first-order change of the loss entry by entry, within the budget.

    The paper's own formula is not published with its abstract; BRECQ's block reconstruction, which it goes with, is in
    ``evaluators.compression.recovery.adaround`` and not part of this.
    """

    name = "gradient-importance"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4, 8], "activations": "float"}

    def score(self) -> Taylor:
        return Taylor(form="absolute")

    def allocator(self) -> Milp:
        return Milp()
