"""In the gateway: the Ray actors of one pool, the batches that wait for them, and who of them is at work."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError

from archfront.search.code_identity import differences
from archfront.search.executors import evaluation_actor
from archfront.search.executors.evaluation_actor import EvaluationActor
from archfront.search.executors.executor import BatchResult
from archfront.search.executors.ray_options import PoolOptions
from archfront.search.worker import Failure

ray.cloudpickle.register_pickle_by_value(evaluation_actor)  # type: ignore[no-untyped-call]

_GRACE_S = 60.0
"""A batch that gives no sign so long after its limit is lost: its host hangs, or vanished without Ray's notice."""

_SERVED_STEP_S = 30.0
"""Jobs that must take turns change places so often."""

_LONGEST_PAUSE_S = 15.0


@dataclass(slots=True, kw_only=True)
class _Slot:
    """One actor. ``token`` tells its answers from those of the actor that was there before."""

    number: int
    token: int
    actor: Any
    state: Literal["starting", "idle", "busy"] = "starting"
    host: str = ""
    retiring: bool = False
    batch: int | None = None
    deadline: float = math.inf


Done = Callable[[Callable[[Future[Any]], None], Future[Any]], None]
"""Has a function called with a future in the event loop's thread, once it is done."""


class Pool:
    """Actors of one kind for one job. Used by the gateway's event loop alone.

    Batches go to actors that have come up and run the driver's code, never to one that still waits for a place: such
    a batch could wait for ever while others are idle.
    """

    def __init__(
        self, options: PoolOptions, code: Mapping[str, Any], send: Callable[[str, Any], None], when_done: Done
    ) -> None:
        self.options = options
        self.needs = options.needs()
        self.served_s = 0.0
        self.banned: dict[str, str] = {}
        self._code = code
        self._send = send
        self._when_done = when_done
        self._setup: Any = None
        self._slots: dict[int, _Slot] = {}
        self._idle_heap: list[tuple[int, int]] = []
        self._tokens = 0
        self._calls = 0
        self._queue: deque[tuple[int, bytes, float]] = deque()
        self._target = 0
        self._failures = 0
        self._pause_until = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._calls) or any(slot.state == "busy" for slot in self._slots.values())

    @property
    def wanted(self) -> int:
        # A call, too, has an actor of its own, for which there must be room.
        return min(self._calls, 1) if self._setup is None else self.options.slots

    @property
    def served_steps(self) -> float:
        return self.served_s // _SERVED_STEP_S

    def waiting_for_a_place(self) -> bool:
        return (
            self._setup is not None and bool(self._queue) and all(s.state == "starting" for s in self._slots.values())
        )

    def start(self, setup: bytes) -> None:
        self._setup = ray.put(setup)

    def rest(self) -> None:
        """Stop all actors and forget their batches."""
        self._setup = None
        self._queue.clear()
        for slot in list(self._slots.values()):
            slot.batch = None
            self._end(slot)

    def evaluate(self, batch: int, tasks: bytes, timeout_s: float) -> None:
        self._queue.append((batch, tasks, timeout_s))
        self._feed()

    def call(self, identity: int, setup: bytes, evaluator: str, method: str, arguments: Any, timeout_s: float) -> None:
        """In an actor of its own, that ends with it."""
        actor = self._actor(ray.put(setup))
        self._calls += 1

        def answer(future: Future[Any]) -> None:
            error = future.exception()
            ray.kill(actor)
            lost = error is not None and not isinstance(error, ray.exceptions.RayTaskError)
            reply = future.result() if error is None else Failure(kind="error", message=str(error))
            self._calls -= 1
            self._send("reply", (identity, None if lost else reply, lost))

        def greeted(future: Future[Any]) -> None:
            if future.exception() is not None or self._refused(future.result()):
                ray.kill(actor)
                self._calls -= 1
                self._send("reply", (identity, None, True))
                return
            self._when_done(answer, actor.call.remote(evaluator, method, arguments, timeout_s).future())

        self._when_done(greeted, actor.hello.remote().future())

    def resize(self, target: int) -> None:
        """Have so many actors: more at once, fewer as they come to the end of their batches."""
        self._target = target
        by_worth = sorted(self._slots.values(), key=lambda s: ("busy", "idle", "starting").index(s.state))
        for i, slot in enumerate(by_worth):
            slot.retiring = i >= target
            if slot.retiring and slot.state != "busy":
                self._end(slot)
        self._fill()

    def tick(self, now: float, passed_s: float) -> None:
        self.served_s += passed_s * sum(slot.state != "starting" for slot in self._slots.values())
        for slot in list(self._slots.values()):
            if slot.state == "busy" and now > slot.deadline:
                self._lost(slot)
        self._fill()

    def _fill(self) -> None:
        if self._setup is None or time.monotonic() < self._pause_until:
            return
        free = iter(n for n in range(self.options.slots) if n not in self._slots)
        while len(self._slots) < self._target:
            self._tokens += 1
            slot = _Slot(number=next(free), token=self._tokens, actor=self._actor(self._setup))
            self._slots[slot.number] = slot
            self._watch(slot, slot.actor.hello.remote(), self._greeted)

    def _actor(self, setup: Any) -> Any:
        needs = dict(self.needs)
        settings: dict[str, Any] = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0)}
        if "memory" in needs:
            settings["memory"] = needs.pop("memory")
        if self.banned:
            settings["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self.banned))})"}
        options = self.options
        remote = ray.remote(resources=needs, max_restarts=0, max_task_retries=0, **settings)(EvaluationActor)
        return remote.remote(setup, max(1, int(options.cpus)), options.memory_mb, options.device)

    def _watch(self, slot: _Slot, reference: Any, then: Callable[[_Slot, Future[Any]], None]) -> None:
        token = slot.token

        def arrived(future: Future[Any]) -> None:
            if (current := self._slots.get(slot.number)) is not None and current.token == token:
                then(slot, future)

        self._when_done(arrived, reference.future())

    def _greeted(self, slot: _Slot, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._failures += 1
            self._pause_until = time.monotonic() + min(2.0**self._failures / 2, _LONGEST_PAUSE_S)
            if self._failures > 2:
                self._send("notice", f"a worker could not be started: {_first_line(error)}")
            self._end(slot)
            return
        self._failures = 0
        if self._refused(future.result()):
            self._end(slot)
            self._fill()
            return
        slot.host = future.result()["host"]
        self._rest_or_work(slot)

    def _refused(self, found: Mapping[str, Any]) -> bool:
        """Whether a worker's code is another than the driver's; its host is then avoided."""
        problems = [found["problem"]] if "problem" in found else differences(self._code, found["code"])
        if problems:
            words = "; ".join(problems)
            if found["node"] not in self.banned:
                self._send(
                    "notice", f"the workers of host {found['host']} are refused, for their code differs: {words}"
                )
            self.banned[found["node"]] = f"{found['host']}: {words}"
        return bool(problems)

    def _rest_or_work(self, slot: _Slot) -> None:
        if slot.retiring:
            self._end(slot)
            return
        slot.state, slot.batch, slot.deadline = "idle", None, math.inf
        heapq.heappush(self._idle_heap, (slot.number, slot.token))
        self._feed()

    def _feed(self) -> None:
        while self._queue and (slot := self._idle()) is not None:
            slot.batch, tasks, timeout_s = self._queue.popleft()
            slot.state, slot.deadline = "busy", time.monotonic() + timeout_s + _GRACE_S
            if self.options.device is not None:
                slot.deadline = math.inf  # others' measurements are waited for as long as they take
            self._watch(slot, slot.actor.evaluate_packed.remote(tasks, timeout_s), self._evaluated)

    def _idle(self) -> _Slot | None:
        """The first one, no longer on the heap; actors that have ended since they came there are left out."""
        while self._idle_heap:
            number, token = heapq.heappop(self._idle_heap)
            slot = self._slots.get(number)
            if slot is not None and slot.token == token and slot.state == "idle":
                return slot
        return None

    def _evaluated(self, slot: _Slot, future: Future[Any]) -> None:
        error = future.exception()
        if error is None:
            reply = future.result()
            dead = isinstance(reply, Failure)
            self._finish(slot, packed=None if dead else reply, death=reply if dead else None)
            self._rest_or_work(slot)
        elif isinstance(error, OutOfMemoryError):
            # Ray's memory monitor killed the actor for what its evaluations used.
            self._finish(slot, death=Failure(kind="memory", message=str(error)))
            self._end(slot)
        else:
            # The actor itself is gone, not the child in which evaluations run: a host was lost.
            self._lost(slot)
        self._fill()

    def _lost(self, slot: _Slot) -> None:
        self._finish(slot, lost=True)
        self._end(slot)

    def _finish(self, slot: _Slot, **what: Any) -> None:
        assert slot.batch is not None
        worker = f"ray-{slot.number}@{slot.host}"
        self._send("result", BatchResult(batch=slot.batch, worker=worker, **what))
        slot.batch = None

    def _end(self, slot: _Slot) -> None:
        """Kill an actor and leave its slot; a batch that it still has is lost."""
        if slot.batch is not None:
            self._finish(slot, lost=True)
        self._slots.pop(slot.number, None)
        ray.kill(slot.actor)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
