"""EvoNorm's protocols: a layer must learn in every anchor network, and its gradients must not explode under attack.

Source: Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", 2020, section "Rejection protocols".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.datasets.dataset import DataSet
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.training import check_batch, load_for
from archfront.evaluators.training_loop import torch_threads
from archfront.spaces.evonorm import EvoNorm
from archfront.spaces.evonorm_anchors import Anchor

LARGEST = 1e30
"""Reported for gradients that are larger or no numbers: the ledger takes finite values only."""

_EVALUATION_BATCH = 256
_ANCHORS = {
    "resnet": Anchor(kind="resnet", width=8),
    "mobilenet": Anchor(kind="mobilenet", width=8),
    "efficientnet": Anchor(kind="efficientnet", width=8),
}


class EvonormProtocols(Evaluator):
    """Trains a candidate of the space ``evonorm`` in each anchor network and attacks its gradients.

    Reports, always finite:

    - ``accuracy_<anchor>``: percent of the validation part; images whose logits are no numbers count as wrong. After
      ``quality_steps`` for a candidate that the quality protocol rejects, after ``steps`` for the others.
    - ``gradient_norm``: the largest norm of the loss's gradient with respect to the convolutions' weights in the first
      anchor, over the steps of ascent that were made; none are made where quality rejects. At most ``LARGEST``.
    - ``rejected``: 1 if a protocol rejects the candidate, else 0.

    A rejected candidate is a result and no failed evaluation: most random programmes are rejected, and a job whose
    evaluations all fail is given up, while a failure is tried again and its figures are lost. So set the constraint
    ``rejected <= 0``; constraints on ``accuracy_<anchor>`` as well grade how far a candidate is from being accepted.

    Args:
        anchors: networks by name; a small ResNet, MobileNet and EfficientNet by default.
        quality_steps: of training, after which every anchor must reach the floor.
        floor: percent.
        steps: of training in all for candidates that pass; the learning rate falls linearly to 0 over those after
            ``quality_steps``.
        ascent_steps: of gradient ascent.
        ascent_rate: length of such a step relative to each weight tensor's own norm; the paper gives none.
        limit: norm above which the stability protocol rejects.
        batch: images a step.
        learning_rate, momentum, weight_decay: of SGD with Nesterov momentum.

    Raises:
        InputError: no anchor, or an anchor's size below 1.
    """

    name: ClassVar[str] = "evonorm-protocols"
    batch_size = 1

    def __init__(
        self,
        *,
        anchors: dict[str, Anchor] | None = None,
        quality_steps: Annotated[int, Field(ge=1)] = 100,
        floor: Annotated[float, Field(ge=0, le=100)] = 20.0,
        steps: Annotated[int, Field(ge=1)] = 100,
        ascent_steps: Annotated[int, Field(ge=1)] = 100,
        ascent_rate: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        limit: Annotated[float, Field(gt=0, lt=LARGEST)] = 1e8,
        batch: Annotated[int, Field(ge=2)] = 32,
        learning_rate: Annotated[float, Field(gt=0)] = 0.05,
        momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9,
        weight_decay: Annotated[float, Field(ge=0)] = 1e-4,
    ) -> None:
        self.anchors = dict(_ANCHORS if anchors is None else anchors)
        if not self.anchors:
            raise InputError("evaluators.evonorm-protocols.anchors", {}, "are none", "Give one, or leave it out.")
        if steps < quality_steps:
            problem, remedy = "is less than quality_steps", f"Give {quality_steps} or more."
            raise InputError("evaluators.evonorm-protocols.steps", steps, problem, remedy)
        self.quality_steps, self.floor, self.steps = quality_steps, floor, steps
        self.ascent_steps, self.ascent_rate, self.limit = ascent_steps, ascent_rate, limit
        self.batch, self.learning_rate = batch, learning_rate
        self.momentum, self.weight_decay = momentum, weight_decay

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (
            *(MetricSpec(name=f"accuracy_{name}", unit="%", direction="max") for name in self.anchors),
            MetricSpec(name="gradient_norm", unit="1", direction="min"),
            MetricSpec(name="rejected", unit="1", direction="min"),
        )

    def check(self, context: EvaluationContext) -> None:
        _space(context)
        check_batch(self.name, self.batch, load_for(context.space, context.data))

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        data = load_for(context.space, context.data)
        results: list[Evaluated | Exception] = []
        for task in tasks:
            try:
                with torch_threads(context.threads):
                    results.append(Evaluated(self._evaluate(task, _space(context), data)))
            except Exception as error:
                results.append(error)
        return results

    def _evaluate(self, task: Task, space: EvoNorm, data: DataSet) -> dict[str, Metric]:
        trainings = {
            name: _Training(self, _built(space, task, anchor, zero_init=True), data, task.seed)
            for name, anchor in self.anchors.items()
        }
        accuracies = {}
        for name, training in trainings.items():
            training.run(self.quality_steps)
            accuracies[name] = training.accuracy()
        good = all(accuracy >= self.floor for accuracy in accuracies.values())
        # With branches that begin at 0 the weights inside them would have no gradient to attack.
        attacked = _built(space, task, next(iter(self.anchors.values())), zero_init=False)
        steps = self.ascent_steps if good else 0
        norm = worst_gradient_norm(
            attacked, _batches(data, self.batch, task.seed), steps=steps, rate=self.ascent_rate, limit=self.limit
        )
        rejected = not good or norm > self.limit
        if not rejected and self.steps > self.quality_steps:
            for name, training in trainings.items():
                training.run(self.steps)
                accuracies[name] = training.accuracy()
        return {
            **{f"accuracy_{name}": Metric(accuracy, "measured") for name, accuracy in accuracies.items()},
            "gradient_norm": Metric(norm, "measured"),
            "rejected": Metric(float(rejected), "measured"),
        }


class _Training:
    """One anchor network in training; the order of the data and the first weights are functions of the seed."""

    def __init__(self, settings: EvonormProtocols, model: nn.Module, data: DataSet, seed: int) -> None:
        self._settings, self._model, self._data = settings, model, data
        self._batches = _batches(data, settings.batch, seed)
        self._step = 0
        self._finite = True
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )

    def run(self, stop: int) -> None:
        """Go on until ``stop`` steps are done, or the loss is no number: no further step could mend that."""
        settings = self._settings
        self._model.train()
        while self._step < stop and self._finite:
            falling = settings.steps - settings.quality_steps
            share = min(1.0, (settings.steps - self._step) / falling) if falling else 1.0
            for group in self._optimizer.param_groups:
                group["lr"] = settings.learning_rate * share
            images, labels = next(self._batches)
            loss = functional.cross_entropy(self._model(images), labels)
            self._finite = bool(torch.isfinite(loss))
            if self._finite:
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
            self._step += 1

    def accuracy(self) -> float:
        """Percent of the validation part; logits that are no numbers are wrong."""
        images, labels = self._data.part("validation")
        self._model.eval()
        right = 0
        with torch.no_grad():
            for some, wanted in zip(
                torch.split(images, _EVALUATION_BATCH), torch.split(labels, _EVALUATION_BATCH), strict=True
            ):
                logits = self._model(self._data.normalised(some))
                found = (logits.argmax(1) == wanted) & torch.isfinite(logits).all(dim=1)
                right += int(found.sum())
        return 100 * right / len(labels)


def worst_gradient_norm(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], *, steps: int, rate: float, limit: float
) -> float:
    """The largest norm of the loss's gradient with respect to the convolutions' weights under gradient ascent on it.

    Each step moves every weight tensor along the gradient of that norm, by ``rate`` times the tensor's own norm, so
    that the attack does not depend on the network's scale. It ends early above ``limit``.

    Args:
        model: in training mode; its convolutions' weights are changed.
        batches: normalised images and labels, one a step and one for the last norm.
        steps: 0 gives the norm at the start.

    Returns:
        At most ``LARGEST``, which also stands for a norm that is no number.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    worst = 0.0
    model.train()
    for step in range(steps + 1):
        images, labels = next(batches)
        loss = functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        # In float64: the squares of large gradients overflow float32 although their norm does not.
        norm = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
        if not torch.isfinite(norm):
            return LARGEST
        worst = min(max(worst, float(norm.detach())), LARGEST)
        if worst > limit or step == steps or not norm.requires_grad or not worst:
            break
        ascents = torch.autograd.grad(norm.log(), weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for weight, ascent in zip(weights, ascents, strict=True):
                length = ascent.norm()
                if not torch.isfinite(length):
                    return LARGEST
                if length > 0:
                    weight.add_(ascent * (rate * weight.norm() / length))
    return worst


def _batches(data: DataSet, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of the training part without end, in an order drawn from (seed, epoch)."""
    images, labels = data.part("train")
    for epoch in itertools.count():
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(labels)))
        for chosen in torch.split(order[: len(order) - len(order) % batch], batch):
            yield data.normalised(images[chosen]), labels[chosen]


def _built(space: EvoNorm, task: Task, anchor: Anchor, *, zero_init: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        return space.build_anchor(task.genotype, anchor, zero_init=zero_init)


def _space(context: EvaluationContext) -> EvoNorm:
    if isinstance(context.space, EvoNorm):
        return context.space
    problem = "has no tensor programmes to judge"
    raise InputError("space.name", context.space.name, problem, "Choose evonorm, or leave out evonorm-protocols.")
