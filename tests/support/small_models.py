"""Small trained networks of the digits, made once a test session, and spaces of their bits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from safetensors.torch import save_file

from archfront.evaluators.datasets.dataset import DataSet, load
from archfront.evaluators.training_loop import Run, torch_threads
from archfront.evaluators.training_recipe import Recipe
from archfront.spaces.models.registry import MODELS
from archfront.spaces.policies.bits import Bits

DATA = {"name": "digits"}
VIT: Mapping[str, Any] = {"name": "vit", "resolution": 8, "patch": 2, "dim": 32, "depth": 2, "heads": 2}
RESNET: Mapping[str, Any] = {"name": "cifar-resnet", "depth": 8}
_RECIPES = {"vit": (Recipe(optimizer="adamw", learning_rate=0.004), 25), "resnet": (Recipe(), 5)}
"""How each is trained, and for how many epochs."""


def digits(model: Mapping[str, Any] = VIT) -> DataSet:
    source = MODELS.build(model, "model")
    return load(DATA, source.resolution, source.in_channels)


@cache
def _weights(name: str) -> str:
    config = {"vit": VIT, "resnet": RESNET}[name]
    source = MODELS.build(config, "model")
    recipe, epochs = _RECIPES[name]
    with torch_threads(1):
        run = Run(source.architecture, digits(config), recipe, seed=0)
        run.train(epochs, epochs)
    path = Path(mkdtemp(prefix="archfront-test-")) / f"{name}.safetensors"
    save_file(run.weights(), path)
    return str(path)


def trained(name: str = "vit") -> dict[str, Any]:
    """A job file's ``model`` mapping: ``vit`` or ``resnet``, trained on digits."""
    return {**({"vit": VIT, "resnet": RESNET}[name]), "weights": _weights(name)}


def bits(name: str = "vit", **options: Any) -> Bits:
    """The space of a trained network's bits."""
    return Bits(model=trained(name), **options)
