"""Allocation by what each site alone does to the output, as ZeroQuant-V2 and MixDQ measure it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.search.allocators.linear_programme import Milp
from archfront.search.recipes.recipe import Recipe


class LeaveOneIn(Recipe):
    """Minimises the summed divergence of the class probabilities, one site at a time, within the budget."""

    name = "leave-one-in"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4, 8], "activations": "follow"}

    def score(self) -> Distortion:
        return Distortion(of="kl")

    def allocator(self) -> Milp:
        return Milp()
