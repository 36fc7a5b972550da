"""Small trained networks, of the digits and of text, made once a test session, and spaces of their bits."""

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
DECODER: Mapping[str, Any] = {"name": "decoder", "context": 32, "dim": 32, "depth": 2, "heads": 2}
TEXT = {"name": "text"}
_MODELS = {"vit": VIT, "resnet": RESNET, "decoder": DECODER}
DATA_OF = {"vit": DATA, "resnet": DATA, "decoder": TEXT}
_RECIPES = {
    "vit": (Recipe(optimizer="adamw", learning_rate=0.004), 25),
    "resnet": (Recipe(), 5),
    "decoder": (Recipe(optimizer="adamw", learning_rate=0.01, label_smoothing=0.0), 2),
}
"""How each is trained, and for how many epochs."""


def digits(model: Mapping[str, Any] = VIT) -> DataSet:
    source = MODELS.build(model, "model")
    return load(DATA, source.resolution, source.in_channels)


def data_of(name: str = "vit") -> DataSet:
    """What a trained network was trained on, as it takes it: ``vit`` and ``resnet`` digits, ``decoder`` text."""
    source = MODELS.build(_MODELS[name], "model")
    return load(DATA_OF[name], source.resolution, source.in_channels)


@cache
def _weights(name: str) -> str:
    source = MODELS.build(_MODELS[name], "model")
    recipe, epochs = _RECIPES[name]
    with torch_threads(1):
        run = Run(source.architecture, data_of(name), recipe, seed=0)
        run.train(epochs, epochs)
    path = Path(mkdtemp(prefix="archfront-test-")) / f"{name}.safetensors"
    save_file(run.weights(), path)
    return str(path)


def trained(name: str = "vit") -> dict[str, Any]:
    """A job file's ``model`` mapping: ``vit`` or ``resnet``, trained on digits, or ``decoder``, trained on text."""
    return {**_MODELS[name], "weights": _weights(name)}


def bits(name: str = "vit", **options: Any) -> Bits:
    """The space of a trained network's bits."""
    return Bits(model=trained(name), **options)
