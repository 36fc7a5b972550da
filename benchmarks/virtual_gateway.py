"""In the place of ``ray_gateway``: as many virtual workers as a pool wants, in real time, for ``scale.py``.

Speaks the protocol of ``RayHub`` over the same pipe, so that the driver's side is all real. A worker takes an
evaluation, is busy for as long as ``ARCHFRONT_BENCH_SECONDS`` says (half to one and a half times), and answers. What
it notes is how long workers stood idle between two evaluations; that goes to the file ``ARCHFRONT_BENCH_FILE``.
"""

from __future__ import annotations

import heapq
import json
import os
import pickle
import queue
import random
import threading
import time
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from archfront.search.executors.child import end_with_parent, parent_connection
from archfront.search.executors.executor import BatchResult

_ALIVE_S = 5.0


class Workers:
    """Virtual workers. Their first evaluations end evenly spread over a whole length: a steady state from the start."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._seconds = float(os.environ["ARCHFRONT_BENCH_SECONDS"])
        self._random = random.Random(0)
        self._under_way: list[tuple[float, int, bytes]] = []
        self._freed: deque[float] = deque()
        self._slots = self._pool = self._begun = 0
        self._inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.idle: list[tuple[float, float]] = []

    def _read(self) -> None:
        """In a thread of its own, as in the real gateway: two processes that only write would wait for ever."""
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            self._inbox.put(None)

    def serve(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        spoke = 0.0
        while True:
            now = time.monotonic()
            if now - spoke > _ALIVE_S:
                self._connection.send(("alive", None, None))
                spoke = now
            while self._under_way and self._under_way[0][0] <= now:
                ended, batch, rows = heapq.heappop(self._under_way)
                self._freed.append(ended)
                self._connection.send(("result", self._pool, self._result(batch, rows)))
            wait = min(self._under_way[0][0] - time.monotonic(), 0.5) if self._under_way else 0.5
            try:
                request = self._inbox.get(timeout=max(wait, 0))
                while request is not None:
                    self._take(*request)
                    request = self._inbox.get_nowait()
                return
            except queue.Empty:
                continue

    def _take(self, kind: str, *arguments: Any) -> None:
        if kind == "open":
            self._pool, self._slots = arguments[0], arguments[1].slots
        elif kind == "evaluate":
            _, batch, tasks, _ = arguments
            now = time.monotonic()
            if self._begun < self._slots:
                seconds = self._seconds * (self._begun + 1) / self._slots
                self._begun += 1
            else:
                self.idle.append((now, now - self._freed.popleft()))
                seconds = self._seconds * (0.5 + self._random.random())
            heapq.heappush(self._under_way, (now + seconds, batch, tasks))

    def _result(self, batch: int, tasks: bytes) -> BatchResult:
        return BatchResult(batch=batch, worker="virtual", packed=outcomes(tasks))

    def write(self) -> None:
        Path(os.environ["ARCHFRONT_BENCH_FILE"]).write_text(json.dumps({"idle": self.idle, "begun": self._begun}))


def outcomes(tasks: bytes) -> bytes:
    """Answers to packed tasks, as ``wire`` packs them: two metrics each."""
    rows = []
    for number, genotype, *_ in pickle.loads(tasks):
        a, b = float(sum(genotype)), float(sum((c - i % 9) ** 2 for i, c in enumerate(genotype)))
        metrics = {name: (value, "computed", None, None, None) for name, value in (("a", a), ("b", b))}
        rows.append((number, metrics, None, time.time(), 0.0, None))
    return pickle.dumps(rows, 5)


if __name__ == "__main__":
    end_with_parent()
    pipe = parent_connection()
    pipe.recv()
    workers = Workers(pipe)
    try:
        workers.serve()
    finally:
        workers.write()
