"""One child process that evaluates, and the parent's hold on it: time limit, memory limit, cause of death.

Every executor that runs evaluations outside of the driver uses it (Ray's actors too), so a hang, a crash or a memory
hog looks the same everywhere, and costs its own batch alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import psutil

from archfront.errors import JobFailedError
from archfront.evaluators.evaluator import Task
from archfront.search.executors.child import Child, end_with_parent, parent_connection
from archfront.search.executors.wire import pack_outcomes, pack_tasks, unpack_outcomes, unpack_tasks
from archfront.search.worker import Failure, Outcome, Worker, WorkerSetup

_POLL_S = 0.2
_STARTUP_S = 180.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EvaluationProcess:
    """A child with the evaluators of one job. Started at the first call, and again after a death.

    Args:
        setup: what the child builds its evaluators from.
        threads: of the child; explicit, since Ray's workers inherit OMP_NUM_THREADS=1.
        memory_mb: resident memory at which the child is killed.
    """

    def __init__(self, setup: WorkerSetup, *, threads: int, memory_mb: int | None = None) -> None:
        self._setup = setup
        self._threads = threads
        self._memory_mb = memory_mb
        self._child: Child | None = None

    def evaluate(self, tasks: Sequence[Task], timeout_s: float) -> list[Outcome] | Failure:
        """The outcomes of a batch, or how the child died over it."""
        reply = self.evaluate_packed(pack_tasks(tasks), timeout_s)
        return reply if isinstance(reply, Failure) else unpack_outcomes(reply)

    def evaluate_packed(self, tasks: bytes, timeout_s: float) -> bytes | Failure:
        """The same with tasks and outcomes as ``wire`` packs them."""
        reply = self._call(("evaluate", tasks), timeout_s)
        assert isinstance(reply, (bytes, Failure))
        return reply

    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """``Worker.call`` there, or how it failed."""
        return self._call(("call", (evaluator, method, dict(arguments))), timeout_s)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def kill(self) -> None:
        """End the child from another thread; a call under way returns its death."""
        child = self._child
        if child is not None:
            child.kill()

    def _call(self, request: tuple[str, Any], timeout_s: float) -> Any:
        if self._child is None:
            failure = self._start()
            if failure is not None:
                return failure
        assert self._child is not None
        try:
            self._child.connection.send(request)
        except OSError:
            return self._dead("died")
        return self._reply(timeout_s)

    def _start(self) -> Failure | None:
        """Start the child and wait until its evaluators stand; a failure if they do not."""
        self._child = Child(__name__, os.environ | dict.fromkeys(_THREAD_VARIABLES, str(self._threads)))
        try:
            self._child.connection.send(self._setup)
        except OSError:
            return self._dead("died")
        reply = self._reply(_STARTUP_S)
        if isinstance(reply, Failure):
            self.close()
            return reply
        return None

    def _reply(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        assert self._child is not None
        connection = self._child.connection
        while True:
            try:
                if connection.poll(min(_POLL_S, max(deadline - time.monotonic(), 0))):
                    return connection.recv()
            except (EOFError, OSError):
                return self._dead("died")
            if time.monotonic() >= deadline:
                return self._dead("timeout", f"took longer than {timeout_s:g} s and was stopped")
            if self._memory_mb is not None:
                used_mb = _resident_mb(self._child.process.pid)
                if used_mb > self._memory_mb:
                    return self._dead("memory", f"used {used_mb:.0f} MB, more than memory_mb: {self._memory_mb}")

    def _dead(self, kind: str, message: str | None = None) -> Failure:
        """End what is left of the child, and say how it died."""
        assert self._child is not None
        process = self._child.process
        if kind != "died":
            self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        code = process.poll()
        if message is None:
            message = "the worker process died" + ("" if code is None else f" ({_exit_text(code)})")
        output = self._child.last_words()
        self.close()
        return Failure(kind=kind, message=message, traceback=output or None)


def checked_reply(reply: Any, evaluator: str, method: str) -> Any:
    """The reply to a call.

    Raises:
        JobFailedError: it is a failure.
    """
    if not isinstance(reply, Failure):
        return reply
    identifying = "Identifying the device of"
    doing = {"prepare": "Preparing", "prepare_key": identifying, "device_key": identifying, "measure": "Measuring with"}
    raise JobFailedError(
        f"{doing[method]} the evaluator {evaluator!r} failed: {reply.message}\n{reply.traceback or ''}".rstrip()
    )


def _exit_text(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"signal {name}" + ("; out of memory, perhaps" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _resident_mb(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(p.memory_info().rss for p in family) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def serve(connection: Connection) -> None:
    """The child's life: the set-up, then requests until the pipe closes."""
    setup: WorkerSetup = connection.recv()
    try:
        worker = Worker(setup)
    except Exception as error:
        message = f"the evaluators cannot be built: {error!r}"
        connection.send(Failure(kind="error", message=message, traceback=traceback.format_exc()))
        return
    connection.send("ready")
    while True:
        try:
            kind, argument = connection.recv()
        except EOFError:
            return
        try:
            if kind == "evaluate":
                reply: Any = pack_outcomes(worker.evaluate(unpack_tasks(argument)))
            else:
                reply = worker.call(*argument)
        except Exception as error:
            reply = Failure(kind="error", message=repr(error), traceback=traceback.format_exc())
        connection.send(reply)


if __name__ == "__main__":
    end_with_parent()
    # The module that the pickled names refer to is the imported one, not this __main__.
    from archfront.search.executors import evaluation_process

    evaluation_process.serve(parent_connection())
