"""The table of recipes that the command line can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archfront.registry import Registry

if TYPE_CHECKING:
    from archfront.search.recipes.recipe import Recipe

RECIPES: Registry[Recipe] = Registry(
    "recipes",
    {
        "hawq-v3": "archfront.search.recipes.hawq_v3:HawqV3",
        "layer-wise-quantization": "archfront.search.recipes.layer_wise_quantization:LayerWiseQuantization",
        "gradient-importance": "archfront.search.recipes.gradient_importance:GradientImportance",
        "leave-one-in": "archfront.search.recipes.leave_one_in:LeaveOneIn",
    },
)
