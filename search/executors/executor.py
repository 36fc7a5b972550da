"""The contract of an executor: batches of tasks in, outcomes out, in whatever order they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from archfront.evaluators.evaluator import Task
from archfront.search.worker import Failure, Outcome


@dataclass(slots=True, kw_only=True)
class BatchResult:
    """The end of one batch.

    Attributes:
        outcomes: one a task, or empty if the batch has no results.
        packed: the outcomes on their way, as ``wire`` packs them; no longer there in what ``wait`` returns.
        death: what became of the worker if it ended with the batch: the tasks' own fault, perhaps.
        lost: the batch never ran, or its host vanished: nobody's fault, to be sent again.
        with_ray: it was lost with the way to Ray, as all others were: not even a sign of trouble of its own.
    """

    batch: int
    worker: str
    outcomes: Sequence[Outcome] = field(default_factory=list)
    packed: bytes | None = None
    death: Failure | None = None
    lost: bool = False
    with_ray: bool = False


class Executor(ABC):
    """Runs batches on ``slots`` workers. Used by one thread."""

    slots: int

    elsewhere: bool = False
    """Whether its workers may be on other machines than the driver."""

    decides: ClassVar[bool] = False
    """Whether it says which candidates go on to the next fidelity, in the place of the strategy's successive halving;
    ``recall`` and ``promotions`` are then used."""

    @abstractmethod
    def call(self, evaluator: str, method: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """Run ``Worker.call`` in a fresh worker of the kind that runs this evaluator, while no other works: before
        ``start`` or after ``rest``.

        Raises:
            JobFailedError: it failed; the message has its traceback.
        """

    @abstractmethod
    def start(self) -> None:
        """Bring the workers up, or begin to."""

    def recall(self, past: Sequence[tuple[Task, Sequence[float] | None]]) -> None:
        """Before the first batch: what finished in earlier runs, in order of commit, with the oriented objectives;
        None where it failed."""

    def promotions(self, *, last: bool) -> list[Task]:
        """Finished tasks whose candidates go on, each said once in a run at least.

        Args:
            last: nothing is under way; wait until nothing more can follow from what finished.
        """
        return []

    @abstractmethod
    def submit(self, batch: int, tasks: Sequence[Task], timeout_s: float) -> None:
        """Begin a batch; the engine never has more than ``slots`` under way."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[BatchResult]:
        """The batches that ended: at once if some have, else as soon as one does, or none after ``timeout_s``.

        Raises:
            JobFailedError: this executor can never run the job.
            WorkersUnreachableError: it could not for too long; the job is resumable.
        """

    @abstractmethod
    def rest(self) -> None:
        """Stop all workers; batches under way are dropped. ``call`` still works."""

    def close(self) -> None:
        """Stop all workers at once, and whatever held them."""
        self.rest()
