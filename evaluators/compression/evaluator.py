"""Compression policies as candidates: what a trained network loses under them, and what they save."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from archfront.errors import InputError
from archfront.evaluators import checkpoints
from archfront.evaluators.compression.compressible import Compressible, Judged
from archfront.evaluators.compression.fine_tuning import FineTuning
from archfront.evaluators.compression.recovery.recovery import Recovery
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.training import load_for
from archfront.evaluators.training_loop import torch_threads
from archfront.spaces.policies.policy_chain import policies_of

_KEPT = 4
"""Networks whose weights, ranges and traces a worker remembers."""

_networks: OrderedDict[tuple[Any, ...], Compressible] = OrderedDict()

_COSTS = (
    MetricSpec(name="params", unit="1", direction="min"),
    MetricSpec(name="macs", unit="1", direction="min"),
    MetricSpec(name="size_bytes", unit="bytes", direction="min"),
    MetricSpec(name="model_mb", unit="MiB", direction="min"),
    MetricSpec(name="gbops", unit="1e9", direction="min"),
)


class Compression(Evaluator):
    """Accuracy of a trained network under compression policies, and how far it is below the network's own.

    ``accuracy_drop`` is in points, over the same samples, with the standard deviation of the paired difference; where
    there is fine-tuning, the network itself gets the same before. ``divergence`` is that of the class probabilities
    from the network's own: of few samples it tells policies apart that accuracy does not. Calibration sees the training
    part alone; the test part is looked at for final tasks alone, whose networks have true low-bit weights.

    Args:
        fidelities: samples of the validation part that a policy is judged by, rising; all by default.
        calibration: samples of the training part that ranges are observed on and recovery works with.
        images: that pass at once.
        together: policies that a worker takes at once; the more, the more they share.
        recovery: steps that each compressed network goes through, as ``[{name: gptq}, {name: low-rank, rank: 4}]``.
        fine_tuning: training of each compressed network after that, see ``FineTuning``.

    Raises:
        InputError: fidelities that do not rise, or an unknown step.
    """

    name: ClassVar[str] = "compression"

    def __init__(
        self,
        *,
        fidelities: list[int] | None = None,
        calibration: int = 256,
        images: int = 256,
        together: int = 50,
        recovery: list[dict[str, Any]] | None = None,
        fine_tuning: FineTuning | None = None,
    ) -> None:
        numbers = {"calibration": calibration, "images": images, "together": together}
        for field, number in {**numbers, **{f"fidelities.{i}": n for i, n in enumerate(fidelities or ())}}.items():
            if number < 1:
                raise InputError(f"evaluators.compression.{field}", number, "is not positive", "Give 1 or more.")
        if fidelities is not None and sorted(set(fidelities)) != fidelities:
            raise InputError("evaluators.compression.fidelities", fidelities, "does not rise", "Order them.")
        self.fidelities = fidelities
        self.calibration, self.images = calibration, images
        self.recovery = recovery or []
        _check_order([self._step(i) for i in range(len(self.recovery))])
        self.fine_tuning = fine_tuning
        # What makes a network of its own for each policy shares nothing.
        self.batch_size = together if not self.recovery and fine_tuning is None else 1

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (
            MetricSpec(name="accuracy", unit="%", direction="max", has_std=True),
            MetricSpec(name="accuracy_drop", unit="points", direction="min", has_std=True),
            MetricSpec(name="divergence", unit="nat", direction="min", has_std=True),
            *_COSTS,
        )

    def check(self, context: EvaluationContext) -> None:
        policies, data = policies_of(context.space, self.name), load_for(context.space, context.data)
        for field, wanted, part in (
            ("calibration", self.calibration, "train"),
            ("fidelities", max(self.fidelities or [1]), "validation"),
        ):
            there = len(data.split[part])  # type: ignore[index]
            if wanted > there:
                problem = f"is more than the {there} {part} samples of {data.name}"
                raise InputError(f"evaluators.compression.{field}", wanted, problem, "Lower it.")
        if self.fine_tuning is not None:
            self.fine_tuning.part(data)
        # The strongest policy meets what can go wrong.
        strongest = policies.variant(policies.genotype({site.id: site.domain[0] for site in policies.sites}))
        try:
            student = policies.transform(policies.source.build(), strongest, ()).eval()
            with torch.no_grad():
                student(policies.source.example())
        except InputError:
            raise
        except Exception as error:
            problem = f"makes a network that fails ({type(error).__name__}: {error})"
            raise InputError("space", policies.genotype({}), problem, "Change the order of its parts.") from error
        for step in (self._step(i) for i in range(len(self.recovery))):
            step.check(student)

    def prepare_key(self, context: EvaluationContext) -> str | None:
        if self.fine_tuning is None or context.files is None:
            return None
        # Each job keeps its checkpoints in a folder of its own.
        return hashlib.blake2b(f"{self._digest(context)} {context.files}".encode(), digest_size=16).hexdigest()

    def prepare(self, context: EvaluationContext) -> dict[str, Any]:
        """The network itself, fine-tuned once for all workers, as a checkpoint."""
        with torch_threads(context.threads):
            self.network(context).reference()
        return {}

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        results: list[Evaluated | Exception | None] = [None] * len(tasks)
        with torch_threads(context.threads):
            network = self.network(context)
            for final, fidelity, seed in sorted({_kind(task) for task in tasks}):
                chosen = [i for i, task in enumerate(tasks) if _kind(task) == (final, fidelity, seed)]
                count = None if final or not self.fidelities else fidelity
                if network.shares:
                    found = self._judged(network, [tasks[i].genotype for i in chosen], count, seed, final)
                    for i, one in zip(chosen, found, strict=True):
                        results[i] = one
                    continue
                for i in chosen:
                    # One that fails, in training say, takes no other with it.
                    try:
                        [results[i]] = self._judged(network, [tasks[i].genotype], count, seed, final)
                    except Exception as error:
                        results[i] = error
        return [result for result in results if result is not None]

    def _judged(
        self, network: Compressible, genotypes: list[Any], count: int | None, seed: int, final: bool
    ) -> list[Evaluated]:
        space = network.space
        policies = [space.variant(genotype) for genotype in genotypes]
        judged = network.judged("validation", policies, count, seed, packed=final)
        tested = network.judged("test", policies, None, seed, packed=True) if final else [None] * len(policies)
        if network.shares:
            table = space.cost_table(space.from_json(genotypes))
            costs = [{name: float(values[row]) for name, values in table.items()} for row in range(len(policies))]
        else:
            costs = [network.costs(policy, seed) for policy in policies]
        return [
            Evaluated(
                _metrics("", one)
                | ({} if last is None else _metrics("test_", last))
                | {name: Metric(value, "computed") for name, value in cost.items()}
            )
            for one, last, cost in zip(judged, tested, costs, strict=True)
        ]

    @contextmanager
    def deployed(
        self, items: Sequence[Mapping[str, Any]], context: EvaluationContext
    ) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """Files of the policies' networks for backends that execute files."""
        from archfront.evaluators.deployment.deployed import deployed_items

        with torch_threads(context.threads), tempfile.TemporaryDirectory(prefix="archfront-files-") as folder:
            yield deployed_items(self.network(context), items, Path(folder), context.threads)

    def network(self, context: EvaluationContext) -> Compressible:
        """The trained network with what the job does to all its policies; kept from call to call."""
        data = load_for(context.space, context.data)
        digest = self._digest(context)
        key = (digest, self.images, context.files)
        if key not in _networks:
            _networks[key] = Compressible(
                policies_of(context.space, self.name),
                data,
                self.calibration,
                self.images,
                recovery=[self._step(i) for i in range(len(self.recovery))],
                fine_tuning=self.fine_tuning,
                reference=lambda seed, network, tune: _tuned(
                    context.files, f"reference-{digest}-{seed}", network, tune
                ),
            )
            while len(_networks) > _KEPT:
                _networks.popitem(last=False)
        _networks.move_to_end(key)
        return _networks[key]

    def _step(self, i: int) -> Recovery:
        return RECOVERIES.build(self.recovery[i], f"evaluators.compression.recovery.{i}")

    def _digest(self, context: EvaluationContext) -> str:
        """Of all that changes what a policy does to accuracy."""
        tuning = None if self.fine_tuning is None else self.fine_tuning.digest
        data = load_for(context.space, context.data).digest
        parts = [context.space.digest, data, self.calibration, self.recovery, tuning]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tuned(files: str | None, name: str, network: nn.Module, tune: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A network tuned, in place: with the weights of a checkpoint, or by doing it, and leaving them for others."""
    if files is None:
        return tune(network)
    uri = checkpoints.join(files, f"{name}.safetensors")
    try:
        tensors, _ = checkpoints.read(uri, {"name": name})
        network.load_state_dict(tensors)
        return network
    except (checkpoints.UnreadableCheckpointError, RuntimeError):
        tune(network)
    checkpoints.write(uri, {key: t.contiguous() for key, t in network.state_dict().items()}, {"name": name})
    return network


def _check_order(steps: Sequence[Recovery]) -> None:
    """Refuse steps that undo what a step before them did.

    Raises:
        InputError: names the step.
    """
    for i, (before, step) in enumerate(itertools.pairwise(steps), start=1):
        if step.stage < before.stage or step.stage == before.stage == 1:
            problem = f"cannot come behind {before.name!r}, whose work it would undo"
            raise InputError(f"evaluators.compression.recovery.{i}", step.name, problem, "Change their order.")
        if (before.name, step.name) == ("adaround", "low-rank"):
            problem = "would take back what 'adaround' learned: it corrects weights, not outputs"
            raise InputError(f"evaluators.compression.recovery.{i}", step.name, problem, "Leave one of them out.")


def _kind(task: Task) -> tuple[bool, int, int]:
    return task.final, task.fidelity, task.repeat


def _metrics(prefix: str, judged: Judged) -> dict[str, Metric]:
    return {
        f"{prefix}accuracy": Metric(judged.accuracy, "measured", judged.accuracy_std),
        f"{prefix}accuracy_drop": Metric(judged.drop, "measured", judged.drop_std),
        f"{prefix}divergence": Metric(judged.divergence, "measured", judged.divergence_std),
    }
