"""The trainable of our jobs on Ray Tune: each step is one evaluation at one fidelity."""

from __future__ import annotations

import pickle
import socket
from typing import Any

from ray.tune import Trainable

from archfront.evaluators.evaluator import Task
from archfront.search.code_identity import code_identity, differences
from archfront.search.executors.evaluation_actor import EvaluationActor
from archfront.search.worker import Failure


class EvaluationTrainable(Trainable):
    """Evaluates the task of its configuration in a child process, as every other worker of ours does.

    Its results have ``reply`` (pickled: the ``Outcome``, or the ``Failure`` with which the child died), ``host`` and
    the metrics by name; or ``refused``, where this host's code is not the driver's.
    """

    def setup(self, config: dict[str, Any], **given: Any) -> None:
        self._refused = "; ".join(differences(given["code"], code_identity([])))
        self._actor = EvaluationActor(given["setup"], given["threads"], given["memory_mb"], given["device"])

    def step(self) -> dict[str, Any]:
        host = socket.gethostname()
        if self._refused:
            return {"refused": self._refused, "host": host}
        task = Task(**self.config["task"])
        reply = self._actor.evaluate([task], self.config["timeout_s"])
        outcome = reply if isinstance(reply, Failure) else reply[0]
        metrics = {} if isinstance(outcome, Failure) or outcome.metrics is None else outcome.metrics
        return {
            **{name: metric.value for name, metric in metrics.items()},
            "training_iteration": self.config["time"],
            "reply": pickle.dumps(outcome),
            "host": host,
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial's turn: the child stays, with its imports and data."""
        self.config = new_config
        return True
