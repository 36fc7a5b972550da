"""Evaluate on Ray, local or a cluster."""

from __future__ import annotations

import pickle
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from archfront.errors import JobFailedError, StoppedError, WorkersUnreachableError
from archfront.evaluators.evaluator import Task
from archfront.search.executors.evaluation_process import checked_reply
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.executors.ray_hub import HubPool, RayHub
from archfront.search.executors.ray_options import PoolOptions
from archfront.search.executors.wire import pack_tasks, unpack_outcomes
from archfront.search.worker import WorkerSetup

PATIENCE_S = 300.0
"""How long a driver at somebody's terminal waits for Ray to come back."""

_ATTEMPTS = 5


class RayExecutor(Executor):
    """Batches on the Ray actors of one pool.

    Args:
        hub: the way to Ray; not closed here.
        announce: called with a line on what the workers wait for.
        stop: polled while a call waits; true raises ``StoppedError``.
        patience_s: how long Ray may be away, or refuse us, before the run ends resumable; None for ever.
    """

    def __init__(
        self,
        hub: RayHub,
        setup: WorkerSetup,
        options: PoolOptions,
        *,
        announce: Callable[[str], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        self.slots = options.slots
        self._setup = setup
        self._announce = announce
        self._stop = stop
        self.elsewhere = hub.address is not None
        self._patience_s = patience_s
        self._pool: HubPool = hub.open(options)
        self._away_since: float | None = None
        self._calls = 0

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        for _ in range(_ATTEMPTS):
            self._calls += 1
            setup = pickle.dumps(self._setup)
            self._pool.call(self._calls, setup, evaluator, method, dict(arguments), timeout_s)
            number, reply, lost = self._reply()
            while number != self._calls:
                number, reply, lost = self._reply()
            if not lost:
                return checked_reply(reply, evaluator, method)
        raise WorkersUnreachableError(
            f"{method} of {evaluator!r} was lost with its worker {_ATTEMPTS} times. Resume the job when Ray is well."
        )

    def start(self) -> None:
        self._pool.start(pickle.dumps(self._setup))

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        self._pool.evaluate(batch, pack_tasks(tasks), timeout_s)

    def wait(self, timeout_s: float) -> list[BatchResult]:
        results: list[BatchResult] = []
        until = time.monotonic() + timeout_s
        while True:
            try:
                message = self._pool.inbox.get(timeout=0 if results else max(until - time.monotonic(), 0))
            except (queue.Empty, ValueError):
                break
            kind, content = message
            if kind == "result":
                if content.packed is not None:
                    content.outcomes, content.packed = unpack_outcomes(content.packed), None
                results.append(content)
            else:
                self._heed(kind, content)
        if not results:
            self._lose_patience()
        return results

    def rest(self) -> None:
        self._pool.rest()

    def close(self) -> None:
        self._pool.close()

    def _reply(self) -> Any:
        while True:
            try:
                kind, content = self._pool.inbox.get(timeout=1)
            except queue.Empty:
                if self._stop():
                    raise StoppedError("stopped while it waited for a worker") from None
                self._lose_patience()
                continue
            if kind == "reply":
                return content
            self._heed(kind, content)

    def _heed(self, kind: str, content: Any) -> None:
        if kind == "impossible":
            raise JobFailedError(f"{content} Ask for less, or name a cluster with --ray.")
        if kind == "refused" and self._patience_s is not None:
            raise WorkersUnreachableError(f"{content}. Install the same on all hosts, then resume the job.")
        if kind == "ready":
            self._away_since = None
        elif kind == "away":
            if self._away_since is None:
                self._away_since = time.monotonic()
            self._announce(f"Ray cannot be reached, trying again: {content.splitlines()[-1]}")
        elif kind in ("notice", "refused"):
            self._announce(content)

    def _lose_patience(self) -> None:
        if self._away_since is None or self._patience_s is None:
            return
        if time.monotonic() - self._away_since > self._patience_s:
            raise WorkersUnreachableError("Ray cannot be reached. Resume the job when it is back.")
