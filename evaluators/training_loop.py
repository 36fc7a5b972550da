"""Training one network: a function of its recipe, data and seed, bit for bit, wherever it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import DataSet, SplitName
from archfront.evaluators.onednn_faults import avoid_narrow_strided_pointwise
from archfront.evaluators.training_recipe import Recipe

_EVALUATION_BATCH = 256


@dataclass
class TrunkState:
    """A run before its learning rate decays.

    Attributes:
        epochs: how many it has had.
        tensors: ``model/<name>`` and ``optimizer/<parameter>/<name>``, contiguous.
    """

    epochs: int
    tensors: dict[str, Tensor]


class Run:
    """A network in training.

    The order of the data and the augmentation are drawn from ``(seed, epoch)``, the first weights from ``seed``.
    Nothing else is random, so a run continued from a ``TrunkState`` equals one that was never stopped.

    Args:
        build: makes the network from torch's global generator.
        data: whose training part is used.
        recipe: the settings; tokens are never augmented.
        seed: of everything random.
        normalised: what the network is given of images as they are stored; ``data.normalised`` by default.
        loss: what is made small, of ``(batch, logits, labels)``, the batch normalised: a number. By default the
            label-smoothed cross entropy, of tokens over all places.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: DataSet,
        recipe: Recipe,
        seed: int,
        *,
        normalised: Callable[[Tensor], Tensor] | None = None,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.seed = seed
        self.epoch = 0
        self.loss = float("nan")
        self._normalised = data.normalised if normalised is None else normalised
        self._objective = self._cross_entropy if loss is None else loss
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Convolutions of this size run about twice as fast on a CPU with the channels last.
            model = avoid_narrow_strided_pointwise(build())
            self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = recipe.norm_momentum
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = _optimizer(self._parameters, recipe)
        self._images, self._labels = data.part("train")
        self.steps = len(self._labels) // recipe.batch
        if not self.steps:
            problem = f"is more than the {len(self._labels)} training images"
            raise InputError("evaluators.training.batch", recipe.batch, problem, "Lower it.")

    def train(self, stop: int, epochs: int) -> None:
        """Go on until ``stop`` epochs are done of a run that is to have ``epochs``."""
        self.model.train()
        for epoch in range(self.epoch, stop):
            rng = np.random.default_rng([self.seed, epoch])
            order = torch.from_numpy(rng.permutation(len(self._labels)))
            total = torch.zeros(())
            for i in range(self.steps):
                chosen = order[i * self.recipe.batch : (i + 1) * self.recipe.batch]
                images = self._images[chosen]
                if not self.data.tokens:
                    images = augmented(images, self.recipe, rng)
                total += self._step(images, self._labels[chosen], epoch * self.steps + i, epochs)
            self.epoch = epoch + 1
            self.loss = float(total) / self.steps

    def _step(self, images: Tensor, labels: Tensor, step: int, epochs: int) -> Tensor:
        rate = self.recipe.learning_rate * self.recipe.factor(step, self.steps, epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(images)
        loss = self._objective(batch, self.model(batch), labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach()

    def _batch(self, images: Tensor) -> Tensor:
        batch = self._normalised(images)
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch

    def _cross_entropy(self, _batch: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing
        return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)

    def accuracy(self, part: SplitName) -> float:
        """Percent of a part's images, or of its places of tokens, that the network has right; nan if it gives no
        numbers."""
        images, labels = self.data.part(part)
        self.model.eval()
        right = 0
        with torch.no_grad():
            for some, wanted in zip(
                torch.split(images, _EVALUATION_BATCH), torch.split(labels, _EVALUATION_BATCH), strict=True
            ):
                logits = self.model(self._batch(some))
                if not torch.isfinite(logits).all():
                    return float("nan")
                right += int((logits.argmax(-1) == wanted).sum())
        return 100 * right / labels.numel()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the network's parameters and buffers, contiguous."""
        return {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.state_dict().items()
        }

    def state(self) -> TrunkState:
        """All that a later run needs to go on."""
        tensors = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for i, parameter in enumerate(self._parameters):
            for name, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{i}/{name}"] = value.detach().clone(memory_format=torch.contiguous_format)
        return TrunkState(self.epoch, tensors)

    def restore(self, state: TrunkState) -> None:
        """Go on from a state.

        Raises:
            ValueError, KeyError, RuntimeError: the state is of another network or optimizer; this run must be dropped.
        """
        weights = {name[6:]: t for name, t in state.tensors.items() if name.startswith("model/")}
        self.model.load_state_dict(weights)
        for name, value in state.tensors.items():
            kind, _, rest = name.partition("/")
            if kind != "optimizer":
                continue
            index, _, field = rest.partition("/")
            parameter = self._parameters[int(index)]
            if value.dim():
                if value.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}")
                # The fused optimizer walks memory, so its state must lie as its parameter does.
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            self._optimizer.state[parameter][field] = value
        if state.epochs and not any(name.startswith("optimizer/") for name in state.tensors):
            raise ValueError("the optimizer's state is missing")
        self.epoch = state.epochs


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.momentum, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True, fused=True)


def augmented(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Each image shifted, and perhaps flipped, by its own draw; what comes in from the border is 0.

    Args:
        images: ``(n, channels, height, width)``, kept in shape and type.
    """
    if recipe.augmentation == "none":
        return images
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    dy, dx = rng.integers(-reach, reach + 1, size=(2, count))
    rows = _places(height, dy)
    columns = _places(width, dx)
    if recipe.augmentation == "shift-flip":
        flipped = rng.random(count) < 0.5
        columns[flipped] = columns[flipped, ::-1]
    padded = functional.pad(images, (reach, reach, reach, reach))
    stacked = padded.permute(0, 2, 3, 1)
    picked = stacked[
        torch.arange(count)[:, None, None],
        torch.from_numpy(rows + reach)[:, :, None],
        torch.from_numpy(columns + reach)[:, None, :],
    ]
    return picked.permute(0, 3, 1, 2)


def _places(length: int, shift: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``(n, length)``: where each place of a shifted row comes from."""
    return np.arange(length)[None] + shift[:, None]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
