"""Training a compressed network further; the network that it is compared with gets the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as functional
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.distillation import distillation_loss
from archfront.evaluators.datasets.dataset import DataSet
from archfront.evaluators.training_loop import Run
from archfront.evaluators.training_recipe import Augmentation, Optimizer, Recipe


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings.

    Attributes:
        epochs: over the images.
        images: of the training part, drawn once; all if None.
        batch: images a step.
        optimizer, learning_rate, augmentation: see ``training_recipe.Recipe``; the rate falls linearly to 0.
        distillation: weight of the uncompressed network's outputs in the loss, 0 to 1; the rest is cross entropy.
        temperature: of the distillation.
    """

    # What a job file misspells is not left out silently.
    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: Annotated[int, Field(ge=1)] = 1
    images: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=2)] = 128
    optimizer: Optimizer = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    augmentation: Augmentation = "shift-flip"
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 4.0

    @property
    def digest(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()

    def tune(
        self, model: nn.Module, teacher: nn.Module, data: DataSet, normalised: Callable[[Tensor], Tensor], seed: int
    ) -> nn.Module:
        """Train a network further, in place; in evaluation mode afterwards.

        Args:
            teacher: unchanged.
            normalised: makes the network's inputs of the data's images.
            seed: of order and augmentation.

        Raises:
            InputError: a batch that the images cannot fill.
        """
        data = self.part(data)
        recipe = Recipe(
            batch=self.batch,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            augmentation=self.augmentation,
            label_smoothing=0.0,
            warmup=0.0,
            decay=1.0,
            norm_momentum=0.1,
        )
        run = Run(lambda: model, data, recipe, seed, normalised=normalised, loss=self._loss(teacher))
        run.train(self.epochs, self.epochs)
        return model.eval()

    def part(self, data: DataSet) -> DataSet:
        """The data with the images that are trained on as its training part.

        Raises:
            InputError: a batch that they cannot fill.
        """
        images = data.split["train"]
        if self.images is not None and self.images < len(images):
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(images), generator=generator)[: self.images].sort().values
            data = replace(data, split={**data.split, "train": images[chosen.numpy()]})
        if (there := len(data.split["train"])) < self.batch:
            field = "evaluators.compression.fine_tuning.batch"
            raise InputError(field, self.batch, f"is more than the {there} training samples", "Lower it.")
        return data

    def _loss(self, teacher: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def loss(batch: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
            rows, wanted = logits.flatten(0, -2), labels.flatten()
            if not self.distillation:
                return functional.cross_entropy(rows, wanted)
            with torch.no_grad():
                known = teacher(batch).flatten(0, -2)
            return distillation_loss(rows, known, wanted, self.temperature, self.distillation)

        return loss
