"""Whatever dies, every job comes to its end with nothing lost and nothing twice."""

import random
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from accounting import Witness
from cluster import Cluster, wait_until
from cluster_jobs import SLOTS, Jobs
from faults import (
    ACTOR,
    CONTROLLER,
    CUT,
    CUT_DATABASE,
    DATABASE,
    FULL_DISK,
    GATEWAY,
    GONE,
    HEAD,
    RAYLET,
    WORKER_PROCESS,
    Fault,
)

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def under_fault(
    cluster: Cluster, witness: Witness, fault: Fault, records: list[dict[str, Any]], strike: Callable[[], None]
) -> None:
    jobs = Jobs(cluster, witness, slow=fault.slow)
    rng = random.Random(fault.name)
    jobs.reach(rng.uniform(0.05, 0.3))
    struck_at = jobs.counts()
    assert all(count < budget for count, budget in zip(struck_at, jobs.budgets, strict=True)), struck_at
    strike()
    before = jobs.counts()
    moment = time.monotonic()

    def on_the_way() -> bool:
        counts = zip(jobs.counts(), before, jobs.budgets, strict=True)
        return all(now > then or now == budget for now, then, budget in counts)

    wait_until(
        on_the_way,
        300,
        f"no progress after {fault.name}",
        lambda: "\n".join(container.words() for container in cluster.containers.values()),
        0.1,
    )
    recovered_s = time.monotonic() - moment
    accounts = jobs.finish()
    jobs_found = [asdict(found) for found in accounts]
    records.append({"fault": fault.name, "struck_at": struck_at, "recovered_s": recovered_s, "jobs": jobs_found})
    for found in accounts:
        assert (found.lost, found.twice, found.failed) == (0, 0, 0)
        assert found.beyond <= fault.in_flight * SLOTS, "\n".join(c.words() for c in cluster.containers.values())


@pytest.mark.parametrize(
    "fault",
    [WORKER_PROCESS, ACTOR, RAYLET, GATEWAY, HEAD, CONTROLLER, DATABASE, CUT, CUT_DATABASE, FULL_DISK],
    ids=lambda fault: fault.name,
)
def test_a_fault(cluster: Cluster, witness: Witness, records: list[dict[str, Any]], fault: Fault) -> None:
    under_fault(cluster, witness, fault, records, lambda: fault.strike(cluster, random.Random(1)))


def test_the_head_is_away_for_two_minutes(cluster: Cluster, witness: Witness, records: list[dict[str, Any]]) -> None:
    """The controller answers all the while, and the jobs go on as soon as a head is there again."""
    head, controller = cluster.containers["ray-head"], cluster.containers["controller"]

    def strike() -> None:
        assert controller.process is not None
        head.kill()
        died = time.monotonic()
        while time.monotonic() - died < 120:
            assert controller.process.poll() is None
            assert controller.healthy()
            time.sleep(5)
        assert not head.healthy()
        head.start()

    under_fault(
        cluster, witness, Fault(name="the Ray head away for 120 s", strike=HEAD.strike, slow=True), records, strike
    )


def test_two_controllers(cluster: Cluster, witness: Witness, records: list[dict[str, Any]]) -> None:
    """One dies for good; the other takes its jobs over unasked."""
    second = cluster.add_controller("controller-2")
    second.wait_healthy()
    fault = Fault(name="two controllers, one of them killed for good", strike=CONTROLLER.strike)
    first = cluster.containers["controller"]
    try:
        under_fault(cluster, witness, fault, records, first.kill)
    finally:
        first.start()
        second.stop()
        cluster.remove("controller-2")


def test_a_host_is_gone_for_good(cluster: Cluster, witness: Witness, records: list[dict[str, Any]]) -> None:
    under_fault(cluster, witness, GONE, records, lambda: GONE.strike(cluster, random.Random(2)))
