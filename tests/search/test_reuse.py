"""`reuse: true`: what another job found in the same way is taken, marked with its origin, and costs nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import synthetic_job
from ledger_dump import differences, dump
from postgres import Postgres

import archfront
from archfront.client import Job
from archfront.db.connection import write
from archfront.db.ledger import Ledger
from archfront.errors import InputError
from archfront.plugins import read_plugins
from archfront.search.driver import DriveOptions, drive, submit


def job_of(log: Path, evaluations: int = 60, **changes: Any) -> dict[str, Any]:
    evaluator = {"log": str(log), "fidelities": [1, 3]} | changes.pop("evaluator", {})
    return synthetic_job(evaluations, evaluator=evaluator, **changes)


def made(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def query(job: Job, text: str) -> list[Any]:
    with job.ledger.engine.connect() as connection:
        return list(connection.exec_driver_sql(text))


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "archfront.db")
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.ledger()


def test_the_same_search_again_evaluates_nothing(db: str, tmp_path: Path, plugin: Path) -> None:
    log = tmp_path / "evaluated"
    first = archfront.run(job_of(log), db=db, plugins=[plugin])
    assert len(made(log)) == 60
    second = archfront.run(job_of(log, reuse=True), db=db, plugins=[plugin])
    assert len(made(log)) == 60
    # Row for row the same but for who evaluated: the strategy heard the same in the same order.
    mine, theirs = dump(second.ledger, second.id), dump(first.ledger, first.id)
    for name in ("asks", "metrics", "front_members"):
        assert mine[name] == theirs[name]
    assert second.status()["reused"] == 60
    rows = query(second, f"SELECT number, origin_job_id, origin_number FROM reuses WHERE job_id = {second.id}")
    assert sorted(rows) == [(n, first.id, n) for n in range(60)]
    ended = query(second, f"SELECT state, attempts, duration_s FROM evaluations WHERE job_id = {second.id}")
    assert set(ended) == {("done", 0, 0.0)}


def test_a_longer_search_takes_what_there_is_and_chains_lead_to_the_origin(tmp_path: Path, plugin: Path) -> None:
    log, db = tmp_path / "evaluated", tmp_path / "archfront.db"
    first = archfront.run(job_of(log, 40), db=db, plugins=[plugin])
    second = archfront.run(job_of(log, 90, reuse=True), db=db, plugins=[plugin])
    assert second.status()["reused"] == 40
    assert len(made(log)) == 90
    third = archfront.run(job_of(log, 90, reuse=True), db=db, plugins=[plugin])
    assert len(made(log)) == 90
    # Never to a row that was reused itself.
    origins = query(
        third, f"SELECT origin_job_id, count(*) FROM reuses WHERE job_id = {third.id} GROUP BY 1 ORDER BY 1"
    )
    assert origins == [(first.id, 40), (second.id, 50)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 8}, 4),
        ({"reuse": False}, 0),
        ({"evaluator": {"sleep_s": 0.001}}, 0),
        ({"workers": {"cpus": 2}}, 0),
        ({"space": {"name": "choices", "columns": {"a": [1, 2], "b": [1, 2, 3]}}}, 0),
        ({"constraints": ["cost <= 3"]}, 4),
        ({"evaluator": {"fidelities": [1, 9]}}, 4),
    ],
    ids=["seed", "not allowed", "evaluator", "threads", "space", "constraints", "fidelities"],
)
def test_only_the_same_work_is_shared(tmp_path: Path, plugin: Path, changes: dict[str, Any], expected: int) -> None:
    log, db = tmp_path / "evaluated", tmp_path / "archfront.db"
    small = {"space": {"name": "choices", "columns": {"a": [1, 2], "b": [1, 2]}}, "strategy": {"name": "random"}}
    archfront.run(job_of(log, 4, **small), db=db, plugins=[plugin])
    again = archfront.run(job_of(log, 4, **({"reuse": True} | small | changes)), db=db, plugins=[plugin])
    assert again.status()["reused"] == expected


def test_code_that_changed_meanwhile_shares_nothing(tmp_path: Path, plugin: Path) -> None:
    log, db = tmp_path / "evaluated", tmp_path / "archfront.db"
    archfront.run(job_of(log, 20), db=db, plugins=[plugin])
    changed = tmp_path / "synthetic.py"
    changed.write_text(plugin.read_text() + "\n# another version\n")
    again = archfront.run(job_of(log, 20, reuse=True), db=db, plugins=[changed])
    assert again.status()["reused"] == 0
    # Nor does a job whose code changed on the way.
    ledger = Ledger.open(str(db))
    mixed = submit(ledger, job_of(log, 20), read_plugins([plugin]))
    stops = iter([False] * 5)
    drive(ledger, mixed, DriveOptions(plugins=read_plugins([plugin]), stop=lambda: next(stops, True)))
    assert ledger.job(mixed)["work_digest"] is not None
    drive(ledger, mixed, DriveOptions(plugins=read_plugins([changed]), accept_changes=lambda _: True))
    assert ledger.job(mixed)["work_digest"] is None


def test_stopped_and_resumed_equals_unbroken(tmp_path: Path, plugin: Path) -> None:
    """Reused and new evaluations together, stopped between any two commits."""
    log = tmp_path / "evaluated"
    ledger = Ledger.open(str(tmp_path / "a.db"))
    plugins = read_plugins([plugin])
    drive(ledger, submit(ledger, job_of(log, 25), plugins), DriveOptions(plugins=plugins))
    longer = job_of(log, 80, reuse=True)
    broken = submit(ledger, longer, plugins)
    ledger.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "b.db")
    whole, resumed = (Ledger.open(str(tmp_path / name)) for name in ("a.db", "b.db"))
    drive(whole, broken, DriveOptions(plugins=plugins))
    outcome, rounds = "stopped", 0
    while outcome == "stopped":
        rounds += 1
        stops = iter([False] * 3)
        outcome = drive(resumed, broken, DriveOptions(plugins=plugins, stop=lambda stops=stops: next(stops, True)))  # type: ignore[misc]
    assert rounds > 10
    assert differences(dump(whole, broken), dump(resumed, broken)) == []
    assert Job(resumed, broken).status()["reused"] == 25


def test_an_origin_keeps_the_checkpoints_that_others_need(tmp_path: Path, plugin: Path) -> None:
    from archfront.search.retention import collect

    db = tmp_path / "archfront.db"
    small = {"space": {"name": "choices", "columns": {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}}}
    small |= {"evaluator": {"fidelities": None}, "strategy": {"name": "random"}}
    log = tmp_path / "evaluated"
    first = archfront.run(job_of(log, 16, **small), db=db, plugins=[plugin])
    ledger = first.ledger
    with write(ledger.engine) as connection:
        for (number,) in connection.exec_driver_sql("SELECT number FROM evaluations WHERE job_id = 1").all():
            file = tmp_path / f"{number}.bin"
            file.write_bytes(b"weights")
            connection.exec_driver_sql(
                f"UPDATE evaluations SET checkpoint = '{file}' WHERE job_id = 1 AND number = {number}"
            )
    # The second job wants the opposite, so its front members are not the first one's.
    opposite = [{"metric": "cost", "direction": "max"}]
    second = archfront.run(job_of(log, 16, reuse=True, objectives=opposite, **small), db=db, plugins=[plugin])
    needed = [row["evaluation"] for row in second.front()]
    borrowed = query(second, f"SELECT number, origin_number FROM reuses WHERE job_id = {second.id}")
    expected = {origin for number, origin in borrowed if number in needed}
    own = {row["evaluation"] for row in first.front()}
    assert len(borrowed) == 16
    assert expected - own
    collect(str(db), "1")
    left = {int(file.stem) for file in tmp_path.glob("*.bin")}
    assert left == own | expected


def test_tune_schedulers_cannot_share(plugin: Path, tmp_path: Path) -> None:
    spec = job_of(tmp_path / "log", 10, reuse=True, engine="tune", workers={"executor": "ray"})
    with pytest.raises(InputError, match="reuse: True cannot be used with `engine: tune`"):
        archfront.run(spec, db=tmp_path / "archfront.db", plugins=[plugin])
