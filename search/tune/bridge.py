"""Between Tune's controller and the driver: tasks become trials, results and promotions go back.

A trial is one candidate, and each of its steps is one evaluation that the driver has written ahead. Between two steps
a trial is paused, without a checkpoint: the evaluators keep their own. The job's scheduler decides which trials may
go on; the driver is told so, writes the evaluation at the next fidelity ahead, and sends it, and only then the trial
goes on.
"""

from __future__ import annotations

import heapq
import math
import pickle
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray.exceptions import OutOfMemoryError
from ray.tune import Callback
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from archfront.evaluators.evaluator import Task
from archfront.search.executors.executor import BatchResult
from archfront.search.tune.options import Past, TuneOptions
from archfront.search.tune.schedulers import make_scheduler
from archfront.search.worker import Failure, Outcome

_GRACE_S = 60.0
"""A trial that gives no sign so long after its limit is lost: its host hangs, or vanished without Ray's notice."""

_IDLE_S = 0.2
_ALIVE_S = 5.0

Send = Callable[[str, Any], None]


@dataclass(slots=True)
class _Work:
    """A task that the driver sent, and since when a trial is at it."""

    batch: int
    task: Task
    timeout_s: float
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What the driver wants, as the process gets it.

    Attributes:
        inbox: its messages: ``(kind, content)``.
        leave: called at its order to end; does not return.
        send: a message to it.
    """

    inbox: queue.SimpleQueue[tuple[str, Any]]
    leave: Callable[[], None]
    send: Send


class TaskSearcher(Searcher):
    """Proposes what the driver sent."""

    def __init__(self, bridge: BridgeScheduler) -> None:
        super().__init__()
        self._bridge = bridge

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        return self._bridge.next_config(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The driver knows."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a job is resumed from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing, as ``save``."""


