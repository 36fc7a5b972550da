"""Where evaluations run: a device's metrics on that device, one at a time; never on a host with other code."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from accounting import Witness
from cluster import ROOT, Cluster, wait_until
from jobs import synthetic_job

from archfront.db.connection import open_engine

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def submit(cluster: Cluster, spec: dict[str, Any]) -> int:
    file = cluster.folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    plugins = [word for plugin in cluster.plugins for word in ("--plugin", str(plugin))]
    return int(yaml.safe_load(cluster.archfront("submit", str(file), "--json", *plugins))["id"])


def finish(cluster: Cluster, witness: Witness, *jobs: int) -> None:
    words = cluster.containers["controller"].words
    wait_until(lambda: all(witness.state(job) == "done" for job in jobs), 240, "the jobs did not end", words)


def workers_of(cluster: Cluster, *jobs: int) -> list[str]:
    engine = open_engine(cluster.url, create=False)
    with engine.connect() as connection:
        query = f"SELECT worker FROM evaluations WHERE job_id IN ({', '.join(map(str, jobs))})"
        found = [str(row.worker) for row in connection.exec_driver_sql(query)]
    engine.dispose()
    return found


def test_a_device_is_measured_on_alone(cluster: Cluster, witness: Witness) -> None:
    """By two jobs at once, with two workers each on its host."""
    cluster.add("ray-worker-device").wait_healthy()
    log = cluster.folder / "measured"
    target = {"count": 2, "cpus": 0.25, "device": "target", "evaluators": ["stopwatch"]}
    workers = {"executor": "ray", "count": 2, "cpus": 0.5, "classes": {"target": target}}
    spec = synthetic_job(40, workers=workers)
    spec["evaluators"].append({"name": "stopwatch", "log": str(log)})
    spec["objectives"].append({"metric": "wait_ms", "direction": "min"})
    jobs = [submit(cluster, spec | {"seed": seed}) for seed in (1, 2)]
    finish(cluster, witness, *jobs)
    rows = sorted(line.split() for line in log.read_text().splitlines())
    assert len(rows) == 80
    assert {host for _, _, host in rows} == {"ray-worker-device"}
    ends = [float(end) for _, end, _ in rows]
    begins = [float(begin) for begin, _, _ in rows]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    # Training went elsewhere, and each row says who did what.
    for worker in workers_of(cluster, *jobs):
        trained, measured = worker.split(" + ")
        assert trained.split("@")[1] in ("ray-worker-1", "ray-worker-2", "ray-worker-device")
        assert measured.endswith("@ray-worker-device")


def test_a_host_with_other_code_is_refused(cluster: Cluster, witness: Witness) -> None:
    source = Path(cluster.base_env.get("PYTHONPATH", str(ROOT / "src")))
    other = cluster.folder / "other"
    shutil.copytree(source / "archfront", other / "archfront", symlinks=False)
    with (other / "archfront" / "spaces" / "space.py").open("a") as file:
        file.write("\n# another version\n")
    cluster.add("ray-worker", "ray-worker-odd", env={"PYTHONPATH": str(other)}).wait_healthy()
    # More workers than the others have room for, so that the odd one is tried.
    workers = {"executor": "ray", "count": 6, "cpus": 1}
    job = submit(cluster, synthetic_job(200, evaluator={"sleep_s": 0.02}, workers=workers))
    finish(cluster, witness, job)
    printed = (cluster.folder / "controller.log").read_text()
    assert "the workers of host ray-worker-odd are refused, for their code differs: source: " in printed
    assert not any(worker.endswith("@ray-worker-odd") for worker in workers_of(cluster, job))
    assert len(workers_of(cluster, job)) == 200
