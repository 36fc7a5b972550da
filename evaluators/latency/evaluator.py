"""Latency as an evaluator: predicted from blocks or operators of the device, or measured candidate by candidate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from archfront.errors import InputError
from archfront.evaluators.costs import InputShaped
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.latency.device import LOCAL_CPU, Fingerprint, check_device, fingerprint
from archfront.evaluators.latency.feedback import LEAST_PAIRS, Feedback, fit_feedback
from archfront.evaluators.latency.measurement import MeasurementError, measured_elsewhere
from archfront.evaluators.latency.network_profile import network_latency
from archfront.evaluators.latency.predictors.layers import FORMAT as LAYER_FORMAT
from archfront.evaluators.latency.predictors.layers import LayerLatency
from archfront.evaluators.latency.predictors.network import FORMAT as NETWORK_FORMAT
from archfront.evaluators.latency.predictors.network import NetworkLatency
from archfront.evaluators.latency.predictors.populations import GenotypeLatency
from archfront.evaluators.latency.table import FORMAT, LatencyTable, make_table
from archfront.spaces.blocks import BlockSpace

LAYER_BACKENDS = ("onnx-int8", "onnx-int8-dynamic")
_BACKENDS = ("eager", "compile", "onnx", "cuda-graph")
_BATCHES = {"table": 4096, "operators": 64, "layers": 1024, "measure": 8}
"""Tasks a call in each mode."""
_PROCESS_TIMEOUT_S = 600.0
_CONFIDENCE, _DEVIATIONS = 0.9, 1.6449
"""An interval of this confidence reaches so many standard deviations to either side, where errors are normal."""
_VERIFIED_BATCH = 32
"""Tasks a call where some are measured: thousands would keep their results back for minutes."""


class Latency(Evaluator):
    """``latency_ms``: the time of one forward pass of a batch.

    With ``verify`` it is ``Learning``. A candidate that is measured too has the measured ``latency_ms``; beside it
    stand ``latency_predicted_ms``, what would else have been reported, and ``latency_base_ms``, the prediction before
    any correction by such pairs.

    Args:
        device: ``local-cpu``, the processor that the workers run on.
        batch: images a pass.
        threads: that the pass may use.
        mode: ``table`` predicts from blocks measured once per device, in spaces of blocks; ``operators`` from traced
            operators measured once per device, in any space of torch models; ``layers`` from the times of a network's
            layers in float and in int8, for policies of bits on backend ``onnx-int8`` or ``onnx-int8-dynamic``;
            ``measure`` measures each candidate in a fresh process, which takes seconds.
        backend: ``eager``, ``compile`` (``torch.compile``), ``onnx`` (ONNX Runtime on a processor, extra
            ``archfront[onnx]``), ``cuda-graph``, or those of mode ``layers``.
        verify: share of the candidates, from 0 to 1, that are measured as in mode ``measure`` besides being predicted;
            what is found corrects the predictions of those that follow.

    Raises:
        InputError: an unknown device, mode or backend, a number below 1, or a share that is none.
    """

    name: ClassVar[str] = "latency"
    on_device = True

    def __init__(
        self,
        *,
        device: str = LOCAL_CPU,
        batch: int = 1,
        threads: int = 1,
        mode: Literal["table", "operators", "layers", "measure"] = "table",
        backend: Literal["eager", "compile", "onnx", "cuda-graph", "onnx-int8", "onnx-int8-dynamic"] = "eager",
        verify: float = 0.0,
    ) -> None:
        # Whether a GPU is there is asked on the worker: the job may be read on a host that has none.
        if device != LOCAL_CPU and not re.fullmatch(r"cuda:\d+", device):
            remedy = f"Known: {LOCAL_CPU}, cuda:<number>."
            raise InputError("evaluators.latency.device", device, "is not a known device", remedy)
        for field, number in (("batch", batch), ("threads", threads)):
            if number < 1:
                raise InputError(f"evaluators.latency.{field}", number, "is not positive", "Give 1 or more.")
        for field, given, known in (("mode", mode, _BATCHES), ("backend", backend, (*_BACKENDS, *LAYER_BACKENDS))):
            if given not in known:
                remedy = f"Give {', '.join(known)}."
                raise InputError(f"evaluators.latency.{field}", given, "is unknown", remedy)
        if (mode == "layers") != (backend in LAYER_BACKENDS):
            remedy = f"Give mode 'layers' with one of {', '.join(LAYER_BACKENDS)}."
            raise InputError("evaluators.latency.backend", backend, f"does not go with mode '{mode}'", remedy)
        if backend == "cuda-graph" and device == LOCAL_CPU:
            raise InputError("evaluators.latency.backend", backend, "needs a GPU", "Give device cuda:0, or 'eager'.")
        if backend.startswith("onnx") and device != LOCAL_CPU:
            remedy = f"Give device {LOCAL_CPU}, or 'eager', 'compile' or 'cuda-graph'."
            raise InputError("evaluators.latency.backend", backend, "measures processors alone", remedy)
        if not 0 <= verify <= 1:
            raise InputError("evaluators.latency.verify", verify, "is no share", "Give a number from 0 to 1.")
        if verify and mode in ("measure", "layers"):
            remedy = "Leave it out, or choose mode 'table' or 'operators'."
            why = "is for predictions, and all are measured" if mode == "measure" else f"does not go with mode '{mode}'"
            raise InputError("evaluators.latency.verify", verify, why, remedy)
        self.device = device
        self.batch = batch
        self.threads = threads
        self.mode = mode
        self.backend = backend
        self.verify = verify
        self.batch_size = _VERIFIED_BATCH if verify else _BATCHES[mode]
        self._table: tuple[dict[str, Any], LatencyTable] | None = None
        self._network: tuple[dict[str, Any], GenotypeLatency] | None = None
        self._layers: tuple[dict[str, Any], LayerLatency] | None = None

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (MetricSpec(name="latency_ms", unit="ms", direction="min", has_std=True),)

    def check(self, context: EvaluationContext) -> None:
        space = context.space
        if self.mode == "table" and not isinstance(space, BlockSpace):
            remedy = "Choose mode 'measure', or a space of blocks such as fbnet."
            raise InputError("evaluators.latency.mode", "table", f"does not serve {space.name}, without blocks", remedy)
        if self.mode == "layers":
            from archfront.evaluators.deployment.policy_latency import bits_of

            bits_of(space)
        if not isinstance(space, InputShaped):
            problem = "has no torch models to measure"
            raise InputError("space.name", space.name, problem, "Leave out the latency, or choose another space.")

    def device_key(self, context: EvaluationContext) -> str | None:
        return self._fingerprint().digest

    def prepare_key(self, context: EvaluationContext) -> str | None:
        if self.mode == "measure":
            return None
        form = {"table": FORMAT, "operators": NETWORK_FORMAT, "layers": LAYER_FORMAT}[self.mode]
        device = self._fingerprint().digest
        return f"{form}:{device}:{context.space.digest}:batch={self.batch}:threads={self.threads}:{self.backend}"

    def prepare(self, context: EvaluationContext) -> dict[str, Any]:
        """The table or the operators' profile as JSON, measured in fresh processes; empty in mode ``measure``."""
        if self.mode == "measure":
            return {}
        self.check(context)
        if self.mode == "operators":
            place, device = self.device, self._fingerprint()
            made = network_latency(context.space, device, place, self.batch, context.plugins, backend=self.backend)
            return {**made.to_json(), "device": self._fingerprint().to_json()}
        if self.mode == "layers":
            from archfront.evaluators.deployment.policy_latency import policy_latency

            return policy_latency(
                context.space, self._fingerprint().to_json(), backend=self.backend, batch=self.batch,
                threads=self.threads, timeout_s=_PROCESS_TIMEOUT_S,
            ).to_json()  # fmt: skip
        return make_table(
            _blocks(context),
            batch=self.batch,
            threads=self.threads,
            backend=self.backend,
            timeout_s=_PROCESS_TIMEOUT_S,
            plugins=context.plugins,
            place=self.device,
        ).to_json()

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        if not tasks:
            return []
        if self.mode == "measure":
            found = [self._measured(task, context) for task in tasks]
            return [m if isinstance(m, Exception) else Evaluated({"latency_ms": m}) for m in found]
        predicted = {"table": self._by_table, "operators": self._by_operators, "layers": self._by_layers}
        bases = predicted[self.mode](tasks, context)
        return [
            base if isinstance(base, Exception) else self._reported(task, base, context)
            for task, base in zip(tasks, bases, strict=True)
        ]

    @property
    def pair_metrics(self) -> Sequence[str]:
        return ("latency_base_ms", "latency_ms") if self.verify else ()

    @property
    def least_pairs(self) -> int:
        return LEAST_PAIRS

    def refit(self, pairs: npt.NDArray[np.float64]) -> Mapping[str, Any]:
        return fit_feedback(pairs).to_json()

    def _reported(self, task: Task, base: Metric, context: EvaluationContext) -> Evaluated | Exception:
        predicted = self._corrected(base, task)
        # Finalists are measured on their own.
        if task.final or task.seed >= self.verify * 2**63:
            return Evaluated({"latency_ms": predicted})
        measured = self._measured(task, context)
        if isinstance(measured, Exception):
            return measured  # it fails, as in mode ``measure``
        return Evaluated({"latency_ms": measured, "latency_predicted_ms": predicted, "latency_base_ms": base})

    def _corrected(self, base: Metric, task: Task) -> Metric:
        """A prediction of the job's present version; the base itself before the first."""
        if task.learned is None:
            return base
        feedback = Feedback.from_json(task.learned.state)
        ms = feedback.ms(base.value)
        share = feedback.relative_width(_CONFIDENCE) / _DEVIATIONS
        return replace(base, value=ms, std=share * ms, predictor=f"{base.predictor}@{task.learned.version}")

    def _by_table(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Metric | Exception]:
        space = _blocks(context)
        table = self._table_of(context)
        values, stds = table.predict(space, space.from_json([task.genotype for task in tasks]))
        predictor, device = f"table:{table.digest[:8]}", str(table.device["digest"])
        return [
            Metric(float(value), "predicted", float(std), predictor, device)
            for value, std in zip(values, stds, strict=True)
        ]

    def _by_operators(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Metric | Exception]:
        artifact = context.artifacts.get(self.name)
        if not artifact:
            raise MeasurementError("The operators' profile is missing: prepare() has to run before evaluate().")
        if self._network is None or self._network[0] is not artifact:
            claimed = "cpu" if self.device == LOCAL_CPU else self.device
            self._network = (
                artifact,
                GenotypeLatency(context.space, NetworkLatency.from_json(artifact), self.batch, claimed),
            )
        prices = self._network[1]
        version = f"{prices.predictor.name}:{prices.predictor.digest[:8]}"
        # Constraints count in standard deviations: of the normal distribution with the same interval.
        share = prices.predictor.relative_width(_CONFIDENCE) / _DEVIATIONS
        device = str(artifact["device"]["digest"])
        results: list[Metric | Exception] = []
        for found in prices.of([task.genotype for task in tasks]):
            if isinstance(found, Exception):
                results.append(found)
                continue
            ms, guessed = found
            std = share * ms if math.isfinite(share) else None
            results.append(Metric(ms, "predicted", std, version + ("+trees" if guessed else ""), device))
        return results

    def _by_layers(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Metric | Exception]:
        from archfront.evaluators.deployment.policy_latency import bits_of, int8_mask

        artifact = context.artifacts.get(self.name)
        if not artifact:
            raise MeasurementError("The times of layers are missing: prepare() has to run before evaluate().")
        if self._layers is None or self._layers[0] is not artifact:
            self._layers = (artifact, LayerLatency.from_json(artifact))
        predictor = self._layers[1]
        paths = [price.layer for price in predictor.layers]
        found = predictor.predict(int8_mask(bits_of(context.space), paths, [task.genotype for task in tasks]))
        share = predictor.relative_width(_CONFIDENCE) / _DEVIATIONS
        device = str(predictor.device["digest"])
        return [
            Metric(
                ms, "predicted", share * ms if math.isfinite(share) else None, f"layers:{predictor.digest[:8]}", device
            )
            for ms in found.ms.tolist()
        ]

    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.threads, check_device(self.device, "evaluators.latency.device"))

    def _measured(self, task: Task, context: EvaluationContext) -> Metric | Exception:
        """In a process of its own: a process shifts all of its figures, and errors are to be independent."""
        try:
            [timing], environment = measured_elsewhere(
                {"name": context.space.name, **context.space.config},
                [{"genotype": task.genotype, "batch": self.batch, "backend": self.backend}],
                threads=self.threads,
                timeout_s=_PROCESS_TIMEOUT_S,
                plugins=context.plugins,
                device=self.device,
            )
            if timing.error is not None:
                raise MeasurementError(timing.error)
        except Exception as error:
            return error
        return Metric(timing.median_ms, "measured", timing.std_ms, None, environment["device"]["digest"])

    def _table_of(self, context: EvaluationContext) -> LatencyTable:
        artifact = context.artifacts.get(self.name)
        if not artifact:
            raise MeasurementError("The latency table is missing: prepare() has to run before evaluate().")
        # Parsed once: the same mapping is handed over with every call.
        if self._table is None or self._table[0] is not artifact:
            self._table = (artifact, LatencyTable.from_json(artifact))
        return self._table[1]


def _blocks(context: EvaluationContext) -> BlockSpace:
    if not isinstance(context.space, BlockSpace):
        raise InputError("space.name", context.space.name, "has no blocks", "Choose mode 'measure'.")
    return context.space
