"""Evaluate in child processes of the driver: one machine, no Ray, up in the time that imports take."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from archfront.evaluators.evaluator import Task
from archfront.search.executors.evaluation_process import EvaluationProcess, checked_reply
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.worker import Failure, WorkerSetup


class ProcessExecutor(Executor):
    """``slots`` child processes, each held by one thread of the driver."""

    def __init__(self, setup: WorkerSetup, *, slots: int, threads: int, memory_mb: int | None) -> None:
        self.slots = slots
        self._setup = setup
        self._cores = threads
        self._memory_mb = memory_mb
        self._requests: queue.SimpleQueue[tuple[int, Sequence[Task], float] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BatchResult] = queue.SimpleQueue()
        self._processes: list[EvaluationProcess] = []
        self._threads: list[threading.Thread] = []

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        process = self._process()
        try:
            return checked_reply(process.call(evaluator, method, arguments, timeout_s), evaluator, method)
        finally:
            process.close()

    def start(self) -> None:
        for slot in range(self.slots):
            process = self._process()
            self._processes.append(process)
            thread = threading.Thread(target=self._hold, args=(f"process-{slot}", process), daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        self._requests.put((batch, tasks, timeout_s))

    def wait(self, timeout_s: float) -> list[BatchResult]:
        try:
            results = [self._results.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def rest(self) -> None:
        for _ in self._threads:
            self._requests.put(None)
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join(timeout=10)
        self._threads, self._processes = [], []

    def _process(self) -> EvaluationProcess:
        return EvaluationProcess(self._setup, threads=self._cores, memory_mb=self._memory_mb)

    def _hold(self, worker: str, process: EvaluationProcess) -> None:
        while (request := self._requests.get()) is not None:
            batch, tasks, timeout_s = request
            reply = process.evaluate(tasks, timeout_s)
            if isinstance(reply, Failure):
                self._results.put(BatchResult(batch=batch, worker=worker, death=reply))
            else:
                self._results.put(BatchResult(batch=batch, worker=worker, outcomes=reply))
        process.close()
