"""The child process in which Tune runs: a lost Ray head ends whoever is connected to it, and it must not be the
driver. Speaks with ``TuneExecutor`` over a pipe; one thread reads it, Tune's controller has the main one."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import tempfile
import threading
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError

from archfront.search.code_identity import code_identity
from archfront.search.executors.child import end_with_parent, parent_connection
from archfront.search.executors.evaluation_actor import EvaluationActor
from archfront.search.tune.bridge import BridgeScheduler, Feed, Forget, TaskSearcher
from archfront.search.tune.options import TuneOptions
from archfront.search.tune.trainable import EvaluationTrainable
from archfront.search.worker import Failure

_ALIVE_S = 5.0
_LOCAL_STORE_BYTES = 100 * 2**20


class Gateway:
    """Ray, and a run of Tune on it, behind a pipe."""

    def __init__(self, connection: Connection, options: TuneOptions) -> None:
        self._connection = connection
        self._options = options
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        settings: dict[str, Any] = {"address": options.address}
        if options.address is None:
            # "local", or Ray would join whatever cluster was started on this machine.
            settings = {"address": "local", "num_cpus": options.local_cpus, "include_dashboard": False}
            settings["object_store_memory"] = _LOCAL_STORE_BYTES
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **settings)
        self._send("alive", None)
        if options.address is None and (missing := self._missing()):
            self._send("impossible", missing)

    def serve(self) -> None:
        """What the driver asks, in order, until it closes the pipe."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                kind, content = self._inbox.get(timeout=_ALIVE_S)
            except queue.Empty:
                self._send("alive", None)
                continue
            if kind == "call":
                self._call(*content)
            elif kind == "begin":
                self._search(*content)
            elif kind == "leave":
                self._leave()

    def _read(self) -> None:
        while True:
            try:
                self._inbox.put(self._connection.recv())
            except (EOFError, OSError):
                self._inbox.put(("leave", None))
                return

    def _leave(self) -> None:
        # An own cluster ends with this process.
        ray.shutdown()
        os._exit(0)

    def _send(self, kind: str, content: Any) -> None:
        try:
            self._connection.send((kind, content))
        except OSError:
            return  # the driver is gone; the reading thread says so too

    def _call(self, number: int, setup: bytes, evaluator: str, method: str, arguments: Any, timeout_s: float) -> None:
        """Anything but evaluations, in an actor of its own that ends with it."""
        needs = self._options.pool.needs()
        settings: dict[str, Any] = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0)}
        if "memory" in needs:
            settings["memory"] = needs.pop("memory")
        remote = ray.remote(resources=needs, max_restarts=0, max_task_retries=0, **settings)(EvaluationActor)
        pool = self._options.pool
        actor: Any = remote.remote(ray.put(setup), max(1, int(pool.cpus)), pool.memory_mb, pool.device)
        future = actor.call.remote(evaluator, method, arguments, timeout_s)
        while True:
            try:
                reply = ray.get(future, timeout=_ALIVE_S)
                break
            except GetTimeoutError:
                self._send("alive", None)
            except Exception as error:
                reply = Failure(kind="error", message=str(error))
                break
        ray.kill(actor)
        self._send("reply", (number, reply))

    def _search(self, setup: bytes, past: bytes) -> None:
        """Run Tune: until the driver closes the pipe."""
        options = self._options
        pool = options.pool
        # As many trials as there are workers may wait for a place at once; the driver never has more under way.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(pool.slots)
        feed = Feed(inbox=self._inbox, leave=self._leave, send=self._send)
        scheduler = BridgeScheduler(options, feed, pickle.loads(past))
        trainable = tune.with_parameters(
            EvaluationTrainable,
            setup=setup,
            code=code_identity([]),
            threads=max(1, int(pool.cpus)),
            memory_mb=pool.memory_mb,
            device=pool.device,
        )
        with tempfile.TemporaryDirectory(prefix="archfront-tune-") as folder:
            tune.run(
                trainable,
                name="archfront",
                storage_path=folder,
                num_samples=-1,
                search_alg=TaskSearcher(scheduler),
                scheduler=scheduler,
                callbacks=[Forget()],
                resources_per_trial=tune.PlacementGroupFactory([pool.needs()]),
                reuse_actors=True,
                raise_on_failed_trial=False,
                trial_dirname_creator=_trial_id,
                trial_name_creator=_trial_id,
                verbose=0,
            )

    def _missing(self) -> str | None:
        """What this machine will never have, however long one waits."""
        present: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        slots = self._options.pool.slots
        for name, need in self._options.pool.needs().items():
            if name == "GPU" and slots * need > present.get(name, 0):
                return f"workers.gpus: {slots * need:g} GPUs in all are asked for; here are {present.get(name, 0):g}."
            if need > present.get(name, 0):
                return f"workers: {need:g} of the resource {name!r} is asked for; here is {present.get(name, 0):g}."
        return None


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


if __name__ == "__main__":
    end_with_parent()
    # Pickled names must refer to the imported module, not to this __main__.
    from archfront.search.tune import gateway

    pipe = parent_connection()
    gateway.Gateway(pipe, pipe.recv()).serve()
