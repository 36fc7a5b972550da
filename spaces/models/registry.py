"""The table of models that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.spaces.models.source import ModelSource

MODELS: Registry[ModelSource] = Registry(
    "models",
    {
        "cifar-resnet": "archfront.spaces.models.cifar_resnet:CifarResNet",
        "decoder": "archfront.spaces.models.decoder:Decoder",
        "network": "archfront.spaces.models.space_model:SpaceModel",
        "timm": "archfront.spaces.models.timm_model:TimmModel",
        "vit": "archfront.spaces.models.timm_model:VisionTransformer",
    },
)
