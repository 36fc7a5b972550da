"""Training as an evaluator: epochs are the fidelity, and a longer run continues the shorter one's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from archfront.errors import InputError
from archfront.evaluators import checkpoints
from archfront.evaluators.datasets.dataset import DataSet, load
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.training_loop import Run, TrunkState, torch_threads
from archfront.evaluators.training_recipe import Augmentation, Optimizer, Recipe
from archfront.spaces.space import Genotype, Space


@runtime_checkable
class ImageSpace(Protocol):
    """A space of image classifiers: ``(n, in_channels, resolution, resolution)`` to ``(n, classes)``."""

    resolution: int
    in_channels: int
    classes: int


class Training(Evaluator):
    """Trains each candidate from its own seed and reports its accuracy on the validation part, in percent.

    The test part is looked at for final tasks only, as ``test_accuracy``; these keep the finished model. A fidelity's
    checkpoint is taken before its learning rate decays, so that a run of 9 epochs which continues one of 3 equals an
    unbroken run of 9 bit for bit.

    Args:
        fidelities: epochs, rising.

    The other arguments are those of ``Recipe``.

    Raises:
        InputError: an argument is out of range.
    """

    name: ClassVar[str] = "training"
    batch_size = 1

    def __init__(
        self,
        *,
        fidelities: list[int],
        batch: int = Recipe.batch,
        optimizer: Optimizer = Recipe.optimizer,
        learning_rate: float = Recipe.learning_rate,
        momentum: float = Recipe.momentum,
        weight_decay: float = Recipe.weight_decay,
        label_smoothing: float = Recipe.label_smoothing,
        warmup: float = Recipe.warmup,
        decay: float = Recipe.decay,
        augmentation: Augmentation = Recipe.augmentation,
        norm_momentum: float = Recipe.norm_momentum,
    ) -> None:
        rising = all(a < b for a, b in zip([0, *fidelities], fidelities, strict=False))
        if not fidelities or not rising:
            problem = "is not a rising list of positive epochs"
            raise InputError("evaluators.training.fidelities", fidelities, problem, "Give one such as [3, 9].")
        self.fidelities = list(fidelities)
        self.recipe = Recipe(
            batch=batch,
            optimizer=optimizer,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            warmup=warmup,
            decay=decay,
            augmentation=augmentation,
            norm_momentum=norm_momentum,
        )

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (
            MetricSpec(name="accuracy", unit="%", direction="max"),
            MetricSpec(name="train_loss", unit="nat", direction="min"),
        )

    def check(self, context: EvaluationContext) -> None:
        check_batch(self.name, self.recipe.batch, load_for(context.space, context.data))

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        data = load_for(context.space, context.data)
        results: list[Evaluated | Exception] = []
        for task in tasks:
            try:
                with torch_threads(context.threads):
                    results.append(self._evaluate(task, context, data))
            except Exception as error:
                results.append(error)
        return results

    def recipe_digest(self, space: Space, data: DataSet) -> str:
        """Identity of all that changes the outcome but seed and candidate; part of a checkpoint's file name."""
        return self.recipe.digest(data=data.digest, space=space.digest)

    def checkpoint_name(self, task: Task, fidelity: int, digest: str, *, final: bool = False) -> str:
        kind = "final" if final else "f"
        return f"{task.key}-r{task.repeat}-{kind}{fidelity}-{digest}.safetensors"

    def _evaluate(self, task: Task, context: EvaluationContext, data: DataSet) -> Evaluated:
        digest = self.recipe_digest(context.space, data)
        metadata = {"key": task.key, "seed": str(task.seed), "recipe": digest}
        run = self._continued(task, context, data, digest, metadata)
        run.train(self.recipe.trunk(task.fidelity), task.fidelity)
        trunk = run.state() if context.files is not None and not task.final else None
        run.train(task.fidelity, task.fidelity)
        metrics = {
            "accuracy": Metric(run.accuracy("validation"), "measured"),
            "train_loss": Metric(run.loss, "measured"),
        }
        if task.final:
            metrics["test_accuracy"] = Metric(run.accuracy("test"), "measured")
        if context.files is None:
            return Evaluated(metrics)
        uri = checkpoints.join(context.files, self.checkpoint_name(task, task.fidelity, digest, final=task.final))
        if trunk is None:
            checkpoints.write_model(uri, run.weights(), {**metadata, "epochs": str(task.fidelity)})
        else:
            final = {checkpoints.FINAL + name: tensor for name, tensor in run.weights().items()}
            checkpoints.write(uri, {**trunk.tensors, **final}, {**metadata, "epochs": str(trunk.epochs)})
        return Evaluated(metrics, uri)

    def _continued(
        self, task: Task, context: EvaluationContext, data: DataSet, digest: str, metadata: Mapping[str, str]
    ) -> Run:
        """A run from the longest readable checkpoint, or from scratch; the outcome is the same."""

        def fresh() -> Run:
            return Run(lambda: context.space.build(task.genotype), data, self.recipe, task.seed)

        if context.files is None:
            return fresh()
        for fidelity in sorted({*(self.fidelities or ()), task.fidelity}, reverse=True):
            if fidelity > task.fidelity:
                continue
            uri = checkpoints.join(context.files, self.checkpoint_name(task, fidelity, digest))
            try:
                tensors, found = checkpoints.read(uri, {**metadata, "epochs": str(self.recipe.trunk(fidelity))})
                run = fresh()
                run.restore(TrunkState(int(found["epochs"]), tensors))
            except (checkpoints.UnreadableCheckpointError, ValueError, KeyError, IndexError, RuntimeError):
                continue
            return run
        return fresh()


