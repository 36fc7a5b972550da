"""Promises 1 and 2: kill -9 of everything at random moments, resumed each time, ends in the very same ledger."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import synthetic_job
from killing import kill_tree
from ledger_dump import differences, dump

import archfront
from archfront.db.ledger import Ledger

_ARCHFRONT = [sys.executable, "-m", "archfront"]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*_ARCHFRONT, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def progress(url: str) -> Counter[str]:
    """How many evaluations are in each state, read while the driver writes."""
    ledger = Ledger.open(url)
    with ledger.engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT state, count(*) FROM evaluations GROUP BY state").all()
    ledger.close()
    return Counter({str(row[0]): int(row[1]) for row in rows})


def run_with_kills(folder: Path, job: dict[str, Any], plugin: Path, kills: int, seed: int) -> list[Counter[str]]:
    """Run a job, killed at random moments. Returns the states at the kills that count: since the start before it
    rows were committed, and work remained."""
    rng = random.Random(seed)
    budget = job["budget"]["evaluations"]
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    url = str(folder / "killed.db")
    common = ["--db", url, "--plugin", str(plugin)]
    Ledger.open(url).close()
    counted: list[Counter[str]] = []
    arguments = ["run", str(file), *common]
    while len(counted) < kills:
        before = progress(url)
        process = start(arguments)
        # Some rows first, so that the kill counts; then a random moment within the next evaluations.
        aim = sum(before.values()) - before["running"] + rng.randint(1, max(1, budget // (kills + 2)))
        while process.poll() is None:
            now = progress(url)
            if now.total() - now["running"] >= aim:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.06)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        kill_tree(process)
        after = progress(url)
        if after.total() - after["running"] > before.total() - before["running"]:
            counted.append(after)
        arguments = ["resume", "last", *common]
    last = subprocess.run([*_ARCHFRONT, "resume", "last", *common], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return counted


def assert_same_ledger(folder: Path, job: dict[str, Any], plugin: Path, counted: list[Counter[str]]) -> None:
    whole = archfront.run(job, db=folder / "whole.db", plugins=[plugin])
    killed = archfront.Job(folder / "killed.db")
    assert killed.state == "done"
    assert any(states["running"] for states in counted), "no kill fell between write-ahead and commit"
    assert differences(dump(whole.ledger, whole.id), dump(killed.ledger, killed.id)) == []


JOBS = {
    "nsga2-halving-failures": synthetic_job(
        60,
        evaluator={"sleep_s": 0.05, "fidelities": [1, 3], "misdeed": "raise", "every": 17},
        workers={"executor": "process"},
    ),
    "learning": synthetic_job(
        40,
        evaluators=[{"name": "learner", "sleep_s": 0.05}],
        workers={"executor": "process"},
        constraints=["cost <= 26 @ 95%"],
    ),
    "tpe": synthetic_job(
        30, evaluator={"sleep_s": 0.05}, strategy={"name": "optuna:tpe"}, workers={"executor": "process"}
    ),
}


@pytest.mark.parametrize(
    ("name", "kills"),
    [("nsga2-halving-failures", 2), ("learning", 1), pytest.param("tpe", 1, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_equals_unbroken(tmp_path: Path, plugin: Path, name: str, kills: int) -> None:
    plugin = plugin.with_name("learner.py") if name == "learning" else plugin
    counted = run_with_kills(tmp_path, JOBS[name], plugin, kills=kills, seed=1)
    assert_same_ledger(tmp_path, JOBS[name], plugin, counted)


@pytest.mark.slow
def test_twenty_kills_on_ray(tmp_path: Path, plugin: Path) -> None:
    job = synthetic_job(500, evaluator={"sleep_s": 0.05, "fidelities": [1, 3]}, workers={"executor": "ray"})
    counted = run_with_kills(tmp_path, job, plugin, kills=20, seed=2)
    assert len(counted) == 20
    assert_same_ledger(tmp_path, job, plugin, counted)


@pytest.mark.slow
def test_two_workers_lose_nothing_and_repeat_no_commit(tmp_path: Path, plugin: Path) -> None:
    log = tmp_path / "evaluated"
    job = synthetic_job(
        300,
        evaluator={"sleep_s": 0.05, "fidelities": [1, 3], "log": str(log)},
        workers={"executor": "ray", "count": 2},
    )
    counted = run_with_kills(tmp_path, job, plugin, kills=6, seed=3)
    killed = archfront.Job(tmp_path / "killed.db")
    rows = dump(killed.ledger, killed.id)
    states = Counter(row[6] for row in rows["evaluations"])
    assert states == {"done": 300}
    assert sorted(row[7] for row in rows["evaluations"]) == list(range(1, 301))
    assert len(rows["metrics"]) == 600
    made = Counter(int(line) for line in log.read_text().split())
    assert set(made) == set(range(300))
    # Beyond the plan: at most what was under way at each kill.
    assert made.total() - 300 <= 2 * len(counted), json.dumps(made.most_common(5))
