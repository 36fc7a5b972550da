"""The table of scores that recipes can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archfront.registry import Registry

if TYPE_CHECKING:
    from archfront.evaluators.compression.scores.score import Score

_HERE = "archfront.evaluators.compression.scores"

SCORES: Registry[Score] = Registry(
    "scores",
    {
        "perturbation": f"{_HERE}.perturbation:Perturbation",
        "outliers": f"{_HERE}.perturbation:Outliers",
        "hessian": f"{_HERE}.perturbation:Hessian",
        "taylor": f"{_HERE}.perturbation:Taylor",
        "zeroth-order": f"{_HERE}.perturbation:ZerothOrder",
        "cosine-change": f"{_HERE}.cosine_change:CosineChange",
        "distortion": f"{_HERE}.distortion:Distortion",
        "augmented-hessian": f"{_HERE}.pairs:AugmentedHessian",
        "by-group": f"{_HERE}.by_group:ByGroup",
        "relevance": f"{_HERE}.relevance:Relevance",
    },
)
