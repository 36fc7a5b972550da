"""Models by name, ``timm:resnet18``: what a policy compresses, what a profile covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archfront.errors import InputError, suggestion
from archfront.spaces.torchvision_compat import import_timm

if TYPE_CHECKING:
    from torch import nn


def build_model(name: str) -> nn.Module:
    """A model with fresh weights, made on torch's current default device.

    Args:
        name: ``timm:<model>``.

    Raises:
        InputError: an unknown source or model.
    """
    source, _, model = name.partition(":")
    if source != "timm" or not model:
        raise InputError("model", name, "is no name of a model", "Give timm:<model>, e.g. timm:resnet18.")
    timm = import_timm()
    if model not in timm.list_models():
        raise InputError("model", name, "is unknown to timm", suggestion(model, timm.list_models()))
    found: nn.Module = timm.create_model(model)
    return found


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """``(channels, height, width)`` that a model of timm was made for.

    Raises:
        InputError: the model does not say.
    """
    config = getattr(model, "default_cfg", None)
    if not config or "input_size" not in config:
        raise InputError("model", type(model).__name__, "does not say what it takes", "Give the shape of its input.")
    channels, height, width = config["input_size"]
    return int(channels), int(height), int(width)
