"""Evaluate on Ray, local or a cluster, through a gateway process that may die without harm."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from archfront.errors import JobFailedError
from archfront.evaluators.evaluator import Task
from archfront.search.executors.child import Child
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.executors.ray_gateway import GatewayOptions
from archfront.search.worker import Failure, WorkerSetup

_GATEWAY = "archfront.search.executors.ray_gateway"
_RESTARTS = 5


class RayExecutor(Executor):
    """Batches on Ray actors.

    When the gateway ends (its Ray head was lost, say), its batches come back as lost and a new gateway is started,
    with growing pauses; a head that stays away fails the job after some minutes, resumable.
    """

    def __init__(self, setup: WorkerSetup, options: GatewayOptions) -> None:
        self.slots = options.slots
        self._setup = setup
        self._options = options
        self._gateway: Child | None = None
        self._started = False
        self._failed_starts = 0
        self._under_way: dict[int, tuple[Sequence[Task], float]] = {}

    def prepare(self, name: str, timeout_s: float) -> dict[str, Any]:
        self._connect()
        self._connection.send(("prepare", self._setup, name, timeout_s))
        if not self._connection.poll(timeout_s + 120):
            raise JobFailedError(f"Preparing the evaluator {name!r} took longer than {timeout_s:g} s.")
        try:
            reply = self._received()
        except EOFError:
            raise JobFailedError(f"Ray ended while {name!r} was prepared: {self._last_words()}") from None
        if isinstance(reply, Failure):
            raise JobFailedError(f"Preparing the evaluator {name!r} failed: {reply.message}")
        return dict(reply)

    def start(self) -> None:
        self._connect()
        self._connection.send(("start", self._setup))
        self._started = True

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        self._under_way[batch] = (tasks, timeout_s)
        try:
            self._connection.send(("evaluate", batch, tasks, timeout_s))
        except OSError:
            return  # the gateway is gone; wait() finds that out and hands the batch back

    def wait(self, timeout_s: float) -> list[BatchResult]:
        results: list[BatchResult] = []
        try:
            while self._connection.poll(0 if results else timeout_s):
                result = self._received()
                self._under_way.pop(result.batch, None)
                results.append(result)
        except (EOFError, OSError):
            results += self._recover()
        if results:
            self._failed_starts = 0 if any(r.outcomes for r in results) else self._failed_starts
        return results

    def close(self) -> None:
        if self._gateway is not None:
            # The pipe's end tells the gateway to leave Ray in order; a local cluster ends with it.
            self._gateway.close(grace_s=10)
            self._gateway = None

    def _received(self) -> Any:
        kind, content = self._connection.recv()
        if kind == "impossible":
            raise JobFailedError(f"{content} Ask for less, or name a cluster with --ray.")
        return content

    @property
    def _connection(self) -> Connection:
        assert self._gateway is not None
        return self._gateway.connection

    def _connect(self) -> None:
        if self._gateway is None:
            settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_DEDUP_LOGS": "0"}
            self._gateway = Child(_GATEWAY, settings | os.environ)
            self._connection.send(self._options)

    def _recover(self) -> list[BatchResult]:
        """A new gateway in place of one that ended; its batches are lost."""
        words = self._last_words()
        self.close()
        self._failed_starts += 1
        if self._failed_starts > _RESTARTS:
            raise JobFailedError(f"Ray cannot be reached: {words}. Resume the job when it is back.")
        time.sleep(min(2.0**self._failed_starts, 30))
        self._connect()
        if self._started:
            self._connection.send(("start", self._setup))
        lost = [BatchResult(batch=batch, worker="ray", lost=True) for batch in self._under_way]
        self._under_way.clear()
        return lost

    def _last_words(self) -> str:
        return (self._gateway.last_words() if self._gateway is not None else "") or "no message"
