"""Whole jobs as CSV, Parquet and TensorBoard events, and the command that writes them."""

import csv
import json
import math
import re
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from jobs import synthetic_job
from pyarrow import parquet
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event
from typer.testing import CliRunner

import archfront
from archfront.cli.main import app
from archfront.client import Job
from archfront.db import walking
from archfront.db.columns import load_columns
from archfront.db.ledger import Ledger
from archfront.db.queries import evaluation_rows, front_history
from archfront.db.schema import Base, Evaluation
from archfront.errors import ArchfrontError
from archfront.interchange.registry import export_job
from archfront.report.facts import gather
from archfront.search.recording import Ending, Recorder, Trial


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, plugin: Path) -> Job:
    """Two fidelities, failures with their attempts, a constraint."""
    document = synthetic_job(
        70,
        evaluator={"fidelities": [1, 3], "misdeed": "nan", "every": 9},
        constraints=["cost <= 22"],
        workers={"attempts": 2},
    )
    return archfront.run(document, db=tmp_path_factory.mktemp("tables") / "ledger.db", plugins=[plugin])


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "WALK_ROWS", 7)
    monkeypatch.setattr("archfront.interchange.dump.WALK_ROWS", 7)


def test_csv_and_parquet_hold_everything(job: Job, tmp_path: Path) -> None:
    export_job(job, f"parquet:{tmp_path}/p")
    export_job(job, f"csv:{tmp_path}/c")
    tables = {
        "evaluations", "job", "asks", "attempts", "runs", "metrics", "front_members", "reuses", "benchmarks", "devices",
        "predictors",
    }  # fmt: skip
    assert {path.stem for path in (tmp_path / "p").iterdir()} == tables
    assert {path.name for path in (tmp_path / "c").iterdir()} == {f"{name}.csv" for name in tables}

    with job.ledger.engine.connect() as connection:
        facts = connection.execute(sa.select(Evaluation).order_by(Evaluation.number)).mappings().all()
        rows = evaluation_rows(connection, job.id, range(len(facts)))
        members = {n for f in (1, 3) for n, _, left in front_history(connection, job.id, f) if left is None}
        for name in tables & set(Base.metadata.tables) - {"evaluations"}:
            count = connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar()
            assert parquet.read_metadata(tmp_path / "p" / f"{name}.parquet").num_rows == count, name
            with open(tmp_path / "c" / f"{name}.csv", newline="") as file:
                assert sum(1 for _ in csv.reader(file)) == 1 + (count or 0), name
    wide = parquet.read_table(tmp_path / "p" / "evaluations.parquet").to_pylist()
    with open(tmp_path / "c" / "evaluations.csv", newline="") as file:
        texts = list(csv.DictReader(file))
    assert len(wide) == len(texts) == len(facts)
    for given, text, fact, row in zip(wide, texts, facts, rows, strict=True):
        assert {name: given[name] for name in walking.FIELDS} == {name: fact[name] for name in walking.FIELDS}
        assert json.loads(given["genotype"]) == json.loads(text["genotype"]) == row["genotype"]
        assert given["key"] == row["key"]
        assert given["on_front"] == (fact["number"] in members)
        assert given["gain"] == row["metrics"].get("gain")
        assert given["cost_std"] == row["std"].get("cost")
        assert text["gain"] == ("" if given["gain"] is None else repr(given["gain"]))
        assert text["error"] == (fact["error"] or "")
    assert {fact["state"] for fact in facts} == {"done", "failed"}
    spec = parquet.read_table(tmp_path / "p" / "job.parquet").to_pylist()[0]["spec"]
    assert json.loads(spec) == job.spec
    assert pd.read_parquet(tmp_path / "p" / "evaluations.parquet").dtypes["seq"] == np.dtype("int64")


def test_metrics_that_are_called_like_columns_keep_both(tmp_path: Path) -> None:
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    with Recorder(ledger, "odd", source="x", objectives=[("loss", "min")]) as recorder:
        (number,) = recorder.start([Trial(genotype={"a": None})])
        recorder.finish([Ending(number=number, metrics={"loss": 1.0, "state": 2.0, "inf": math.inf, "nan": math.nan})])
    export_job(Job(ledger), f"parquet:{tmp_path}/p")
    row = parquet.read_table(tmp_path / "p" / "evaluations.parquet").to_pylist()[0]
    assert (row["state"], row["metric_state"], row["inf"], row["nan"]) == ("done", 2.0, math.inf, None)
    with Recorder(ledger, "none", source="x", objectives=[("loss", "min")]):
        pass
    for scheme in ("csv", "parquet", "tensorboard"):
        export_job(Job(ledger), f"{scheme}:{tmp_path}/none-{scheme}")
    assert parquet.read_metadata(tmp_path / "none-parquet" / "evaluations.parquet").num_rows == 0


