"""In the driver: the hold on one gateway process, shared by all jobs that run on one Ray cluster."""

from __future__ import annotations

import os
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from archfront.search.executors.child import Child
from archfront.search.executors.executor import BatchResult
from archfront.search.executors.ray_options import GatewayOptions, PoolOptions

_GATEWAY = "archfront.search.executors.ray_gateway"
_SILENT_S = 45.0
_START_S = 120.0
_LONGEST_PAUSE_S = 15.0


@dataclass(slots=True)
class _Request:
    message: tuple[Any, ...]
    sent: bool = False


class HubPool:
    """One pool of workers, seen from the driver. Messages come in ``inbox``: ``(kind, content)``."""

    def __init__(self, hub: RayHub, identity: int, options: PoolOptions) -> None:
        self.options = options
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.identity = identity
        self.setup: bytes | None = None
        self.batches: dict[int, _Request] = {}
        self.calls: dict[int, _Request] = {}
        self._hub = hub

    def start(self, setup: bytes) -> None:
        self.setup = setup
        self._hub.request("start", self.identity, setup)

    def evaluate(self, batch: int, tasks: bytes, timeout_s: float) -> None:
        request = _Request(("evaluate", self.identity, batch, tasks, timeout_s))
        self._hub.track(self.batches, batch, request)

    def call(self, number: int, setup: bytes, evaluator: str, method: str, arguments: Any, timeout_s: float) -> None:
        request = _Request(("call", self.identity, number, setup, evaluator, method, arguments, timeout_s))
        self._hub.track(self.calls, number, request)

    def rest(self) -> None:
        self.setup = None
        self._hub.forget(self.batches)
        self._hub.request("rest", self.identity)
        with suppress(queue.Empty):
            while True:
                self.inbox.get_nowait()

    def close(self) -> None:
        self._hub.release(self.identity)


class RayHub:
    """Keeps a gateway up, whatever becomes of Ray or of the gateway; hands pools what they are sent.

    A gateway that ends, or gives no sign for some time, is replaced, with growing pauses; the batches that it had are
    lost, and those that were submitted meanwhile go to the next one. Thread-safe.

    Args:
        address: of a Ray cluster; None for one that lives as long as this hub.
        local_cpus: cores of an own cluster; those of this machine if None.
    """

    def __init__(self, address: str | None, local_cpus: int | None = None) -> None:
        self._options = GatewayOptions(address=address, local_cpus=max(os.cpu_count() or 1, local_cpus or 0))
        self._lock = threading.Lock()
        self._pools: dict[int, HubPool] = {}
        self._opened = 0
        self._share = 1.0
        self._gateway: Child | None = None
        self._ready = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-hub", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str | None:
        """Of the cluster; None for one of its own."""
        return self._options.address

    @property
    def ready(self) -> bool:
        """Whether Ray is reached now."""
        return self._ready

    def open(self, options: PoolOptions) -> HubPool:
        with self._lock:
            self._opened += 1
            pool = self._pools[self._opened] = HubPool(self, self._opened, options)
            self._send(("open", pool.identity, options))
        return pool

    def share(self, fraction: float) -> None:
        """Use at most this part of the cluster; others use the rest."""
        with self._lock:
            if fraction != self._share:
                self._share = fraction
                self._send(("share", fraction))

    def close(self) -> None:
        """Leave Ray; an own cluster ends."""
        self._closing.set()
        self._thread.join()

    def request(self, *message: Any) -> None:
        with self._lock:
            self._send(message)

    def track(self, requests: dict[int, _Request], number: int, request: _Request) -> None:
        """Send a request that wants an answer: at once, or when there is a gateway again."""
        with self._lock:
            requests[number] = request
            request.sent = self._send(request.message)

    def forget(self, requests: dict[int, _Request]) -> None:
        with self._lock:
            requests.clear()

    def release(self, identity: int) -> None:
        with self._lock:
            if self._pools.pop(identity, None) is not None:
                self._send(("close", identity))

    def _send(self, message: tuple[Any, ...]) -> bool:
        """Whether the message left. One that a dying gateway took with it counts: its end is noticed soon."""
        if not self._ready or self._gateway is None:
            return False
        with suppress(OSError):
            self._gateway.connection.send(message)
        return True

    def _run(self) -> None:
        pause = 1.0
        while not self._closing.is_set():
            settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_DEDUP_LOGS": "0"}
            gateway = Child(_GATEWAY, settings | os.environ)
            was_ready, words = self._serve(gateway)
            with self._lock:
                self._ready, self._gateway = False, None
            words = words or gateway.last_words() or "no message"
            # The pipe's end tells the gateway to leave Ray in order; a local cluster ends with it.
            gateway.close(grace_s=10 if self._closing.is_set() else 1)
            if self._closing.is_set():
                return
            self._lose(words)
            pause = 1.0 if was_ready else min(2 * pause, _LONGEST_PAUSE_S)
            self._closing.wait(pause)

    def _serve(self, gateway: Child) -> tuple[bool, str]:
        """Until the gateway's end: whether it ever was ready, and why it ended if we know."""
        heard = time.monotonic()
        ready = False
        try:
            gateway.connection.send(self._options)
            while not self._closing.is_set():
                if gateway.connection.poll(0.5):
                    kind, identity, content = gateway.connection.recv()
                    heard = time.monotonic()
                    if not ready:
                        ready = True
                        self._welcome(gateway)
                    self._hand_over(kind, identity, content)
                elif time.monotonic() - heard > (_SILENT_S if ready else _START_S):
                    gateway.kill()
                    return ready, f"the gateway to Ray gave no sign for {time.monotonic() - heard:.0f} s"
        except (EOFError, OSError):
            pass
        return ready, ""

    def _welcome(self, gateway: Child) -> None:
        """Tell a new gateway all that is wanted."""
        with self._lock:
            self._gateway, self._ready = gateway, True
            self._send(("share", self._share))
            for pool in self._pools.values():
                self._send(("open", pool.identity, pool.options))
                if pool.setup is not None:
                    self._send(("start", pool.identity, pool.setup))
                for request in (*pool.calls.values(), *pool.batches.values()):
                    request.sent = self._send(request.message)
                pool.inbox.put(("ready", None))

    def _hand_over(self, kind: str, identity: int | None, content: Any) -> None:
        with self._lock:
            pool = None if identity is None else self._pools.get(identity)
            if pool is None:
                return
            if kind == "result":
                if pool.batches.pop(content.batch, None) is None:
                    return  # of a time before the pool rested
            elif kind == "reply":
                pool.calls.pop(content[0], None)
        pool.inbox.put((kind, content))

    def _lose(self, words: str) -> None:
        """Give back what went down with a gateway, and say why."""
        with self._lock:
            pools = list(self._pools.values())
            for pool in pools:
                for batch in [number for number, request in pool.batches.items() if request.sent]:
                    del pool.batches[batch]
                    pool.inbox.put(("result", BatchResult(batch=batch, worker="ray", lost=True, with_ray=True)))
                for request in pool.calls.values():
                    request.sent = False  # asked again of the next gateway
        for pool in pools:
            pool.inbox.put(("away", words))
