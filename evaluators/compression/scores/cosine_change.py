"""A score of how much each block of a network changes what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.evaluators.compression.scores.perturbation import steps, weight_sites
from archfront.evaluators.compression.scores.score import Score, Subject, Vector
from archfront.spaces.policies.repeated_blocks import repeated_blocks
from archfront.spaces.policies.site import tied_groups

_BEFORE = 1e-6
"""Share by which what has no cosine is more important than the most important of the rest: decides between them."""


class CosineChange(Score):
    """How much a site's block turns the features that pass it, times how much of their range a choice drops.

    Layer-Wise Quantization's LIM (policies.md, A2): importance is ``-cos(x, y)`` of what a repeated block reads and
    gives, the residual stream included, averaged over tokens or places and inputs; the higher, the more important. Here
    it is ``1 - cos``, which is not negative, and damage is ``(1 - cos) 2^-b``; sites that are tied share it, so that a
    decision about many layers weighs no more than one about few.

    A layer in no block is one by itself. Where what goes in and what comes out have different shapes, or the block is
    not called as a module with one tensor, there is no cosine: such blocks are as important as the most important of
    the others, and come before it, so that first layers and heads keep the higher width where the budget lets them.
    """

    name: ClassVar[str] = "cosine-change"

    def measure(self, subject: Subject) -> list[Vector]:
        sites = weight_sites(subject)
        found = self.importances(subject)
        damage = [found[block] * steps(site) for site, block in zip(sites, _blocks(subject), strict=True)]
        for group in tied_groups(sites):
            for i in group:
                damage[i] = damage[i] / len(group)
        return damage

    def importances(self, subject: Subject) -> dict[str, float]:
        """Path of each block with a site, or of a layer in none -> ``1 - cos``, 0 to 2."""
        blocks = list(dict.fromkeys(_blocks(subject)))
        known = changes(subject.network.model, blocks, subject.batches)
        most = max(known.values(), default=1.0) * (1 + _BEFORE)
        return {block: known.get(block, most) for block in blocks}


def changes(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> dict[str, float]:
    """Path of a module -> mean of ``1 - cos`` over all vectors of features that it reads and gives.

    Features are on axis 1 of what a module with convolutions reads, and on the last axis otherwise. Modules whose input
    and output differ in shape are left out, as are those that are not called.

    Args:
        model: in evaluation mode.
        paths: of modules.
        batches: of its inputs.
    """
    sums = dict.fromkeys(paths, 0.0)
    counts = dict.fromkeys(paths, 0)
    different: set[str] = set()

    def note(path: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        before = inputs[0] if inputs else None
        if not isinstance(before, Tensor) or not isinstance(output, Tensor) or before.shape != output.shape:
            different.add(path)
            return
        axis = 1 if any(isinstance(inner, nn.Conv2d) for inner in module.modules()) else -1
        # A residual stream turns by little: in single precision 1 - cos would have few digits left, or in half none.
        turned = 1 - functional.cosine_similarity(before.double(), output.double(), dim=axis)
        sums[path] += float(turned.sum())
        counts[path] += turned.numel()

    handles = [model.get_submodule(path).register_forward_hook(partial(note, path)) for path in paths]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: max(sums[path] / counts[path], 0.0) for path in paths if counts[path] and path not in different}


def _blocks(subject: Subject) -> list[str]:
    """Of each site, the block that its layer is part of; the layer itself where there is none."""
    blocks = repeated_blocks(subject.network.model)
    return [
        next((block for block in blocks if site.module.startswith(f"{block}.")), site.module) for site in subject.sites
    ]
