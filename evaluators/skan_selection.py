"""The three phases by which an S-KAN finds the basis of each layer: train all, train selectively, prune to the chosen.

S-KAN's own schedules were not at hand. In trials with softmax weights alone, the basis that led after joint training
was often not the best one by itself: in a mixture a basis is worth what it adds to the others. So the selective phase
trains bases alone and drops those of the larger loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.spaces.skan_layers import KanLayer

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long the phases are.

    Attributes:
        mixed: steps in which all bases are trained together, with their weights.
        selective: steps of the selective phase, in equal parts to its rounds, each of which drops half of the bases.
        pruned: steps of the chosen bases alone.
        learning_rate: of Adam; it falls to 0 along a cosine in the last phase.
        batch: samples a step; None takes all.

    Raises:
        InputError: a number is out of range.
    """

    mixed: int = 150
    selective: int = 900
    pruned: int = 300
    learning_rate: float = 0.02
    batch: int | None = None

    def __post_init__(self) -> None:
        for field in ("mixed", "selective", "pruned"):
            if getattr(self, field) < 1:
                raise InputError(f"schedule.{field}", getattr(self, field), "is not positive", "Give 1 or more.")
        if not 0 < self.learning_rate < math.inf:
            raise InputError("schedule.learning_rate", self.learning_rate, "is not positive", "Give one such as 0.02.")
        if self.batch is not None and self.batch < 2:
            raise InputError("schedule.batch", self.batch, "has no variance to standardise by", "Give 2 or more.")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was found.

    Attributes:
        genotype: the basis of each layer, a genotype of the space ``skan``.
        weights: of each layer's bases after joint training, summing to 1.
        log_losses: of each layer's bases when they were last compared, nats of the training loss.
        mixed_loss, loss: on the training data, at the end of the first and of the last phase.
        network: pruned and trained, in evaluation mode.
    """

    genotype: list[str]
    weights: list[dict[str, float]]
    log_losses: list[dict[str, float]]
    mixed_loss: float
    loss: float
    network: nn.Module


def select(
    network: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = nn.functional.mse_loss,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Selection:
    """Choose a basis for every mixed layer of a network, which is trained and pruned in place.

    1. All bases are trained together, phi = sum_k w_k phi_k, and the weights w with them.
    2. In each step every layer works with one of its remaining bases alone, in random order but all equally often.
       After each of log2(bases) rounds a layer drops the half whose loss was larger in the round's second half.
    3. What is left is trained on.

    Args:
        network: with mixed ``KanLayer``s, e.g. of ``SKan.build_mixed``; its weights are drawn by the caller.
        inputs, targets: ``(n, ...)`` each, on the network's device.
        loss: of outputs and targets, a mean; positive.
        schedule: lengths of the phases.
        seed: of the order of data and bases.

    Raises:
        InputError: the network has no mixed layer, or a batch is larger than the data.
    """
    schedule = schedule or Schedule()
    layers = [m for m in network.modules() if isinstance(m, KanLayer) and len(m.names) > 1]
    if not layers:
        raise InputError("network", type(network).__name__, "has no mixed layer", "Make it with SKan.build_mixed().")
    if schedule.batch is not None and schedule.batch > len(inputs):
        problem = f"is more than the {len(inputs)} samples"
        raise InputError("schedule.batch", schedule.batch, problem, "Lower it.")
    rng = np.random.default_rng(seed)
    trainer = _Trainer(network, _batches(inputs, targets, schedule.batch, rng), loss, schedule.learning_rate)
    for _ in range(schedule.mixed):
        trainer.step()
    weights = [dict(zip(layer.names, layer.weights().tolist(), strict=True)) for layer in layers]
    mixed_loss = _value(network, inputs, targets, loss)
    left, log_losses = _raced(trainer, layers, schedule.selective, rng)
    for layer, kept in zip(layers, left, strict=True):
        layer.prune(kept)
    trainer.restart()
    for step in range(schedule.pruned):
        trainer.step(0.5 + 0.5 * math.cos(math.pi * step / schedule.pruned))
    return Selection(
        genotype=[layer.names[0] for layer in network.modules() if isinstance(layer, KanLayer)],
        weights=weights,
        log_losses=log_losses,
        mixed_loss=mixed_loss,
        loss=_value(network, inputs, targets, loss),
        network=network,
    )


class _Trainer:
    def __init__(self, network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], loss: Loss, rate: float) -> None:
        self._network, self._batches, self._loss, self._rate = network, batches, loss, rate
        self.restart()

    def restart(self) -> None:
        """With the parameters that there are now."""
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=self._rate)

    def step(self, share: float = 1.0) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share
        self._network.train()
        inputs, targets = next(self._batches)
        loss = self._loss(self._network(inputs), targets)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return float(loss.detach())


def _raced(
    trainer: _Trainer, layers: Sequence[KanLayer], steps: int, rng: np.random.Generator
) -> tuple[list[int], list[dict[str, float]]]:
    """The basis that is left of each layer, and the log-loss of each when it was last compared."""
    trainer.restart()
    left = [list(range(len(layer.names))) for layer in layers]
    found: list[dict[str, float]] = [{} for _ in layers]
    rounds = max(len(names) for names in left).bit_length() - 1
    for _ in range(rounds):
        cycle = max(len(names) for names in left)
        cycles = max(2, steps // (rounds * cycle))
        sums = [dict.fromkeys(names, 0.0) for names in left]
        counts = [dict.fromkeys(names, 0) for names in left]
        for turn in range(cycles):
            orders = [rng.permutation(np.resize(rng.permutation(names), cycle)).tolist() for names in left]
            for chosen in zip(*orders, strict=True):
                for layer, index in zip(layers, chosen, strict=True):
                    layer.active = index
                value = math.log(max(trainer.step(), 1e-30))
                for place, index in enumerate(chosen if turn >= cycles // 2 else ()):
                    sums[place][index] += value
                    counts[place][index] += 1
        for place, layer in enumerate(layers):
            means = {index: sums[place][index] / counts[place][index] for index in left[place]}
            found[place] |= {layer.names[index]: mean for index, mean in means.items()}
            left[place] = sorted(means, key=lambda index: means[index])[: max(1, len(means) // 2)]
    return [names[0] for names in left], found


def _batches(
    inputs: Tensor, targets: Tensor, batch: int | None, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        if batch is None:
            yield inputs, targets
            continue
        order = torch.from_numpy(rng.permutation(len(inputs)))
        for chosen in torch.split(order[: len(order) - len(order) % batch], batch):
            yield inputs[chosen], targets[chosen]


def _value(network: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> float:
    network.eval()
    with torch.no_grad():
        return float(loss(network(inputs), targets))
