"""Predictors that learn while their job runs: the version of each ask is a function of the ledger, and holds."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from jobs import synthetic_job
from ledger_dump import differences, dump

import archfront
from archfront.db.columns import load_columns
from archfront.db.ledger import Ledger
from archfront.db.moving import move
from archfront.db.schema import PredictorRow
from archfront.errors import InputError, JobFailedError
from archfront.plugins import read_plugins
from archfront.search.driver import DriveOptions, drive, submit

SIGNS = [("gain", -1), ("cost", 1)]


@pytest.fixture(scope="session")
def learner(plugin: Path) -> Path:
    return plugin.with_name("learner.py")


def learning_job(evaluations: int = 60, **evaluator: Any) -> dict[str, Any]:
    return synthetic_job(evaluations, constraints=["cost <= 26 @ 95%"]) | {
        "evaluators": [{"name": "learner"} | evaluator]
    }


def predictions(job: archfront.Job) -> list[tuple[Any, ...]]:
    """number, ask, told, the ask's version; value, std, provenance and predictor of the cost; the prediction, if
    it was measured."""
    query = sa.text(
        "SELECT e.number, a.number AS ask, a.told, a.predictor, m.value, m.std, m.provenance, m.predictor AS by, "
        "p.value AS predicted, p.predictor AS predicted_by, b.value AS base FROM evaluations e "
        "JOIN asks a ON a.job_id = e.job_id AND a.number = e.ask "
        "JOIN metrics m ON m.job_id = e.job_id AND m.number = e.number AND m.name = 'cost' "
        "LEFT JOIN metrics p ON p.job_id = e.job_id AND p.number = e.number AND p.name = 'cost_predicted' "
        "LEFT JOIN metrics b ON b.job_id = e.job_id AND b.number = e.number AND b.name = 'cost_base' "
        "WHERE e.job_id = :job ORDER BY e.number"
    )
    with job.ledger.engine.connect() as connection:
        return list(connection.execute(query, {"job": job.id}))


def test_every_ask_has_the_version_of_the_pairs_that_it_knew(tmp_path: Path, learner: Path) -> None:
    job = archfront.run(learning_job(90), db=tmp_path / "l.db", plugins=[learner])
    rows = dump(job.ledger, job.id)
    versions = {pairs: (version, json.loads(state)) for pairs, version, _, state in rows["predictors"]}
    assert list(versions) == [4, 8, 16]
    with job.ledger.engine.connect() as connection:
        columns = load_columns(connection, job.id)
    paired = np.isfinite(columns["cost_base"])
    pairs = np.stack([columns["cost_base"], columns["cost"]], axis=1)[paired]
    assert 0.15 < paired.mean() < 0.45
    # Whoever has the rows can make each version again.
    refit = _plugin(learner).Learner().refit
    assert {count: refit(pairs[:count]) for count in versions} == {c: state for c, (_, state) in versions.items()}
    for _, told, *_, predictor in rows["asks"]:
        known = int(paired[:told].sum())
        expected = [version for count, (version, _) in versions.items() if count <= known]
        assert predictor == (expected[-1] if expected else None)
    assert len({predictor for *_, predictor in rows["asks"]}) == 4
    assert job.status()["predictor"]["version"] == versions[16][0]


def test_predictions_are_those_of_the_version_and_never_pass_for_measurements(tmp_path: Path, learner: Path) -> None:
    job = archfront.run(learning_job(90), db=tmp_path / "l.db", plugins=[learner])
    states = {version: json.loads(state) for _, version, _, state in dump(job.ledger, job.id)["predictors"]}
    measured = 0
    for row in predictions(job):
        base = row.base if row.predicted is not None else None
        said, by = (row.value, row.by) if base is None else (row.predicted, row.predicted_by)
        assert row.provenance == ("predicted" if base is None else "measured")
        assert by == ("sum" if row.predictor is None else f"sum@{row.predictor}")
        if base is None and row.predictor is not None:
            assert row.std == states[row.predictor]["std"]
        if base is not None:
            measured += 1
            assert row.by is None
            assert said == base * (1.0 if row.predictor is None else states[row.predictor]["ratio"])
    assert measured > 16
    # The constraint with its confidence goes by the deviation of the version in force.
    feasible = {row["evaluation"] for row in job.front()}
    for row in predictions(job):
        assert row.number not in feasible or row.value + 1.6448 * row.std <= 26


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stopped_anywhere_and_resumed_equals_unbroken(tmp_path: Path, learner: Path, batch_size: int) -> None:
    spec = learning_job(90, batch_size=batch_size)
    sources = read_plugins([learner])
    whole = archfront.run(spec, db=tmp_path / "whole.db", plugins=[learner])
    ledger = Ledger.open(str(tmp_path / "stopped.db"))
    job_id = submit(ledger, spec, sources)
    steps, stops = iter(range(10_000)), 0
    while drive(ledger, job_id, DriveOptions(plugins=sources, stop=lambda: next(steps) % 3 == 2)) == "stopped":
        stops += 1
    assert stops > 3
    rows = dump(ledger, job_id)
    assert len(rows["predictors"]) >= 3
    assert differences(dump(whole.ledger, whole.id), rows) == []


def test_a_recorded_version_holds_and_travels(tmp_path: Path, learner: Path) -> None:
    """Even if the same pairs would now give another one; also in a ledger that was moved."""
    sources = read_plugins([learner])
    ledger = Ledger.open(str(tmp_path / "first.db"))
    job_id = submit(ledger, learning_job(60), sources)
    seen: list[int] = []

    def stop() -> bool:
        return bool(seen and seen[-1] >= 30)

    options = DriveOptions(plugins=sources, observe=lambda progress: seen.append(progress.finished), stop=stop)
    assert drive(ledger, job_id, options) == "stopped"
    before = dump(ledger, job_id)
    waiting = [row for row in before["evaluations"] if row[6] == "running"]
    version = before["predictors"][-1][1]
    assert waiting
    with ledger.engine.begin() as connection:
        recorded = {"ratio": 7.0, "std": 0.25}
        newest = sa.update(PredictorRow).where(PredictorRow.version == version)
        connection.execute(newest.values(state=recorded))
    ledger.close()
    move(str(tmp_path / "first.db"), str(tmp_path / "second.db"))
    moved = Ledger.open(str(tmp_path / "second.db"))
    assert drive(moved, job_id, DriveOptions(plugins=sources)) == "budget"
    after = {row.number: row for row in predictions(archfront.Job(moved))}
    asked = {row[0]: row[1] for row in waiting}
    of_version = [n for n in asked if after[n].predictor == version and after[n].provenance == "predicted"]
    assert of_version
    assert {after[n].std for n in of_version} == {0.25}


def test_what_cannot_learn_is_refused_or_ends_the_job(tmp_path: Path, learner: Path) -> None:
    for misdeed, words in (("raise", "4 pairs: RuntimeError.*no lesson"), ("large", "20[0-9]+ bytes, more than")):
        with pytest.raises(JobFailedError, match=f"'learner' could not learn.*{words}"):
            archfront.run(learning_job(misdeed=misdeed), db=tmp_path / "l.db", plugins=[learner])
    two = learning_job() | {"evaluators": [{"name": "learner"}, {"name": "second"}]}
    source = learner.read_text().replace('name="gain"', 'name=self.name + "_gain"')
    source = source.replace('name="cost"', 'name=self.name + "_cost"')
    (tmp_path / "two.py").write_text(source)
    with pytest.raises(InputError, match=r"evaluators.*'learner', 'second'.*learn while"):
        archfront.run(two, db=tmp_path / "l.db", plugins=[tmp_path / "two.py"])
    job = archfront.run(learning_job(20, verify=0), db=tmp_path / "l.db", plugins=[learner])
    assert job.status()["predictor"] is None
    assert dump(job.ledger, job.id)["predictors"] == []


def _plugin(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("learner_of_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
