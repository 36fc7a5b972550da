"""Layer-Wise Quantization (Dumitru et al., 2024): the most important layers get the higher width, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from archfront.evaluators.compression.scores.perturbation import Outliers
from archfront.search.allocators.quota import QuotaSort
from archfront.search.recipes.recipe import Recipe


class LayerWiseQuantization(Recipe):
    """Sorts layers by ZD, the share of weights more than a deviation from their mean; the lower, the more important.

    The paper sorts whole decoder blocks of language models; here the sites are layers.
    """

    name = "layer-wise-quantization"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4], "activations": "float"}
    images = 1

    def score(self) -> Outliers:
        return Outliers()

    def allocator(self) -> QuotaSort:
        return QuotaSort()
