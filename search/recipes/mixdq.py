"""MixDQ (Zhao et al., ECCV 2024): two groups of layers, a metric for each, and a sweep over their shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.scores.by_group import ByGroup
from archfront.search.allocators.allocator import Evaluate
from archfront.search.allocators.two_pool import TwoPool
from archfront.search.recipes.recipe import Recipe


class MixDq(Recipe):
    """What decides the class (the *content* group: feed-forward layers, the last stage, the classifier) is scored by
    the loss, all other layers by the signal-to-noise ratio of the logits.

    Each split of the budget between the groups gives a policy by two linear programmes; the one whose logits are
    nearest to the network's own wins. The paper's groups are cross-attention and feed-forward layers against the rest
    of a diffusion model, its metrics SSIM and SQNR of images.
    """

    name = "mixdq"
    space: ClassVar[Mapping[str, Any]] = {"weights": [2, 4, 8], "activations": "float"}
    content: ClassVar[Sequence[str]] = ("*mlp*", "*ffn*", "layer3.*", "layer4.*", "linear:*", "fc:*", "head:*")

    def score(self) -> ByGroup:
        return ByGroup(
            pool=self.content,
            first={"name": "distortion", "of": "loss"},
            rest={"name": "distortion", "of": "sqnr"},
        )

    def allocator(self) -> TwoPool:
        return TwoPool(pool=self.content, ratios=np.linspace(0.46, 1.36, 10).tolist())

    def quality(self, network: Compressible) -> Evaluate:
        """Minus the squared distance of the logits from the network's own."""
        space = network.space
        batches, _ = network.inputs("train", self.count(network))
        own = [network.outputs(batch, [space.untouched()])[0] for batch in batches]

        def evaluate(choices: Sequence[int]) -> float:
            policy = {site.id: site.domain[choice] for site, choice in zip(space.sites, choices, strict=True)}
            variant = space.variant(space.genotype(policy))
            found = [network.outputs(batch, [variant])[0] for batch in batches]
            return -sum(float((a - b).square().sum()) for a, b in zip(found, own, strict=True))

        return evaluate
