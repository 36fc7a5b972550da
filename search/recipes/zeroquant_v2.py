"""ZeroQuant-V2 (Yao et al., 2023): layers by what quantising each alone costs, and low-rank compensation (LoRC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.distortion import Distortion
from archfront.search.allocators.quota import QuotaSort
from archfront.search.recipes.recipe import Recipe


class ZeroQuantV2(Recipe):
    """The layers whose quantisation alone raises the loss most get the higher widths; what the others lose is made up
    for by factors of rank 8, which are stored beside them and not part of the budget.

    The paper sorts whole models into classes of sensitivity by their perplexity; here layers are sorted.
    """

    name = "zeroquant-v2"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 3, 4, 8], "activations": "float"}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ({"name": "low-rank", "rank": 8, "bits": 8},)

    def score(self) -> Distortion:
        return Distortion(of="loss")

    def allocator(self) -> QuotaSort:
        return QuotaSort()
