"""How a network is trained: every setting that changes the outcome, and the learning rate's course."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from archfront.errors import InputError

Augmentation = Literal["none", "shift", "shift-flip"]
Optimizer = Literal["sgd", "adamw"]

RECIPE_VERSION = 1
"""Raise it when the same settings train differently: old checkpoints are then left alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    The learning rate warms up, stays constant, and falls linearly to 0 over the last epochs. So the runs of all
    lengths share their course up to where the shorter one starts to decay: its *trunk*.

    Attributes:
        batch: images a step; an epoch leaves out the rest that fills no batch.
        optimizer: ``sgd`` with Nesterov momentum, or ``adamw``.
        learning_rate: of the constant phase.
        momentum: of ``sgd``; the first beta of ``adamw``.
        weight_decay: of convs and linears; batch norms and biases have none.
        label_smoothing: 0 to below 1.
        warmup: epochs of linear rise, may be a fraction.
        decay: share of a run's epochs in which the rate falls; at least one epoch.
        augmentation: random ``shift`` by up to an eighth of the resolution, and random horizontal flip.
        norm_momentum: of the batch norms' running statistics; short runs need more than torch's 0.1.

    Raises:
        InputError: a value is out of range; the field is ``evaluators.training.<name>``.
    """

    batch: int = 32
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    warmup: float = 0.5
    decay: float = 0.34
    augmentation: Augmentation = "shift"
    norm_momentum: float = 0.2

    def __post_init__(self) -> None:
        # A batch norm needs two values of a channel to have a variance.
        self._check("batch", self.batch >= 2, "Give 2 or more.")
        self._check("optimizer", self.optimizer in ("sgd", "adamw"), "Give 'sgd' or 'adamw'.")
        self._check("learning_rate", 0 < self.learning_rate < float("inf"), "Give a number above 0.")
        self._check("momentum", 0 < self.momentum < 1, "Give a number between 0 and 1.")
        self._check("weight_decay", 0 <= self.weight_decay < float("inf"), "Give 0 or more.")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "Give a number from 0 to below 1.")
        self._check("warmup", 0 <= self.warmup < float("inf"), "Give 0 or more epochs.")
        self._check("decay", 0 <= self.decay <= 1, "Give a share of the epochs, 0 to 1.")
        self._check("augmentation", self.augmentation in ("none", "shift", "shift-flip"), "Give none|shift|shift-flip.")
        self._check("norm_momentum", 0 < self.norm_momentum <= 1, "Give a number above 0, at most 1.")

    def _check(self, field: str, good: bool, remedy: str) -> None:
        if not good:
            raise InputError(f"evaluators.training.{field}", getattr(self, field), "cannot be used", remedy)

    def decay_epochs(self, epochs: int) -> int:
        return min(epochs, max(1, round(self.decay * epochs)))

    def trunk(self, epochs: int) -> int:
        """Epochs before the decay of a run of so many epochs; never falls as ``epochs`` rises."""
        return epochs - self.decay_epochs(epochs)

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """What the learning rate is multiplied by at a step (from 0) of a run of so many epochs."""
        rising = self.warmup * steps_per_epoch
        factor = min(1.0, (step + 1) / rising) if rising else 1.0
        falling, total = self.decay_epochs(epochs) * steps_per_epoch, epochs * steps_per_epoch
        return factor * (total - step) / falling if total - step < falling else factor

    def digest(self, **others: str) -> str:
        """Identity of what these settings make of a candidate; ``others``: of the data and the space."""
        text = json.dumps({"version": RECIPE_VERSION, **asdict(self), **others}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
