"""A network that a function of the user's own makes.

In no table: only a plug-in of the command line enters it, so that a job file cannot make a service import and call what
it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from archfront.errors import InputError
from archfront.spaces.models.source import ModelSource, Normalisation, positive


class Factory(ModelSource):
    """What a function without arguments returns, with the weights that it has then.

    Args:
        build: ``package.module:function``, importable where the job runs.
        resolution, in_channels: of the images that it takes.
        classes: of the output.
        weights: a checkpoint of its state dict to load on top; those of the function by default.
        seed: of torch's global generator when it is called.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: no such function, or it returns no module.
    """

    name: ClassVar[str] = "factory"

    def __init__(
        self,
        *,
        build: str,
        resolution: int,
        in_channels: int = 3,
        classes: int,
        weights: str | None = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        positive(resolution=resolution, in_channels=in_channels, classes=classes)
        super().__init__(weights, seed, normalisation)
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes
        self._name, self._build = build, _function(build)

    @property
    def config(self) -> Mapping[str, Any]:
        images = {name: getattr(self, name) for name in ("resolution", "in_channels", "classes")}
        return {"build": self._name, **images}

    def architecture(self) -> nn.Module:
        made = self._build()
        if not isinstance(made, nn.Module):
            raise InputError("model.build", self._name, f"returns a {type(made).__name__}", "Return a torch.nn.Module.")
        return made


def _function(name: str) -> Callable[[], Any]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Give package.module:function, importable from where you are."
        raise InputError("model.build", name, f"cannot be imported ({error})", remedy) from None
    if not callable(found):
        raise InputError("model.build", name, "is no function", "Give package.module:function.")
    return found  # type: ignore[no-any-return]
