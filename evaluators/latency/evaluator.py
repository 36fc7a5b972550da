"""Latency as an evaluator: predicted from a table of the device, or measured candidate by candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from archfront.errors import InputError
from archfront.evaluators.costs import InputShaped
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Evaluator, Metric, MetricSpec, Task
from archfront.evaluators.latency.device import LOCAL_CPU, fingerprint
from archfront.evaluators.latency.measurement import MeasurementError, measured_elsewhere
from archfront.evaluators.latency.table import FORMAT, LatencyTable, make_table
from archfront.spaces.blocks import BlockSpace

_PROCESS_TIMEOUT_S = 600.0


class Latency(Evaluator):
    """``latency_ms``: the time of one forward pass of a batch.

    Args:
        device: ``local-cpu``, the processor that the workers run on.
        batch: images a pass.
        threads: that the pass may use.
        mode: ``table`` predicts from blocks measured once per device; ``measure`` measures each candidate in a fresh
            process, which takes seconds.
        backend: ``eager`` or ``compile`` (``torch.compile``).

    Raises:
        InputError: an unknown device, mode or backend, or a number below 1.
    """

    name: ClassVar[str] = "latency"
    on_device = True

    def __init__(
        self,
        *,
        device: str = LOCAL_CPU,
        batch: int = 1,
        threads: int = 1,
        mode: Literal["table", "measure"] = "table",
        backend: Literal["eager", "compile"] = "eager",
    ) -> None:
        if device != LOCAL_CPU:
            raise InputError("evaluators.latency.device", device, "is not a known device", f"Known: {LOCAL_CPU}.")
        for field, number in (("batch", batch), ("threads", threads)):
            if number < 1:
                raise InputError(f"evaluators.latency.{field}", number, "is not positive", "Give 1 or more.")
        if mode not in ("table", "measure"):
            raise InputError("evaluators.latency.mode", mode, "is unknown", "Give 'table' or 'measure'.")
        if backend not in ("eager", "compile"):
            raise InputError("evaluators.latency.backend", backend, "is unknown", "Give 'eager' or 'compile'.")
        self.device = device
        self.batch = batch
        self.threads = threads
        self.mode = mode
        self.backend = backend
        self.batch_size = 4096 if mode == "table" else 8
        self._table: tuple[dict[str, Any], LatencyTable] | None = None

    @property
    def metrics(self) -> Sequence[MetricSpec]:
        return (MetricSpec(name="latency_ms", unit="ms", direction="min", has_std=True),)

    def check(self, context: EvaluationContext) -> None:
        space = context.space
        if self.mode == "table" and not isinstance(space, BlockSpace):
            remedy = "Choose mode 'measure', or a space of blocks such as fbnet."
            raise InputError("evaluators.latency.mode", "table", f"does not serve {space.name}, without blocks", remedy)
        if not isinstance(space, InputShaped):
            problem = "has no torch models to measure"
            raise InputError("space.name", space.name, problem, "Leave out the latency, or choose another space.")

    def device_key(self, context: EvaluationContext) -> str | None:
        return fingerprint(self.threads).digest

    def prepare_key(self, context: EvaluationContext) -> str | None:
        if self.mode != "table":
            return None
        device = fingerprint(self.threads).digest
        return f"{FORMAT}:{device}:{context.space.digest}:batch={self.batch}:threads={self.threads}:{self.backend}"

    def prepare(self, context: EvaluationContext) -> dict[str, Any]:
        """The table as JSON, measured in fresh processes; empty in mode ``measure``."""
        if self.mode != "table":
            return {}
        self.check(context)
        return make_table(
            _blocks(context),
            batch=self.batch,
            threads=self.threads,
            backend=self.backend,
            timeout_s=_PROCESS_TIMEOUT_S,
            plugins=context.plugins,
        ).to_json()

    def evaluate(self, tasks: Sequence[Task], context: EvaluationContext) -> Sequence[Evaluated | Exception]:
        if not tasks:
            return []
        return self._predicted(tasks, context) if self.mode == "table" else self._measured(tasks, context)

    def _predicted(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated | Exception]:
        space = _blocks(context)
        table = self._table_of(context)
        values, stds = table.predict(space, space.from_json([task.genotype for task in tasks]))
        predictor, device = f"table:{table.digest[:8]}", str(table.device["digest"])
        return [
            Evaluated({"latency_ms": Metric(float(value), "predicted", float(std), predictor, device)})
            for value, std in zip(values, stds, strict=True)
        ]

    def _measured(self, tasks: Sequence[Task], context: EvaluationContext) -> list[Evaluated | Exception]:
        config = {"name": context.space.name, **context.space.config}
        results: list[Evaluated | Exception] = []
        for task in tasks:
            item = {"genotype": task.genotype, "batch": self.batch, "backend": self.backend}
            try:
                [timing], environment = measured_elsewhere(
                    config, [item], threads=self.threads, timeout_s=_PROCESS_TIMEOUT_S, plugins=context.plugins
                )
                if timing.error is not None:
                    raise MeasurementError(timing.error)
            except Exception as error:
                results.append(error)
                continue
            device = environment["device"]["digest"]
            metric = Metric(timing.median_ms, "measured", timing.std_ms, None, device)
            results.append(Evaluated({"latency_ms": metric}))
        return results

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