def events(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """(step, time, value) by tag, from the one event file of a folder, every checksum checked."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, found, at = path.read_bytes(), defaultdict(list), 0

    def checked(part: bytes, given: int) -> bytes:
        crc = crc32c(part)
        assert ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32 == given
        return part

    while at < len(data):
        (length,) = struct.unpack("<Q", checked(data[at : at + 8], struct.unpack_from("<I", data, at + 8)[0]))
        body = data[at + 12 : at + 12 + length]
        event = Event.FromString(checked(body, struct.unpack_from("<I", data, at + 12 + length)[0]))
        at += 16 + length
        for value in event.summary.value:
            found[value.tag].append((event.step, event.wall_time, value.simple_value))
    return found


def test_events_follow_the_commits(job: Job, tmp_path: Path) -> None:
    export_job(job, f"tensorboard:{tmp_path}/t")
    with job.ledger.engine.connect() as connection:
        columns = load_columns(connection, job.id)
        histories = {level: front_history(connection, job.id, level) for level in (1, 3)}
    for level, stays in histories.items():
        read = events(tmp_path / "t" / f"fidelity-{level}")
        mine = columns.rows((columns["fidelity"] == level) & np.isfinite(columns["gain"]))
        assert [step for step, _, _ in read["metrics/gain"]] == mine["seq"].tolist()
        np.testing.assert_array_equal([v for _, _, v in read["metrics/gain"]], mine["gain"].astype(np.float32))
        assert [moment for _, moment, _ in read["metrics/gain"]] == mine["finished_at"].tolist()
        for step, _, size in read["front/size"]:
            assert size == sum(entered <= step and (left is None or left > step) for _, entered, left in stays)
        assert read["front/size"][-1][2] == len(job.front(fidelity=level))
    volumes = [(step, value) for step, _, value in read["front/hypervolume"]]
    expected = gather(job).history[: len(volumes)]
    assert [step for step, _ in volumes] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in volumes], [v for _, v in expected], rtol=1e-6)


def command(job: Job, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", "last", *arguments, "--db", str(job.ledger.engine.url.database)])
    if isinstance(result.exception, ArchfrontError):
        return 2, str(result.exception)
    return result.exit_code, " ".join(result.output.split())


def test_the_command_tells_jobs_from_candidates(job: Job, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "empty").mkdir()
    code, said = command(job, "--to", f"csv:{tmp_path}/empty")
    assert code == 0
    assert re.search(r"^Wrote \d+ evaluations, and job \(1\), ", said)
    code, said = command(job, "--to", f"optuna:sqlite:///{tmp_path}/s.db", "--json")
    assert json.loads(said)["what"].startswith("the study 'synthetic' with")
    assert command(job, "3", "--to", str(tmp_path / "x.json"))[0] == 0
    wrong: dict[str, tuple[Any, ...]] = {
        "CANDIDATE: None is missing": ("--to", str(tmp_path / "y.json")),
        "CANDIDATE: '3' cannot be exported alone to csv": ("3", "--to", f"csv:{tmp_path}/z"),
        "Did you mean 'optuna'": ("--to", "optunna:sqlite:///x"),
        "is there already": ("--to", f"parquet:{tmp_path}/taken"),
        "a folder that does not exist": ("--to", f"tensorboard:{tmp_path}/none/x"),
        "names no place. Write one of optuna:URL": ("--to", "csv:"),
        "names no place. Name a file": (),
        "has an unknown format": ("3", "--to", "model.gguf"),
    }
    for words, arguments in wrong.items():
        code, said = command(job, *arguments)
        assert code == 2
        assert words in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "s.db", "taken", "x.json"]


def test_a_failed_export_leaves_nothing(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> object:
        raise RuntimeError("half-way")

    monkeypatch.setattr("archfront.interchange.dump._own", break_down)
    with pytest.raises(RuntimeError, match="half-way"):
        export_job(job, f"csv:{tmp_path}/c")
    assert list(tmp_path.iterdir()) == []
