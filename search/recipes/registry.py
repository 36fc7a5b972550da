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
        "layer-wise-quantization-zd": "archfront.search.recipes.layer_wise_quantization:LayerWiseQuantizationZd",
        "augmented-hessians": "archfront.search.recipes.augmented_hessians:AugmentedHessians",
        "mixdq": "archfront.search.recipes.mixdq:MixDq",
        "brecq": "archfront.search.recipes.brecq:Brecq",
        "zeroquant-v2": "archfront.search.recipes.zeroquant_v2:ZeroQuantV2",
        "leave-one-in": "archfront.search.recipes.leave_one_in:LeaveOneIn",
        "lrp-qvit": "archfront.search.recipes.lrp_qvit:LrpQvit",
        "rsq": "archfront.search.recipes.rsq:Rsq",
    },
)