@dataclass(frozen=True)
class FinalistResult:
    """A finalist after its long training.

    Attributes:
        validation_accuracy, test_accuracy: percent; the test part was used once, here.
        train_loss: mean of the last epoch.
        epochs: as asked for.
        state_dict: the trained weights and buffers, contiguous, for ``space.build(genotype).load_state_dict``.
    """

    validation_accuracy: float
    test_accuracy: float
    train_loss: float
    epochs: int
    state_dict: dict[str, Tensor]


def train_finalist(
    space: Space,
    genotype: Genotype,
    data: DataSet | Mapping[str, Any],
    epochs: int,
    seed: int,
    threads: int = 1,
    recipe: Recipe | None = None,
) -> FinalistResult:
    """Train one genotype on the training part for long, then look at validation and test accuracy.

    Args:
        space: of the genotype, with ``resolution``, ``in_channels`` and ``classes``.
        data: a data set, or a job file's ``data`` mapping.
        epochs: 1 or more.
        seed: of weights, order and augmentation.
        threads: inside torch.
        recipe: the search's (``Training.recipe``); None for the default settings.

    Raises:
        InputError: no data, unlike classes, or no epoch.
    """
    if epochs < 1:
        raise InputError("finalists.epochs", epochs, "is not positive", "Give 1 or more.")
    loaded = data if isinstance(data, DataSet) else load_for(space, data)
    with torch_threads(threads):
        run = Run(lambda: space.build(genotype), loaded, recipe or Recipe(), seed)
        run.train(epochs, epochs)
        return FinalistResult(run.accuracy("validation"), run.accuracy("test"), run.loss, epochs, run.weights())


def check_batch(evaluator: str, batch: int, data: DataSet) -> None:
    """Refuse a batch that the training part cannot fill.

    Raises:
        InputError: names the evaluator's argument.
    """
    images = len(data.split["train"])
    if images < batch:
        problem = f"is more than the {images} training images"
        raise InputError(f"evaluators.{evaluator}.batch", batch, problem, "Lower it.")


def load_for(space: Space, config: Mapping[str, Any] | None) -> DataSet:
    """The job's data set at the resolution and channels of its space.

    Raises:
        InputError: the job names no data, the space is not one of image classifiers, or the classes differ.
    """
    if config is None:
        raise InputError("data", None, "is missing, which this job needs", "Give one, e.g. {name: digits}.")
    if not isinstance(space, ImageSpace):
        problem = "has no image classifiers to train"
        raise InputError("space.name", space.name, problem, "Choose another space, or leave out the training.")
    data = load(config, space.resolution, space.in_channels)
    if len(data.classes) != space.classes:
        problem = f"differs from the {len(data.classes)} classes of {data.name}"
        remedy = f"Set it to {len(data.classes)}, or choose a model that has so many."
        raise InputError("space.classes", space.classes, problem, remedy)
    return data
