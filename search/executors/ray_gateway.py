"""The one child process that touches Ray: a lost Ray head ends whoever is connected to it, and it must not be the
driver. Serves the pools of all jobs of its driver; speaks with ``RayHub`` over a pipe.

One thread does everything in the order of one queue: what the driver asks, what Ray's futures bring, and the ticks of
a clock. Another only reads the pipe, and a third asks Ray's head which hosts there are: it alone may have to wait.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import ray

from archfront.search.code_identity import code_identity
from archfront.search.executors.child import end_with_parent, parent_connection
from archfront.search.executors.fair_shares import Claim, fair_slots
from archfront.search.executors.ray_options import GatewayOptions, PoolOptions
from archfront.search.executors.ray_pool import Pool

_TICK_S = 1.0
_ALIVE_S = 5.0
_HEAD_SILENT_S = 30.0
_NOTICE_S = 60.0


class Gateway:
    """Pools of Ray actors behind a pipe."""

    def __init__(self, connection: Connection, options: GatewayOptions) -> None:
        self._connection = connection
        self._local = options.address is None
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pools: dict[int, Pool] = {}
        self._noticed: dict[int, float] = {}
        self._code = code_identity([])
        self._share = 1.0
        settings: dict[str, Any] = {"address": options.address}
        if self._local:
            # "local", or Ray would join whatever cluster was started on this machine.
            settings = {"address": "local", "num_cpus": options.local_cpus, "include_dashboard": False}
            settings["object_store_memory"] = 100 * 2**20
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **settings)
        self._hosts = _hosts()
        self._head_seen = time.monotonic()
        self._send("alive", None, None)

    def serve(self) -> None:
        for target in (self._read, self._look):
            threading.Thread(target=target, daemon=True).start()
        ticked = spoke = time.monotonic()
        while True:
            with suppress(queue.Empty):
                self._events.get(timeout=_TICK_S)()
            now = time.monotonic()
            if now - ticked >= _TICK_S:
                self._tick(now, now - ticked)
                ticked = now
            if now - spoke >= _ALIVE_S:
                self._send("alive", None, None)
                spoke = now
            if now - self._head_seen > _HEAD_SILENT_S:
                print(f"the Ray head has not answered for {_HEAD_SILENT_S:g} s", file=sys.stderr, flush=True)
                os._exit(1)

    # What the driver asks.

    def _read(self) -> None:
        while True:
            try:
                request = self._connection.recv()
            except (EOFError, OSError):
                # The driver's end of the pipe is closed: its order to leave. An own cluster ends with this process.
                self._events.put(self._leave)
                return
            self._events.put(partial(self._take, *request))

    def _leave(self) -> None:
        ray.shutdown()
        os._exit(0)

    def _take(self, kind: str, *arguments: Any) -> None:
        if kind == "open":
            self._open(*arguments)
        elif kind == "share":
            [self._share] = arguments
        elif kind == "close":
            self._close(*arguments)
        elif (pool := self._pools.get(arguments[0])) is not None:
            getattr(pool, kind)(*arguments[1:])
            if kind in ("start", "call"):
                self._distribute()

    def _open(self, identity: int, options: PoolOptions) -> None:
        def send(kind: str, content: Any) -> None:
            self._send(kind, identity, content)

        self._pools[identity] = Pool(options, self._code, send, self._when_done)
        if self._local and (missing := self._missing(options)):
            send("impossible", missing)

    def _close(self, identity: int) -> None:
        self._pools.pop(identity).rest()
        self._distribute()

    def _missing(self, options: PoolOptions) -> str | None:
        """What this machine will never have, however long one waits: it does not grow, as a cluster may."""
        present = self._capacity()
        for name, need in options.needs().items():
            if name == "GPU" and options.slots * need > present.get(name, 0):
                wanted = options.slots * need
                return f"workers.gpus: {wanted:g} GPUs in all are asked for; here are {present.get(name, 0):g}."
            if need > present.get(name, 0):
                return f"workers: {need:g} of the resource {name!r} is asked for; here is {present.get(name, 0):g}."
        return None

    # What Ray brings.

    def _when_done(self, then: Callable[[Future[Any]], None], future: Future[Any]) -> None:
        future.add_done_callback(lambda done: self._events.put(lambda: then(done)))

    def _look(self) -> None:
        while True:
            time.sleep(2.0)
            try:
                self._hosts = _hosts()
            except Exception as error:
                print(f"the Ray head cannot be asked: {error!r}", file=sys.stderr, flush=True)
                continue
            self._head_seen = time.monotonic()

    # The clock.

    def _tick(self, now: float, passed_s: float) -> None:
        for identity, pool in list(self._pools.items()):
            pool.tick(now, passed_s)
            self._look_after(identity, pool, now)
        self._distribute()

    def _distribute(self) -> None:
        pools = [pool for pool in self._pools.values() if pool.wanted]
        claims = [
            Claim(slots=pool.wanted, needs=pool.needs, served_s=pool.served_steps, busy=pool.busy) for pool in pools
        ]
        for pool, slots in zip(pools, fair_slots(claims, self._capacity(), self._share), strict=True):
            pool.resize(slots)

    def _look_after(self, identity: int, pool: Pool, now: float) -> None:
        """Say why a job's batches wait, if they do."""
        if not pool.waiting_for_a_place():
            self._noticed.pop(identity, None)
            return
        # Not at once: workers take some seconds to start.
        due = self._noticed.setdefault(identity, now + _NOTICE_S / 4)
        if now < due:
            return
        self._noticed[identity] = now + _NOTICE_S
        alive = {host["NodeID"] for host in self._alive()}
        if alive and alive <= set(pool.banned):
            reasons = "; ".join(sorted({pool.banned[node] for node in alive}))
            self._send("refused", identity, f"no host has the driver's code ({reasons})")
            return
        needs = ", ".join(f"{name} {need:g}" for name, need in pool.needs.items())
        self._send("notice", identity, f"waiting for a place on the cluster: each worker needs {needs}")

    def _alive(self) -> list[dict[str, Any]]:
        return [host for host in self._hosts if host["Alive"]]

    def _capacity(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for host in self._alive():
            for name, amount in host["Resources"].items():
                total[name] = total.get(name, 0.0) + amount
        return total

    def _send(self, kind: str, identity: int | None, content: Any) -> None:
        try:
            self._connection.send((kind, identity, content))
        except OSError:
            return  # the driver is gone; the reading thread says so too


def _hosts() -> list[dict[str, Any]]:
    """Ray's hosts, dead ones too, with ``NodeID``, ``Alive`` and ``Resources``."""
    return list(ray.nodes())  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    end_with_parent()
    # Pickled names must refer to the imported module, not to this __main__.
    from archfront.search.executors import ray_gateway

    pipe = parent_connection()
    ray_gateway.Gateway(pipe, pipe.recv()).serve()
