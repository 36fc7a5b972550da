"""Compression policies as candidates: what a trained network loses under them, and what they save."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible, Judged
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.training import load_for
from archfront.evaluators.training_loop import torch_threads
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.quantiser import ActivationRanges

_KEPT = 4
"""Networks whose weights, ranges and traces a worker remembers."""

_networks: OrderedDict[tuple[Any, ...], Compressible] = OrderedDict()


class Compression(Evaluator):
    """Accuracy of a trained network under policies of bits, and how far it is below the network's own.

    ``accuracy_drop`` is in points, over the same images, with the standard deviation of the paired difference. Ranges
    of activations come from images of the training part; the test part is looked at for final tasks alone.

    Args:
        fidelities: images of the validation part that a policy is judged by, rising; all by default.
        calibration: images of the training part that ranges are observed on.
        ranges: of activations, see ``ActivationQuantiser``.
        images: that pass at once.
        together: policies that a worker takes at once; the more, the more they share.

    Raises:
        InputError: a number below 1.
    """

    name: ClassVar[str] = "compression"

    def __init__(
        self,
        *,
        fidelities: list[int] | None = None,
        calibration: int = 256,
        ranges: ActivationRanges = "mse",
        images: int = 256,
        together: int = 50,
    ) -> None:
        numbers = {"calibration": calibration, "images": images, "together": together}
        for field, number in {**numbers, **{f"fidelities.{i}": n for i, n in enumerate(fidelities or ())}}.items():
            if number < 1:
                raise InputError(f"evaluators.compression.{field}", number, "is not positive", "Give 1 or more.")
        if fidelities is not None and sorted(set(fidelities)) != fidelities:
            raise InputError("evaluators.compression.fidelities", fidelities, "does not rise", "Order them.")
        self.fidelities = fidelities
        self.calibration, self.ranges, self.images = calibration, ranges, images
        self.batch_size = together

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (
            MetricSpec(name="accuracy", unit="%", direction="max", has_std=True),
            MetricSpec(name="accuracy_drop", unit="points", direction="min", has_std=True),
            MetricSpec(name="size_bytes", unit="bytes", direction="min"),
            MetricSpec(name="weight_mb", unit="MiB", direction="min"),
            MetricSpec(name="gbops", unit="1e9", direction="min"),
        )

    def check(self, context: EvaluationContext) -> None:
        space, data = _bits(context), load_for(context.space, context.data)
        for field, wanted, part in (
            ("calibration", self.calibration, "train"),
            ("fidelities", max(self.fidelities or [1]), "validation"),
        ):
            there = len(data.split[part])  # type: ignore[index]
            if wanted > there:
                problem = f"is more than the {there} {part} images of {data.name}"
                raise InputError(f"evaluators.compression.{field}", wanted, problem, "Lower it.")
        space.source.build()

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        results: list[Evaluated | Exception | None] = [None] * len(tasks)
        space = _bits(context)
        with torch_threads(context.threads):
            network = self._network(context)
            for final, fidelity in sorted({(task.final, task.fidelity) for task in tasks}):
                chosen = [i for i, t in enumerate(tasks) if (t.final, t.fidelity) == (final, fidelity)]
                genotypes = [tasks[i].genotype for i in chosen]
                policies = [space.layer_bits(genotype) for genotype in genotypes]
                count = None if final or not self.fidelities else fidelity
                judged = network.judged("validation", policies, count)
                tested = network.judged("test", policies, None) if final else [None] * len(chosen)
                costs = space.bit_costs(space.from_json(genotypes))
                for row, i in enumerate(chosen):
                    metrics = _metrics("", judged[row])
                    if (one := tested[row]) is not None:
                        metrics |= _metrics("test_", one)
                    metrics |= {name: Metric(float(values[row])) for name, values in costs.items()}
                    results[i] = Evaluated(metrics)
        return [result for result in results if result is not None]

    def _network(self, context: EvaluationContext) -> Compressible:
        data = load_for(context.space, context.data)
        key = (context.space.digest, data.digest, self.calibration, self.ranges, self.images)
        if key not in _networks:
            made = Compressible(_bits(context), data, self.calibration, self.images, self.ranges)
            _networks[key] = made
            while len(_networks) > _KEPT:
                _networks.popitem(last=False)
        _networks.move_to_end(key)
        return _networks[key]


def _metrics(prefix: str, judged: Judged) -> dict[str, Metric]:
    return {
        f"{prefix}accuracy": Metric(judged.accuracy, "measured", judged.accuracy_std),
        f"{prefix}accuracy_drop": Metric(judged.drop, "measured", judged.drop_std),
    }


def _bits(context: EvaluationContext) -> Bits:
    if not isinstance(context.space, Bits):
        remedy = "Choose the space 'bits', or another evaluator."
        raise InputError("space.name", context.space.name, "has no policies of bits", remedy)
    return context.space
