"""The Ray actor that holds one evaluation process. Pickled by value, so that it comes to life on a host without our
code too, and can say so: nothing of ours is imported before it is known to be the driver's own version."""

from __future__ import annotations

from typing import Any


class EvaluationActor:
    """Evaluates batches in a child process of its own.

    Args:
        setup: a pickled ``WorkerSetup``.
        threads: of the child.
        memory_mb: at which the child is killed.
        device: name of the device that this worker's host is, or holds: one measurement at a time.
    """

    def __init__(self, setup: bytes, threads: int, memory_mb: int | None, device: str | None) -> None:
        self._arguments = (setup, threads, memory_mb, device)
        self._process: Any = None

    def hello(self) -> dict[str, Any]:
        """Where this is, and what code it runs: ``node``, ``host`` and ``code``, or the ``problem`` with it."""
        import socket

        import ray

        found: dict[str, Any] = {"node": ray.get_runtime_context().get_node_id(), "host": socket.gethostname()}
        try:
            from archfront.search.code_identity import code_identity

            return found | {"code": code_identity([])}
        except Exception as error:  # whatever is wrong with an installation, its reason shall be read
            return found | {"problem": repr(error)}

    def evaluate(self, tasks: Any, timeout_s: float) -> Any:
        with self._device():
            return self._started().evaluate(tasks, timeout_s)

    def evaluate_packed(self, tasks: bytes, timeout_s: float) -> Any:
        """The same with tasks and outcomes as ``wire`` packs them."""
        with self._device():
            return self._started().evaluate_packed(tasks, timeout_s)

    def call(self, evaluator: str, method: str, arguments: dict[str, Any], timeout_s: float) -> Any:
        """Anything but evaluations: ``prepare_key``, ``prepare``, ``measure``."""
        with self._device():
            return self._started().call(evaluator, method, arguments, timeout_s)

    def _device(self) -> Any:
        from archfront.evaluators.latency.device_lock import device_lock

        return device_lock(self._arguments[3])

    def _started(self) -> Any:
        if self._process is None:
            import pickle

            from archfront.search.executors.evaluation_process import EvaluationProcess

            setup, threads, memory_mb, _ = self._arguments
            self._process = EvaluationProcess(pickle.loads(setup), threads=threads, memory_mb=memory_mb)
        return self._process