class Forget(Callback):
    """Drops replies from results once they are with the driver, so that Tune does not keep them."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        result.pop("reply", None)


class BridgeScheduler(TrialScheduler):
    """Lets the job's scheduler decide, and the driver dispose.

    Args:
        past: what finished before this process began, in order of commit: the job's scheduler is told first.
    """

    _supports_buffered_results = False

    def __init__(self, options: TuneOptions, feed: Feed, past: Sequence[Past]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Of several brackets, schedulers draw one by numpy's own state.
        np.random.seed(options.seed % 2**32)  # noqa: NPY002
        self._inner = make_scheduler(options.scheduler)
        self._options = options
        self._feed = feed
        self._next = dict(zip(options.fidelities, options.fidelities[1:], strict=False))
        self._past = list(past)
        self._replayed = False
        self._replaying: Task | None = None
        self._new: list[tuple[int, _Work]] = []
        self._work: dict[str, _Work] = {}
        self._trials: dict[str, Any] = {}
        self._held: dict[tuple[str, int, int], Any] = {}
        self._tasks: dict[str, Task] = {}
        self._announced: set[str] = set()
        self._offered: set[str] = set()
        self._ended: set[str] = set()
        self._settle: int | None = None
        self._spoke = 0.0

    @property
    def metric(self) -> None:
        """None: a failed evaluation reports no metric, and Tune must not mind."""
        return

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    # New trials.

    def next_config(self, trial_id: str) -> dict[str, Any] | None:
        """The configuration of a new trial, if the driver wants one."""
        if self._past and not self._replayed:
            # The first of them comes as a new trial does: while Tune has none at all it asks for one and does nothing
            # else, for minutes. The others are made in its replay, which the controller's next step begins with.
            return None if self._trials else self._config(self._past[0].task, 0.0)
        if self._replaying is not None:
            return self._config(self._replaying, 0.0)
        self._heed(wait_s=0.0 if self._work else _IDLE_S if self._held else _ALIVE_S)
        if not self._held:
            self._answer_settle()  # nothing can follow, and Tune without trials asks for new ones only
        if not self._new:
            return None
        _, work = heapq.heappop(self._new)
        self._work[trial_id] = work
        return self._config(work.task, work.timeout_s)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if not self._trials and hasattr(tune_controller, "_actor_cache"):
            # Else Tune ends an actor that is idle for the moment in which the driver commits, with all it has loaded.
            tune_controller._actor_cache.increase_max(trial.placement_group_factory, self._options.pool.slots)
        self._trials[trial.trial_id] = trial
        self._inner.on_trial_add(tune_controller, trial)

    # Results.

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        work = self._work.pop(trial.trial_id)
        worker = f"tune@{result['host']}"
        if "refused" in result:
            self._feed.send("refused", f"host {result['host']}: {result['refused']}")
            self._return(work, worker, lost=True)
            return self._fail(tune_controller, trial)
        reply: Outcome | Failure = pickle.loads(result["reply"])
        if isinstance(reply, Failure):
            self._return(work, worker, death=reply)
            return self._fail(tune_controller, trial)
        value = self._value(reply)
        if value is None:
            self._return(work, worker, outcomes=[reply])
            return self._fail(tune_controller, trial)
        decision = self._decide(tune_controller, trial, work.task, result)
        promoted = [work.task] if trial.trial_id in self._announced else []
        # In one message, so that the driver can commit the result and what follows from it together.
        self._return(work, worker, outcomes=[reply], promoted=promoted, value=value)
        if decision != TrialScheduler.PAUSE:
            return decision
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return str(TrialScheduler.NOOP)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The actor is gone, or failed outside of the evaluation: nobody's fault, unless Ray ended it for memory."""
        work = self._work.pop(trial.trial_id, None)
        error = trial.get_pickled_error()
        if work is not None:
            if isinstance(error, OutOfMemoryError):
                self._return(work, "tune", death=Failure(kind="memory", message=str(error)))
            else:
                self._feed.send("notice", f"a trial was lost: {_last_line(error)}")
                self._return(work, "tune", lost=True)
        if trial.trial_id not in self._ended:
            self._ended.add(trial.trial_id)
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if trial.trial_id not in self._ended:
            self._ended.add(trial.trial_id)
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        if trial.trial_id not in self._ended:
            self._ended.add(trial.trial_id)
            self._inner.on_trial_remove(tune_controller, trial)

    def _decide(self, controller: Any, trial: Any, task: Task, result: Mapping[str, Any]) -> str:
        """STOP, or PAUSE, with the trial held; announced too if it may go on at once."""
        following = self._next.get(task.fidelity)
        if following is None:
            return str(TrialScheduler.STOP)  # a trial at its natural end, which no scheduler is asked about
        decision = self._inner.on_trial_result(controller, trial, dict(result))
        if decision == TrialScheduler.STOP:
            return str(decision)
        self._held[task.key, task.repeat, following] = trial
        self._tasks[trial.trial_id] = task
        self._announced.discard(trial.trial_id)
        if decision == TrialScheduler.CONTINUE:
            self._announced.add(trial.trial_id)
        return str(TrialScheduler.PAUSE)

    def _fail(self, controller: Any, trial: Any) -> str:
        """End a trial without a result: the job's scheduler sees an error, and a further attempt is a new trial."""
        self._ended.add(trial.trial_id)
        self._inner.on_trial_error(controller, trial)
        return str(TrialScheduler.STOP)

    def _value(self, outcome: Outcome) -> float | None:
        """What the job's scheduler judges an evaluation by; None for one that failed."""
        if outcome.failure is not None or outcome.metrics is None:
            return None
        for name in self._options.needed:
            if name not in outcome.metrics or not math.isfinite(outcome.metrics[name].value):
                return None
        return 0.0 if self._options.metric is None else outcome.metrics[self._options.metric].value

    def _return(
        self, work: _Work, worker: str, *, promoted: Sequence[Task] = (), value: float | None = None, **what: Any
    ) -> None:
        self._feed.send("result", (BatchResult(batch=work.batch, worker=worker, **what), list(promoted), value))

    # Which trial runs.

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        if not self._replayed:
            self._replayed = True
            self._replay(tune_controller)
        self._heed(wait_s=0.0 if self._work else _IDLE_S)
        self._look_for_released(tune_controller)
        now = time.monotonic()
        waiting = []
        for trial_id, work in list(self._work.items()):
            trial = self._trials.get(trial_id)
            if trial is None:
                continue
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                waiting.append((trial_id in self._offered, work.task.number, trial))
            elif work.deadline is None:
                limit = math.inf if self._options.pool.device is not None else work.timeout_s + _GRACE_S
                work.deadline = now + limit
            elif now > work.deadline:
                controller = tune_controller
                controller._trial_task_failure(trial, exception=TuneError("its host gave no sign"))
        if not waiting:
            return None
        # In the order of the driver; one that waits for its actor must not keep the others from asking for theirs.
        _, _, chosen = min(waiting, key=lambda entry: entry[:2])
        self._offered.add(chosen.trial_id)
        return chosen

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what a scheduler knows is replayed from the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError

    def _look_for_released(self, controller: Any) -> None:
        """Announce a trial that the job's scheduler paused and now wants to run again."""
        if not self._held:
            self._answer_settle()
            return
        chosen = self._inner.choose_trial_to_run(controller)
        if chosen is None or chosen.trial_id in self._work or chosen.trial_id in self._announced:
            self._answer_settle()
        elif chosen.trial_id in self._tasks:
            self._announced.add(chosen.trial_id)
            self._feed.send("promoted", [self._tasks[chosen.trial_id]])

    def _answer_settle(self) -> None:
        if self._settle is not None and not self._work and not self._new:
            self._feed.send("settled", self._settle)
            self._settle = None

    # The driver.

    def _heed(self, *, wait_s: float) -> None:
        """Take the driver's messages; with nothing at work, wait for one for a moment instead of spinning."""
        now = time.monotonic()
        if now - self._spoke > _ALIVE_S:
            self._feed.send("alive", None)
            self._spoke = now
        wait = wait_s > 0 and not self._new and self._settle is None
        try:
            while True:
                kind, content = self._feed.inbox.get(timeout=wait_s) if wait else self._feed.inbox.get_nowait()
                wait = False
                if kind == "evaluate":
                    self._accept(_Work(*content))
                elif kind == "settle":
                    self._settle = content
                elif kind == "leave":
                    self._feed.leave()
        except queue.Empty:
            pass

    def _accept(self, work: _Work) -> None:
        task = work.task
        trial = self._held.pop((task.key, task.repeat, task.fidelity), None)
        if trial is None or trial.is_finished():
            heapq.heappush(self._new, (task.number, work))
            return
        self._offered.discard(trial.trial_id)
        self._announced.discard(trial.trial_id)
        self._tasks.pop(trial.trial_id)
        trial.set_config(self._config(task, work.timeout_s))
        self._work[trial.trial_id] = work

    def _config(self, task: Task, timeout_s: float) -> dict[str, Any]:
        # Time must rise from one for schedulers; without fidelities there is one step.
        time_ = task.fidelity if len(self._options.fidelities) > 1 else 1
        return {"task": asdict(task), "timeout_s": timeout_s, "time": time_}

    # What was before.

    def _replay(self, controller: Any) -> None:
        """Tell the job's scheduler what finished before, in order, through trials that stand where those stood."""
        first = self._past[0].task if self._past else None
        trials = {(first.key, first.repeat): next(iter(self._trials.values()))} if first is not None else {}
        for task, value in self._past:
            trial = trials.get((task.key, task.repeat))
            if trial is None:
                trial = trials[task.key, task.repeat] = self._past_trial(controller, task)
            elif trial.is_finished():
                continue
            self._held.pop((task.key, task.repeat, task.fidelity), None)
            self._tasks.pop(trial.trial_id, None)
            controller._set_trial_status(trial, Trial.RUNNING)
            if value is None:
                self._fail(controller, trial)
                controller._schedule_trial_stop(trial)
                continue
            result = {"training_iteration": self._config(task, 0.0)["time"], "done": False}
            if self._options.metric is not None:
                result[self._options.metric] = value
            trial.update_last_result(dict(result))
            if self._decide(controller, trial, task, result) == TrialScheduler.PAUSE:
                controller._set_trial_status(trial, Trial.PAUSED)
            else:
                controller.stop_trial(trial)
        # The driver knows which of them it has asked for since.
        promoted = [task for trial_id, task in self._tasks.items() if trial_id in self._announced]
        if promoted:
            self._feed.send("promoted", promoted)
        self._past = []

    def _past_trial(self, controller: Any, task: Task) -> Any:
        search = controller._search_alg
        self._replaying = task
        trial = search.create_trial_if_possible(search._experiment.spec)
        self._replaying = None
        trial.set_status(Trial.PAUSED)
        controller.add_trial(trial)
        return trial


def _last_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else repr(error)
