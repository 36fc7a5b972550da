"""`engine: tune`: a job's evaluations as trials of Ray Tune, with the promises of every other job."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jobs import synthetic_job
from killing import kill_tree

import archfront
from archfront.db.dominance import nondominated_ranks
from archfront.db.ledger import Ledger
from archfront.errors import InputError
from archfront.plugins import read_plugins
from archfront.search.job import parse_spec
from archfront.search.plugins import load_plugins
from archfront.search.resolve import resolve

FIDELITIES = [1, 3, 9]
ASHA = {"name": "asha", "reduction_factor": 3}


def tune_job(evaluations: int, scheduler: dict[str, Any], **changes: Any) -> dict[str, Any]:
    workers = {"executor": "ray"} | changes.pop("workers", {})
    evaluator = {"fidelities": FIDELITIES} | changes.pop("evaluator", {})
    return synthetic_job(
        evaluations, evaluator=evaluator, workers=workers, engine="tune", tune={"scheduler": scheduler}, **changes
    )


def query(ledger: Ledger, text: str) -> list[Any]:
    with ledger.engine.connect() as connection:
        return list(connection.exec_driver_sql(text))


def assert_promises(ledger: Ledger, evaluations: int) -> dict[int, int]:
    """Budget exact, nothing twice, ladders climbed rung by rung, the front that of brute force. Returns how many
    evaluations each fidelity had."""
    rows = query(ledger, "SELECT number, candidate_id, fidelity, state, seq FROM evaluations ORDER BY number")
    assert [row.number for row in rows] == list(range(evaluations))
    assert sorted(row.seq for row in rows) == list(range(1, evaluations + 1))
    assert {row.state for row in rows} <= {"done", "failed"}
    assert len({(row.candidate_id, row.fidelity) for row in rows}) == evaluations
    ended = {(row.candidate_id, row.fidelity): row for row in rows}
    for row in rows:
        if row.fidelity > FIDELITIES[0]:
            below = ended[row.candidate_id, FIDELITIES[FIDELITIES.index(row.fidelity) - 1]]
            assert below.state == "done"
            # Written ahead only after the result that it follows from.
            assert below.number < row.number
            assert below.seq < row.seq
    top = max(row.fidelity for row in rows if row.state == "done")
    done = [row.number for row in rows if row.state == "done" and row.fidelity == top]
    values: dict[int, dict[str, float]] = {}
    for number, name, value in query(ledger, "SELECT number, name, value FROM metrics"):
        values.setdefault(number, {})[name] = value
    points = np.array([[-values[number]["gain"], values[number]["cost"]] for number in done])
    best = {number for number, rank in zip(done, nondominated_ranks(points), strict=True) if rank == 0}
    members = query(ledger, f"SELECT number FROM front_members WHERE left_seq IS NULL AND fidelity = {top}")
    assert {row.number for row in members} == best
    return dict(Counter(row.fidelity for row in rows))


def test_asha_decides_who_goes_on(tmp_path: Path, plugin: Path) -> None:
    log = tmp_path / "evaluated"
    spec = tune_job(54, ASHA, workers={"count": 2}, evaluator={"log": str(log)})
    job = archfront.run(spec, db=tmp_path / "archfront.db", plugins=[plugin])
    assert job.state == "done"
    counts = assert_promises(job.ledger, 54)
    assert counts[1] > counts[3] > counts[9] > 0
    sources = Counter(row.source for row in query(job.ledger, "SELECT source, count FROM asks WHERE count > 0"))
    assert sources["scheduler"] == counts[3] + counts[9]
    assert Counter(int(line) for line in log.read_text().split()) == dict.fromkeys(range(54), 1)
    assert_asha(job.ledger)


def assert_asha(ledger: Ledger) -> None:
    """Every promotion and every stop is what Tune's ASHA says of the results in their order."""
    rows = query(
        ledger,
        "SELECT candidate_id, fidelity, seq, value FROM evaluations JOIN metrics "
        "ON metrics.job_id = evaluations.job_id AND metrics.number = evaluations.number AND name = 'gain' "
        "ORDER BY seq",
    )
    present = {(row.candidate_id, row.fidelity) for row in rows}
    rungs: dict[int, list[float]] = {1: [], 3: []}
    last = max(row.seq for row in rows)
    for row in rows:
        if row.fidelity == 9:
            continue
        before = rungs[row.fidelity]
        goes_on = not before or row.value >= np.nanpercentile(before, (1 - 1 / 3) * 100)
        before.append(row.value)
        following = {1: 3, 3: 9}[row.fidelity]
        if row.seq < last - 20:  # later ones may have found the budget spent
            assert ((row.candidate_id, following) in present) == goes_on


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "archfront", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(url: str) -> int:
    ledger = Ledger.open(url)
    [row] = query(ledger, "SELECT count(*) AS n FROM evaluations WHERE state != 'running'")
    ledger.close()
    return int(row.n)


def kill_at(process: subprocess.Popen[bytes], url: str, aim: int) -> None:
    """SIGKILL to the driver and all below it as soon as so many evaluations are finished."""
    while finished(url) < aim:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    kill_tree(process)


