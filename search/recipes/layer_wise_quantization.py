"""Layer-Wise Quantization (Dumitru et al., 2024): the most important blocks get the higher width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.cosine_change import CosineChange
from archfront.evaluators.compression.scores.perturbation import Outliers
from archfront.evaluators.compression.scores.score import Score
from archfront.search.allocators.quota import QuotaSort
from archfront.search.recipes.recipe import Recipe


class LayerWiseQuantization(Recipe):
    """Sorts blocks by LIM, how much they turn the residual stream, and rounds their weights by GPTQ.

    The paper leaves the layers outside of the decoder blocks alone. Here they are decisions of their own; those that
    have no LIM, as embeddings of patches and heads, get the higher width first. ``keep`` takes them out of the choice.
    """

    name = "layer-wise-quantization"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4], "activations": "float", "tie": "blocks"}
    recovery: ClassVar[Sequence[Mapping[str, Any]]] = ({"name": "gptq"},)

    def score(self) -> Score:
        return CosineChange()

    def allocator(self) -> QuotaSort:
        return QuotaSort()


class LayerWiseQuantizationZd(LayerWiseQuantization):
    """Sorts blocks by ZD, the share of weights more than a deviation from their mean; the lower, the more important.

    This needs no data. Layers outside of blocks have a ZD like any other.
    """

    name = "layer-wise-quantization-zd"
    images = 1

    def score(self) -> Score:
        return Outliers()
