"""The contract of a source of one network with its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from archfront.errors import InputError
from archfront.spaces.models.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn


Normalisation = Literal["data", "imagenet", "half"]

NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "data": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Means and deviations that published checkpoints were trained with; ``data``: those of the job's own data."""


class ModelSource(ABC):
    """Makes one network, always with the same weights.

    The keyword arguments of ``__init__`` are what a job file may set under ``model``.

    Attributes:
        resolution, in_channels: of the images that it takes; of tokens, how many, and 1.
        classes: of what it gives.
    """

    name: ClassVar[str]

    resolution: int
    in_channels: int
    classes: int

    def __init__(self, weights: str | None, seed: int, normalisation: Normalisation) -> None:
        if not 0 <= seed < 2**63:
            raise InputError("model.seed", seed, "is out of range", "Give 0 or more, below 2^63.")
        self.seed, self.normalisation = seed, normalisation
        self.weights = None if weights is None else Weights(weights)
        if normalisation not in NORMALISATIONS:
            remedy = f"Give one of: {', '.join(NORMALISATIONS)}."
            raise InputError("model.normalisation", normalisation, "is unknown", remedy)

    @abstractmethod
    def architecture(self) -> nn.Module:
        """The network with fresh weights from torch's global generator."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The arguments that make it again, without weights and seed."""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two models the same: the weights count by their content, not by where they lie."""
        kept = {"seed": self.seed} if self.weights is None else {"weights": self.weights.digest}
        return {"name": self.name, **self.config, **kept, "normalisation": self.normalisation}

    @property
    def mean_and_deviation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Of each channel, of values in 0..1, that its inputs are normalised by; None for those of the data."""
        return NORMALISATIONS[self.normalisation]

    def example(self, count: int = 1) -> Tensor:
        """Zeros that the network takes, ``(count, ...)``, on torch's default device."""
        import torch

        return torch.zeros(count, self.in_channels, self.resolution, self.resolution)

    def build(self) -> nn.Module:
        """The network in evaluation mode, with its own weights, or fresh ones that are a function of ``seed``.

        Raises:
            InputError: the weights cannot be read, or do not fit.
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.architecture()
        if self.weights is not None:
            self.weights.load_into(model)
        return model.eval()


def positive(**numbers: int) -> None:
    """Refuse numbers below 1.

    Raises:
        InputError: one is.
    """
    for field, number in numbers.items():
        if number < 1:
            raise InputError(f"model.{field}", number, "is not positive", "Give 1 or more.")