def kill_and_resume(folder: Path, plugin: Path, spec: dict[str, Any], aims: list[int]) -> Ledger:
    file, url = folder / "job.yaml", str(folder / "killed.db")
    file.write_text(yaml.safe_dump(spec))
    Ledger.open(url).close()
    common = ["--db", url, "--plugin", str(plugin)]
    arguments = ["run", str(file), *common]
    for aim in aims:
        kill_at(start(arguments), url, aim)
        assert finished(url) < spec["budget"]["evaluations"]
        arguments = ["resume", "last", *common]
    last = subprocess.run([sys.executable, "-m", "archfront", *arguments], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return Ledger.open(url)


@pytest.mark.slow
def test_killed_with_asha_and_resumed_equals_unbroken(tmp_path: Path, plugin: Path) -> None:
    from ledger_dump import differences, dump

    spec = tune_job(36, ASHA, evaluator={"sleep_s": 0.1}, workers={"count": 1})
    killed = kill_and_resume(tmp_path, plugin, spec, [14])
    assert_promises(killed, 36)
    assert_asha(killed)
    whole = archfront.run(spec, db=tmp_path / "whole.db", plugins=[plugin])
    assert differences(dump(whole.ledger, whole.id), dump(killed, 1)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "fifo"},
        pytest.param({"name": "hyperband"}, marks=pytest.mark.soak),
        pytest.param({"name": "median_stopping_rule"}, marks=pytest.mark.soak),
    ],
    ids=lambda s: s["name"],
)
def test_killed_often_with_two_workers(tmp_path: Path, plugin: Path, scheduler: dict[str, Any]) -> None:
    log = tmp_path / "evaluated"
    rng = random.Random(4)
    aims = [rng.randint(*limits) for limits in ((5, 15), (25, 35), (45, 60))]
    spec = tune_job(90, scheduler, evaluator={"sleep_s": 0.05, "log": str(log)}, workers={"count": 2})
    counts = assert_promises(kill_and_resume(tmp_path, plugin, spec, aims), 90)
    assert counts[9] > 0
    made = Counter(int(line) for line in log.read_text().split())
    assert set(made) == set(range(90))
    # Beyond the plan: at most what was under way at each kill.
    assert made.total() - 90 <= 2 * len(aims)


@pytest.mark.slow
def test_one_fidelity_and_misdeeds(tmp_path: Path, plugin: Path) -> None:
    """Failures cost themselves alone; a budget that is extended goes on."""
    evaluator = {"misdeed": "die", "every": 9, "fidelities": None}
    spec = tune_job(27, {"name": "fifo"}, evaluator=evaluator, workers={"count": 2, "attempts": 2})
    job = archfront.run(spec, db=tmp_path / "archfront.db", plugins=[plugin])
    states = Counter(row.state for row in query(job.ledger, "SELECT state FROM evaluations"))
    assert states == {"done": 24, "failed": 3}
    attempts = query(job.ledger, "SELECT kind FROM attempts")
    assert Counter(row.kind for row in attempts) == {"died": 6}


@pytest.mark.slow
def test_failures_at_several_fidelities_with_hyperband(tmp_path: Path, plugin: Path) -> None:
    evaluator = {"misdeed": "raise", "every": 7}
    spec = tune_job(60, {"name": "hyperband"}, evaluator=evaluator, workers={"count": 2, "attempts": 2})
    job = archfront.run(spec, db=tmp_path / "archfront.db", plugins=[plugin])
    assert_promises(job.ledger, 60)
    # What the spent budget kept from going on goes on when there is more.
    before = len(query(job.ledger, "SELECT number FROM evaluations WHERE fidelity = 9"))
    job.resume(evaluations=30)
    assert assert_promises(job.ledger, 90)[9] > before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tune": {"scheduler": {"name": "asah"}}}, "tune.scheduler.name: 'asah' .* Did you mean 'asha'"),
        ({"tune": {"scheduler": {"name": "pbt"}}}, "tune.scheduler.name: 'pbt' cannot be used: it rewrites"),
        ({"tune": {"scheduler": {"name": "pb2"}}}, "rewrites a trial's configuration"),
        ({"tune": {"scheduler": {"name": "hb_bohb"}}}, "BOHB searcher"),
        ({"tune": {"scheduler": {}}}, "is no scheduler of Ray Tune"),
        ({"tune": {"scheduler": ASHA | {"grace": 1}}}, "tune.scheduler.grace.*grace_period"),
        ({"tune": {"scheduler": ASHA | {"reduction_factor": 0.5}}}, "refused by Ray Tune .*Reduction Factor"),
        ({"tune": {"scheduler": ASHA | {"metric": "costs"}}}, "is no objective of the job. Did you mean 'cost'"),
        ({"tune": {"scheduler": ASHA | {"metric": "cost", "mode": "max"}}}, "not the direction of the objective"),
        ({"tune": {"scheduler": ASHA | {"time_attr": "time_total_s"}}}, "time is the fidelity"),
        ({"workers": {"executor": "process"}}, "workers.executor: 'process' cannot be used with `engine: tune`"),
        ({"workers": {"executor": "ray", "batch": 4}}, "workers.batch: 4 cannot be used"),
        ({"engine": "archfront"}, "tune: .* is given, but the job's engine is 'archfront'"),
        ({"engine": "tuna"}, "engine: 'tuna'"),
    ],
)
def test_what_cannot_work_is_refused(plugin: Path, changes: dict[str, Any], words: str) -> None:
    load_plugins(read_plugins([plugin]))
    with pytest.raises(InputError, match=words):
        resolve(parse_spec(tune_job(30, ASHA) | changes))
