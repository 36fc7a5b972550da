"""Fifty random faults in one run, while job follows on job."""

import random
import time
from dataclasses import asdict
from typing import Any

import pytest
from accounting import Account, Witness
from cluster import Cluster, wait_until
from cluster_jobs import SLOTS, Jobs
from faults import ALL

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.soak]

FAULTS = 50


def test_fifty_faults(cluster: Cluster, witness: Witness, records: list[dict[str, Any]]) -> None:
    rng = random.Random(20)
    jobs = Jobs(cluster, witness)
    accounts: list[Account] = []
    faults = 0
    pauses: dict[str, list[float]] = {}
    since = 0
    for number in range(FAULTS):
        if all(count == budget for count, budget in zip(jobs.counts(), jobs.budgets, strict=True)):
            accounts += checked(jobs.finish(), since)
            jobs, since = Jobs(cluster, witness), 0
        time.sleep(rng.uniform(0, 6))
        fault = rng.choice(ALL)
        struck = time.monotonic()
        fault.strike(cluster, rng)
        faults, since = faults + 1, since + fault.in_flight
        before = sum(jobs.counts())
        wait_until(
            lambda before=before, jobs=jobs: sum(jobs.counts()) > before or sum(jobs.counts()) == sum(jobs.budgets),  # type: ignore[misc]
            300,
            f"no progress after fault {number}, {fault.name}",
            lambda: "\n".join(container.words() for container in cluster.containers.values()),
            0.1,
        )
        pauses.setdefault(fault.name, []).append(time.monotonic() - struck)
        print(f"{number + 1:3} {fault.name}: {pauses[fault.name][-1]:.1f} s", flush=True)
    accounts += checked(jobs.finish(), since)
    records.append({"fault": f"soak of {faults}", "pauses_s": pauses, "jobs": [asdict(found) for found in accounts]})


def checked(accounts: list[Account], in_flight: int) -> list[Account]:
    for found in accounts:
        assert (found.lost, found.twice, found.failed) == (0, 0, 0)
        assert found.beyond <= in_flight * SLOTS
    return accounts
