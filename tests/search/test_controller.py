"""Controllers: queued jobs are driven unasked, several at once; a dead controller's jobs are taken over."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import synthetic_job
from ledger_dump import differences, dump
from postgres import Postgres

import archfront
from archfront.client import Job
from archfront.db.ledger import Ledger

_ARCHFRONT = [sys.executable, "-m", "archfront"]


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'archfront.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.ledger()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_ARCHFRONT, *words], capture_output=True, text=True, check=False)


def submitted(db: str, folder: Path, plugin: Path, spec: dict[str, Any]) -> int:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(spec))
    done = command("submit", str(file), "--db", db, "--plugin", str(plugin), "--json")
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["id"])


@contextmanager
def controller(db: str, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as file:
        process = subprocess.Popen([*_ARCHFRONT, "controller", "--db", db, *words], stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def until(reached: Callable[[], bool], log: Path, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def process_job(evaluations: int, **changes: Any) -> dict[str, Any]:
    evaluator = {"sleep_s": 0.02} | changes.pop("evaluator", {})
    return synthetic_job(evaluations, evaluator=evaluator, workers={"executor": "process", "count": 1}, **changes)


def test_killed_controllers_jobs_are_taken_over(db: str, tmp_path: Path, plugin: Path) -> None:
    """And end in the very ledger of a job that nobody disturbed."""
    log = tmp_path / "log"
    ledger = Ledger.open(db)
    jobs = [submitted(db, tmp_path, plugin, process_job(150, name=f"job-{i}", seed=i)) for i in (0, 1)]
    assert [Job(ledger, job).state for job in jobs] == ["queued", "queued"]
    plugins = ("--plugin", str(plugin))
    with controller(db, log, *plugins) as first:
        until(lambda: all(Job(ledger, job).status()["evaluations"]["done"] > 20 for job in jobs), log)
        # Both at once, by one process.
        holders = {(ledger.holder(job) or {"pid": None})["pid"] for job in jobs}
        assert holders == {first.pid}
        first.kill()
        first.wait()
    assert all(Job(ledger, job).status()["evaluations"]["done"] < 150 for job in jobs)
    with controller(db, log, *plugins):
        until(lambda: all(Job(ledger, job).state == "done" for job in jobs), log)
        found = json.loads(command("controllers", "--db", db, "--json").stdout)
        assert [row["alive"] for row in found][:1] == [True]
        assert command("controllers", "--db", db, "--check").returncode == 0
    assert command("controllers", "--db", db, "--check").returncode in (0, 3)
    whole = archfront.run(process_job(150, name="job-0", seed=0), db=db, plugins=[plugin])
    assert differences(dump(whole.ledger, whole.id), dump(ledger, jobs[0])) == []
    ledger.close()


def test_two_controllers_share_the_jobs(db: str, tmp_path: Path, plugin: Path) -> None:
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    ledger = Ledger.open(db)
    words = ("--plugin", str(plugin), "--jobs", "2")
    with controller(db, logs[0], *words), controller(db, logs[1], *words):
        jobs = [submitted(db, tmp_path, plugin, process_job(60, name=f"job-{i}", seed=i)) for i in range(4)]
        until(lambda: all(Job(ledger, job).state == "done" for job in jobs), logs[0])
    with ledger.engine.connect() as connection:
        runs = connection.exec_driver_sql("SELECT job_id, count(*) FROM runs GROUP BY job_id").all()
        counts = connection.exec_driver_sql("SELECT job_id, count(*) FROM evaluations GROUP BY job_id").all()
    # Each was driven once, and to its budget.
    assert sorted(runs) == [(job, 1) for job in jobs]
    assert sorted(counts) == [(job, 60) for job in jobs]
    ledger.close()


def test_a_job_that_cannot_run_harms_no_other(tmp_path: Path, plugin: Path) -> None:
    db, log = f"sqlite:///{tmp_path / 'archfront.db'}", tmp_path / "log"
    bad = submitted(db, tmp_path, plugin, process_job(30, name="bad"))
    good = {"name": "x", "space": {"name": "fbnet-tiny"}, "evaluators": [{"name": "costs"}]}
    good |= {"objectives": [{"metric": "params", "direction": "min"}], "strategy": {"name": "random"}}
    good |= {"budget": {"evaluations": 5}, "workers": {"executor": "inline"}}
    ledger = Ledger.open(db)
    # This controller has no plug-in, so it does not know the evaluator of the first job.
    with controller(db, log):
        other = submitted(db, tmp_path, plugin, good)
        until(lambda: Job(ledger, other).state == "done", log)
        until(lambda: Job(ledger, bad).row["reason"] is not None, log)
        assert "'synthetic'" in Job(ledger, bad).row["reason"]
        assert Job(ledger, bad).state == "queued"
        # It can be cancelled by its owner all the same.
        assert command("cancel", str(bad), "--db", db).returncode == 0
        assert Job(ledger, bad).state == "cancelled"
    ledger.close()


def test_a_deadly_inline_evaluator_does_not_take_the_controller_along(tmp_path: Path, plugin: Path) -> None:
    """In a shell `inline` is the driver's own process; in a controller it is a child."""
    db, log = f"sqlite:///{tmp_path / 'archfront.db'}", tmp_path / "log"
    deadly = synthetic_job(12, evaluator={"misdeed": "die", "every": 4}, workers={"executor": "inline", "attempts": 1})
    ledger = Ledger.open(db)
    job = submitted(db, tmp_path, plugin, deadly)
    with controller(db, log, "--plugin", str(plugin)) as process:
        until(lambda: Job(ledger, job).state == "done", log)
        assert process.poll() is None
    assert Job(ledger, job).status()["evaluations"]["failed"] == 3
    ledger.close()


def test_submitting_checks_the_job(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(process_job(30)))
    done = command("submit", str(file), "--db", str(tmp_path / "archfront.db"))
    assert done.returncode == 2
    assert "synthetic" in done.stderr
    assert Ledger.open(str(tmp_path / "archfront.db")).claimable() == []
