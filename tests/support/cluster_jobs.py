"""Two jobs at once on a cluster, for whatever may befall it: many short evaluations, and real training."""

import time
from pathlib import Path
from typing import Any

import yaml
from accounting import Account, Witness, account, settled
from cluster import Cluster, wait_until
from jobs import synthetic_job

SHORT, TRAINING, SLOTS = 2000, 60, 4


class Jobs:
    """Two jobs at once on the cluster: many short evaluations, and real training with checkpoints.

    Args:
        slow: short evaluations of 250 ms and training thrice as long, so that they are at work still when a dead head
            is noticed: actors go on without one for a while.
    """

    def __init__(self, cluster: Cluster, witness: Witness, *, slow: bool = False) -> None:
        self._cluster = cluster
        self._witness = witness
        self.logs = [cluster.folder / f"{kind}-{time.monotonic_ns()}" for kind in ("short", "training")]
        self.budgets = [SHORT, TRAINING]
        # On a busy machine a job takes as long to begin as another one to end. So training, which has to load more,
        # begins first, and waits after its first evaluation until the other has begun too.
        gate = cluster.folder / f"gate-{time.monotonic_ns()}"
        training = self._submit(training_job(self.logs[1], [6, 18] if slow else [2, 6], gate))
        settled(witness, training, 1, 240)
        self.ids = [self._submit(short_job(self.logs[0], 0.25 if slow else 0.05)), training]
        settled(witness, self.ids[0], 1, 240)
        gate.touch()

    def reach(self, share: float, timeout_s: float = 240) -> None:
        """Wait until both are under way and one has committed this part of its budget."""

        def reached() -> bool:
            parts = [count / budget for count, budget in zip(self.counts(), self.budgets, strict=True)]
            return min(parts) > 0 and max(parts) >= share

        wait_until(reached, timeout_s, "the jobs did not get under way", lambda: str(self.counts()), 0.05)

    def counts(self) -> list[int]:
        return [self._witness.count(job) for job in self.ids]

    def finish(self, timeout_s: float = 400) -> list[Account]:
        """Wait for the end of both, and do the accounts."""

        def ended() -> bool:
            return all(self._witness.state(job) not in (None, "queued", "running") for job in self.ids)

        wait_until(ended, timeout_s, "the jobs did not end", lambda: self._cluster.containers["controller"].words(), 1)
        return [
            account(self._cluster.url, job, budget, self._witness, log)
            for job, budget, log in zip(self.ids, self.budgets, self.logs, strict=True)
        ]

    def _submit(self, spec: dict[str, Any]) -> int:
        file = self._cluster.folder / "job.yaml"
        file.write_text(yaml.safe_dump(spec))
        plugins = [word for plugin in self._cluster.plugins for word in ("--plugin", str(plugin))]
        job = int(yaml.safe_load(self._cluster.archfront("submit", str(file), "--json", *plugins))["id"])
        self._witness.follow(job)
        return job


def short_job(log: Path, seconds: float) -> dict[str, Any]:
    workers = {"executor": "ray", "count": SLOTS, "cpus": 0.5, "timeout_s": 60}
    return synthetic_job(SHORT, evaluator={"sleep_s": seconds, "log": str(log)}, workers=workers, name="short")


def training_job(log: Path, fidelities: list[int], gate: Path | None = None) -> dict[str, Any]:
    training = {"name": "counted-training", "log": str(log), "fidelities": fidelities}
    if gate is not None:
        training["gate"] = str(gate)
    return {
        "name": "training",
        "space": {"name": "fbnet-tiny", "resolution": 8, "layers": 3},
        "data": {"name": "digits"},
        "evaluators": [training, {"name": "costs"}],
        "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "params", "direction": "min"}],
        "strategy": {"name": "nsga2", "population": 12},
        "budget": {"evaluations": TRAINING},
        "workers": {"executor": "ray", "count": SLOTS, "cpus": 0.5, "timeout_s": 300},
    }
