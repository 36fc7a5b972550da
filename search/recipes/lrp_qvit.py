"""LRP-QViT (Ranjan and Savakis, 2024): bits of a vision transformer's layers by their relevance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.relevance import Relevance
from archfront.search.allocators.linear_programme import Milp
from archfront.search.recipes.recipe import Recipe


class LrpQvit(Recipe):
    """Minimises ``sum_i s_i |Q_b(W_i) - W_i|^2 / |W_i|^2`` within the budget, ``s_i`` the share of relevance; then what
    layers read behind layer normalisations gets a scale for each channel, folded into the network.

    The paper's own rule from relevance to bits is not published with its abstract. It also quantises the products of
    attention, which are no sites here.
    """

    name = "lrp-qvit"
    space: ClassVar[Mapping[str, Any]] = {"weights": [4, 6, 8], "activations": "follow"}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ({"name": "layer-norm-folding"},)
    images = 32

    def score(self) -> Relevance:
        return Relevance()

    def allocator(self) -> Milp:
        return Milp()
