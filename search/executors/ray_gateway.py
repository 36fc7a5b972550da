"""The one child process that touches Ray: a lost Ray head ends whoever is connected to it, and it must not be the
driver. Speaks with ``RayExecutor`` over a pipe."""

from __future__ import annotations

import logging
import math
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from archfront.search.executors.child import end_with_parent, parent_connection
from archfront.search.executors.evaluation_process import EvaluationProcess
from archfront.search.executors.executor import BatchResult
from archfront.search.worker import Failure, WorkerSetup


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """How to reach Ray, and what each worker takes.

    Attributes:
        address: of a Ray cluster; None for one of this process's own.
        slots: number of actors.
    """

    address: str | None
    slots: int
    cpus: float
    gpus: float
    memory_mb: int | None


class EvaluationActor:
    """A Ray actor that holds one evaluation process."""

    def __init__(self, setup: WorkerSetup, threads: int, memory_mb: int | None) -> None:
        self._process = EvaluationProcess(setup, threads=threads, memory_mb=memory_mb)

    def evaluate(self, tasks: Any, timeout_s: float) -> Any:
        return self._process.evaluate(tasks, timeout_s)

    def prepare(self, name: str, timeout_s: float) -> Any:
        return self._process.prepare(name, timeout_s)


class Gateway:
    """Ray actors behind a pipe: requests in, ``BatchResult``s (and replies to ``prepare``) out."""

    def __init__(self, connection: Connection, options: GatewayOptions) -> None:
        import ray

        self._ray = ray
        self._connection = connection
        self._lock = threading.Lock()
        self._options = options
        self._idle: list[int] = []
        self._actors: list[Any] = []
        settings: dict[str, Any] = {"address": options.address}
        if options.address is None:
            cores = max(os.cpu_count() or 1, math.ceil(options.slots * options.cpus))
            settings = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **settings)
        present = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        wanted = options.slots * options.gpus
        # A cluster may grow; this machine will not, and its actors would wait for ever.
        if options.address is None and wanted > present:
            self._send(("impossible", f"workers.gpus: {wanted:g} GPUs in all are asked for; here are {present:g}."))

    def serve(self) -> None:
        while True:
            try:
                request = self._connection.recv()
            except EOFError:
                return
            kind, *arguments = request
            if kind == "start":
                self._setup = self._ray.put(arguments[0])
                self._actors = [self._actor() for _ in range(self._options.slots)]
                self._idle = list(range(self._options.slots))
            elif kind == "prepare":
                self._prepare(*arguments)
            else:
                self._evaluate(*arguments)

    def _actor(self, setup: Any = None) -> Any:
        remote = self._ray.remote(num_cpus=self._options.cpus, num_gpus=self._options.gpus)(EvaluationActor)
        threads = max(1, int(self._options.cpus))
        return remote.remote(self._setup if setup is None else setup, threads, self._options.memory_mb)

    def _prepare(self, setup: WorkerSetup, name: str, timeout_s: float) -> None:
        actor = self._actor(self._ray.put(setup))
        try:
            reply: Any = self._ray.get(actor.prepare.remote(name, timeout_s))
        except Exception as error:
            reply = Failure(kind="error", message=str(error))
        self._ray.kill(actor)
        self._send(("prepared", reply))

    def _evaluate(self, batch: int, tasks: Any, timeout_s: float) -> None:
        with self._lock:
            slot = self._idle.pop(0)
        future = self._actors[slot].evaluate.remote(tasks, timeout_s).future()
        future.add_done_callback(lambda done: self._done(batch, slot, done))

    def _done(self, batch: int, slot: int, done: Future[Any]) -> None:
        worker = f"ray-{slot}"
        error = done.exception()
        if error is None:
            reply = done.result()
            dead = isinstance(reply, Failure)
            result = BatchResult(
                batch=batch, worker=worker, outcomes=[] if dead else reply, death=reply if dead else None
            )
        else:
            # The actor itself is gone, not the child in which evaluations run: Ray's memory monitor did it, or a host
            # was lost.
            hog = isinstance(error, self._ray.exceptions.OutOfMemoryError)
            death = Failure(kind="memory", message=str(error)) if hog else None
            result = BatchResult(batch=batch, worker=worker, death=death, lost=not hog)
            self._actors[slot] = self._actor()
        with self._lock:
            self._idle.append(slot)
        self._send(("result", result))

    def _send(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)


if __name__ == "__main__":
    end_with_parent()
    # Pickled names must refer to the imported module, not to this __main__.
    from archfront.search.executors import ray_gateway

    pipe = parent_connection()
    ray_gateway.Gateway(pipe, pipe.recv()).serve()
