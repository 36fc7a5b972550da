"""The real gateway and real Ray actors that sleep in place of evaluating, for ``scale.py``: what a message costs there.

The actors are of Ray, but hold no evaluation process: so a machine of any size bears some dozens of them.
"""

from __future__ import annotations

import os
import time
from typing import Any
from unittest.mock import patch


class SleepingActor:
    """In the place of ``EvaluationActor``: sleeps for ``ARCHFRONT_BENCH_SECONDS``, then answers with two metrics."""

    def __init__(self, setup: bytes, threads: int, memory_mb: int | None, device: str | None) -> None:
        self._seconds = float(os.environ["ARCHFRONT_BENCH_SECONDS"])

    def hello(self) -> dict[str, Any]:
        return {"node": "here", "host": "here", "code": {}}

    def evaluate_packed(self, tasks: bytes, timeout_s: float) -> bytes:
        # No import of ours: it would take each actor a second to come up.
        import pickle

        time.sleep(self._seconds)
        metrics = dict.fromkeys(("a", "b"), (1.0, "computed", None, None, None))
        return pickle.dumps([(row[0], metrics, None, time.time(), 0.0, None) for row in pickle.loads(tasks)], 5)


if __name__ == "__main__":
    import ray
    import sleeping_gateway

    from archfront.search.executors import ray_gateway, ray_pool
    from archfront.search.executors.child import end_with_parent, parent_connection

    end_with_parent()
    ray.cloudpickle.register_pickle_by_value(sleeping_gateway)  # type: ignore[no-untyped-call]
    pipe = parent_connection()
    with (
        patch.object(ray_pool, "EvaluationActor", sleeping_gateway.SleepingActor),
        patch.object(ray_pool, "differences", lambda *_: []),
    ):
        ray_gateway.Gateway(pipe, pipe.recv()).serve()
