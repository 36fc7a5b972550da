"""Evaluate as trials of Ray Tune, whose schedulers decide which candidates go on to the next fidelity."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from archfront.errors import JobFailedError, StoppedError, WorkersUnreachableError
from archfront.evaluators.evaluator import Task
from archfront.search.executors.child import Child
from archfront.search.executors.evaluation_process import checked_reply
from archfront.search.executors.executor import BatchResult, Executor
from archfront.search.tune.options import Past, TuneOptions
from archfront.search.worker import WorkerSetup

_GATEWAY = "archfront.search.tune.gateway"
_SILENT_S = 60.0
_START_S = 120.0
_LONGEST_PAUSE_S = 15.0
_CALL_ATTEMPTS = 5
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A trial that failed reports no metrics, and what Tune would write beside the ledger nobody reads.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclass(slots=True)
class _Sent:
    task: Task
    timeout_s: float
    sent: bool = False


class TuneExecutor(Executor):
    """One evaluation a batch, each a step of a trial. Holds the process in which Tune runs, and replaces it.

    Args:
        announce: called with a line on what the trials wait for.
        stop: polled while something else than a trial is waited for; true raises ``StoppedError``.
        patience_s: how long Ray may be away before the run ends resumable; None for ever.
    """

    decides = True

    def __init__(
        self,
        options: TuneOptions,
        setup: WorkerSetup,
        *,
        announce: Callable[[str], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        patience_s: float | None,
    ) -> None:
        self.slots = options.pool.slots
        self._options = options
        self._setup = setup
        self._announce = announce
        self._stop = stop
        self.elsewhere = options.address is not None
        self._patience_s = patience_s
        self._gateway: Child | None = None
        self._ready = False
        self._begun = False
        self._heard = 0.0
        self._retry_at = 0.0
        self._pause_s = 1.0
        self._away_since: float | None = None
        self._batches: dict[int, _Sent] = {}
        self._results: list[BatchResult] = []
        self._promoted: list[Task] = []
        self._past: list[Past] = []
        self._calls = 0
        self._reply: tuple[int, Any] | None = None
        self._settles = 0
        self._settled = 0

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        for _ in range(_CALL_ATTEMPTS):
            self._calls += 1
            self._until(lambda: self._ready)
            gateway = self._gateway
            request = (self._calls, pickle.dumps(self._setup), evaluator, method, dict(arguments), timeout_s)
            self._send("call", request)
            self._until(lambda: self._gateway is not gateway or self._replied())  # noqa: B023
            if self._replied() and self._reply is not None:
                return checked_reply(self._reply[1], evaluator, method)
        raise WorkersUnreachableError(
            f"{method} of {evaluator!r} was lost with Ray {_CALL_ATTEMPTS} times. Resume the job when Ray is well."
        )

    def start(self) -> None:
        self._open()

    def recall(self, past: Sequence[tuple[Task, Sequence[float] | None]]) -> None:
        if len(self._options.fidelities) > 1:
            self._past = [Past(task, None if values is None else self._options.judged(values)) for task, values in past]

    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        [task] = tasks
        self._batches[batch] = _Sent(task, timeout_s)
        self._dispatch()

    def wait(self, timeout_s: float) -> list[BatchResult]:
        until = time.monotonic() + timeout_s
        while not self._results and time.monotonic() < until:
            self._poll(until - time.monotonic())
        while self._ready and self._gateway is not None and self._waiting(0):
            self._poll(0)
        results, self._results = self._results, []
        return results

    def promotions(self, *, last: bool) -> list[Task]:
        if last and self._past:
            # Schedulers may let a paused trial go on only when nothing else is at work.
            self._settles += 1
            asked: Child | None = None
            while self._settled < self._settles:
                if self._ready and asked is not self._gateway:
                    asked = self._gateway
                    self._dispatch()
                    self._send("settle", self._settles)
                self._poll(0.5)
                self._heed_stop()
        promoted, self._promoted = self._promoted, []
        return promoted

    def rest(self) -> None:
        self._batches.clear()
        self._results, self._promoted = [], []
        self._close(10.0)

    # The process.

    def _open(self) -> None:
        self._gateway = Child(_GATEWAY, _SETTINGS | os.environ)
        self._heard = time.monotonic()
        with suppress(OSError):
            self._gateway.connection.send(self._options)

    def _close(self, grace_s: float) -> None:
        if self._gateway is not None:
            self._gateway.close(grace_s)
        self._gateway, self._ready, self._begun = None, False, False

    def _dispatch(self) -> None:
        """Send what has not been sent, the scheduler's past before all else."""
        if not self._ready:
            return
        if not self._begun:
            self._begun = True
            self._send("begin", (pickle.dumps(self._setup), pickle.dumps(self._past)))
        for batch, entry in self._batches.items():
            if not entry.sent:
                entry.sent = True
                self._send("evaluate", (batch, entry.task, entry.timeout_s))

    def _send(self, kind: str, content: Any) -> None:
        # Of a process that is ending: its end is noticed when we read.
        if self._gateway is not None:
            with suppress(OSError):
                self._gateway.connection.send((kind, content))

    def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._poll(1.0)
            self._heed_stop()

    def _heed_stop(self) -> None:
        if self._stop():
            raise StoppedError("stopped while it waited for Ray Tune")

    def _replied(self) -> bool:
        return self._reply is not None and self._reply[0] == self._calls

    def _waiting(self, timeout_s: float) -> bool:
        """Whether there is something to read, the end of the pipe included."""
        assert self._gateway is not None
        try:
            return self._gateway.connection.poll(max(timeout_s, 0))
        except OSError:
            return True

    def _poll(self, timeout_s: float) -> None:
        """Read one message if one comes in time; start the process where there is none.

        Raises:
            JobFailedError: this machine can never run the job.
            WorkersUnreachableError: Ray is away for too long, or a host has other code.
        """
        if self._gateway is None:
            if time.monotonic() < self._retry_at:
                self._lose_patience()
                time.sleep(min(max(timeout_s, 0), self._retry_at - time.monotonic(), 0.25))
                return
            self._open()
        assert self._gateway is not None
        if not self._waiting(timeout_s):
            if time.monotonic() - self._heard > (_SILENT_S if self._ready else _START_S):
                self._gateway.kill()
                self._lose("the process that runs Ray Tune gave no sign")
            self._lose_patience()
            return
        try:
            kind, content = self._gateway.connection.recv()
        except (EOFError, OSError):
            self._lose(self._gateway.last_words() or "no message")
            return
        self._heard = time.monotonic()
        if not self._ready:
            self._ready, self._away_since, self._pause_s = True, None, 1.0
            if self._batches:
                self._dispatch()
        self._take(kind, content)

    def _take(self, kind: str, content: Any) -> None:
        if kind == "result":
            result, promoted, value = content
            entry = self._batches.pop(result.batch, None)
            if entry is None:
                return
            self._results.append(result)
            self._promoted += promoted
            if len(self._options.fidelities) > 1 and not result.lost and (value is not None or result.outcomes):
                self._past.append(Past(entry.task, value))
        elif kind == "promoted":
            self._promoted += content
        elif kind == "settled":
            self._settled = content
        elif kind == "reply":
            self._reply = content
        elif kind == "notice":
            self._announce(content)
        elif kind == "impossible":
            raise JobFailedError(f"{content} Ask for less, or name a cluster with --ray.")
        elif kind == "refused":
            raise WorkersUnreachableError(
                f"The code of a worker differs ({content}). Install the same on all hosts, then resume the job."
            )

    def _lose(self, words: str) -> None:
        """Give back what went down with the process, and say why."""
        self._close(1.0)
        self._retry_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        for batch in [number for number, entry in self._batches.items() if entry.sent]:
            del self._batches[batch]
            self._results.append(BatchResult(batch=batch, worker="tune", lost=True, with_ray=True))
        if self._away_since is None:
            self._away_since = time.monotonic()
        self._announce(f"Ray Tune cannot be reached, trying again: {words.splitlines()[-1]}")

    def _lose_patience(self) -> None:
        if self._away_since is None or self._patience_s is None:
            return
        if time.monotonic() - self._away_since > self._patience_s:
            raise WorkersUnreachableError("Ray cannot be reached. Resume the job when it is back.")
