"""Jobs to Optuna studies and back: the same front on each side, whatever the storage."""

import io
import json
import math
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from jobs import synthetic_job
from postgres import Postgres

import archfront
from archfront.cli.main import main
from archfront.client import Job
from archfront.db.ledger import Ledger
from archfront.db.queries import FrontQuery, evaluation_rows, front
from archfront.db.schema import Evaluation
from archfront.errors import ArchfrontError, InputError
from archfront.interchange.optuna_import import import_study
from archfront.interchange.optuna_storage import open_storage
from archfront.interchange.registry import export_job
from archfront.search.recording import Ending, Recorder, Trial
from archfront.search.strategies.optuna_study import quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def job(tmp_path: Path, plugin: Path) -> Job:
    """Two fidelities, a constraint, failures, and evaluations that were never finished."""
    return archfront.run(
        synthetic_job(
            70,
            evaluator={"fidelities": [1, 3], "misdeed": "nan", "every": 9},
            constraints=["cost <= 22"],
            workers={"attempts": 1},
        ),
        db=tmp_path / "ledger.db",
        plugins=[plugin],
    )


def load(place: str, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(place, "--to", create=False)[0])


def members(job: Job) -> list[tuple[float, ...]]:
    names = [name for name, _ in job.front().objectives]
    return sorted(tuple(row[name] for name in names) for row in job.front())


PLACES: dict[str, Callable[[Path, Postgres | None], str]] = {
    "sqlite": lambda folder, _: f"sqlite:///{folder}/study.db",
    "journal": lambda folder, _: str(folder / "study.log"),
    "postgresql": lambda _, server: server.empty().replace("postgresql:", "postgresql+psycopg:") if server else "",
}


@pytest.mark.parametrize("kind", PLACES)
def test_there_and_back_the_front_is_the_same(
    kind: str, job: Job, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = PLACES[kind](tmp_path, request.getfixturevalue("postgres") if kind == "postgresql" else None)
    export_job(job, f"optuna:{place}")
    study = load(place, "synthetic")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["gain", "cost"]
    assert sorted(trial.number for trial in study.best_trials) == [row["evaluation"] for row in job.front()]
    assert sorted(tuple(trial.values) for trial in study.best_trials) == members(job)

    with job.ledger.engine.connect() as connection:
        facts = connection.execute(sa.select(Evaluation).order_by(Evaluation.number)).mappings().all()
        rows = evaluation_rows(connection, job.id, range(len(facts)))
    assert {fact["state"] for fact in facts} == {"done", "failed"}
    assert len(study.trials) == len(facts)
    top = max(fact["fidelity"] for fact in facts)
    for trial, fact, row in zip(study.trials, facts, rows, strict=True):
        trial._validate()
        assert list(trial.params.values()) == row["genotype"]
        assert trial.distributions["c0"] == optuna.distributions.CategoricalDistribution([1, 2, 3, 4])
        expected = "FAIL" if fact["state"] == "failed" else "COMPLETE" if fact["fidelity"] == top else "PRUNED"
        assert trial.state.name == expected
        assert trial.datetime_complete is not None
        assert abs(trial.datetime_complete.timestamp() - fact["finished_at"]) < 1e-5
        if fact["state"] == "done":
            assert trial.values == [row["metrics"]["gain"], row["metrics"]["cost"]]
            assert trial.constraints == {"0": fact["violation"]}
        else:
            assert "nan" in trial.user_attrs["archfront:error"]

    imported = import_study(job.ledger, place, "synthetic", "back")
    again = Job(job.ledger, "back")
    assert imported.endings["done"] == sum(fact["state"] == "done" for fact in facts)
    assert [row["evaluation"] for row in again.front()] == [row["evaluation"] for row in job.front()]
    assert members(again) == members(job)
    assert again.front()[0]["genotype"] == dict(
        zip((f"c{i}" for i in range(8)), job.front()[0]["genotype"], strict=True)
    )
    with job.ledger.engine.connect() as connection:
        for fidelity in (1, 3):
            first = front(connection, job.id, FrontQuery(fidelity=fidelity))
            second = front(connection, again.id, FrontQuery(fidelity=fidelity))
            assert [row["evaluation"] for row in second] == [row["evaluation"] for row in first]
            assert [row["std"] for row in second] == [row["std"] for row in first]
            assert [row["provenance"] for row in second] == [row["provenance"] for row in first]
        numbers = sa.select(Evaluation.state, Evaluation.violation, Evaluation.fidelity).order_by(Evaluation.number)
        states = [connection.execute(numbers.where(Evaluation.job_id == j)).all() for j in (job.id, again.id)]
    assert states[0] == states[1]


def a_study(storage: str) -> optuna.Study:
    """What only Optuna has: pruned trials, an infinite value, mixed parameters, attributes of all kinds."""
    study = optuna.create_study(storage=storage, study_name="theirs", direction="minimize")

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0.01, 1, log=True)
        n = trial.suggest_int("n", 1, 9)
        trial.suggest_categorical("kind", ["a", None, True])
        if trial.number % 2:
            trial.suggest_float("only-odd", -1, 1)
        trial.set_user_attr("size", n * 3)
        trial.set_user_attr("note", "words")
        trial.set_user_attr("flag", True)
        trial.set_user_attr("seq", 5)
        trial.set_constraint("odd", 1.0 if trial.number % 5 == 1 else -1.0)
        for step in range(3):
            trial.report(x + step, step)
            if trial.number % 4 == 2 and step == 1:
                raise optuna.TrialPruned
        if trial.number == 7:
            raise ValueError("boom")
        return math.inf if trial.number == 9 else x * n

    study.optimize(objective, n_trials=20, catch=ValueError)
    study.enqueue_trial({"x": 0.5})
    return study


def test_a_study_becomes_a_job_that_every_command_reads(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/theirs.db"
    study = a_study(storage)
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    imported = import_study(ledger, str(tmp_path / "theirs.db"), "theirs")
    assert imported.endings == {"done": 13, "failed": 2, "cancelled": 6}
    job = Job(ledger, "theirs")
    assert job.state == "done"
    assert job.status()["evaluations"] == {"running": 0, **imported.endings}
    assert [row["evaluation"] for row in job.front()] == [trial.number for trial in study.best_trials]
    assert job.front()[0]["value"] == study.best_value
    assert job.front()[0]["genotype"] == study.best_trial.params
    assert list(job.front(where="size <= 27", objectives=["value", "-size"]))
    with ledger.engine.connect() as connection:
        rows = evaluation_rows(connection, job.id, range(21))
        found = connection.execute(sa.select(Evaluation).order_by(Evaluation.number)).mappings().all()
    x, n = study.trials[2].params["x"], study.trials[2].params["n"]
    metrics = {"size": 3 * n, "user_seq": 5, "step:0": x, "step:1": x + 1, "value": x + 1}
    assert rows[2]["metrics"] == metrics
    assert found[7]["state"] == "failed"
    assert found[9]["error"] == "no finite value"
    assert found[1]["violation"] == 1.0
    assert rows[20]["genotype"] == {"x": 0.5}
    start = study.trials[4].datetime_start
    assert start is not None
    assert found[4]["started_at"] == start.timestamp()

    from archfront.report.page import write_report

    write_report(job, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000
    with pytest.raises(InputError, match="was recorded from optuna and cannot be resumed"):
        job.resume()

    export_job(job, f"optuna:{tmp_path}/again.log")
    back = load(str(tmp_path / "again.log"), "theirs")
    for ours, own in zip(back.trials[:20], study.trials, strict=False):
        assert ours.params == own.params
        assert ours.distributions == own.distributions
        assert ours.intermediate_values == own.intermediate_values
        assert ours.values == (None if own.number == 9 else own.values)
        assert ours.state == (optuna.trial.TrialState.FAIL if own.number == 9 else own.state)
        assert ours.datetime_start == own.datetime_start
    assert [trial.number for trial in back.best_trials] == [trial.number for trial in study.best_trials]


def test_configurations_without_a_space_get_parameters_that_hold_them(tmp_path: Path) -> None:
    ledger = Ledger.open(str(tmp_path / "ledger.db"))
    configs: list[Any] = [{"lr": 0.1, "layers": i, "act": "relu", "net": {"w": [1, i]}} for i in range(3)]
    configs += [{"lr": 1, "act": "gelu"}, [1, 2]]
    with Recorder(ledger, "tuned", source="ray-tune", objectives=[("loss", "min")]) as recorder:
        numbers = recorder.start([Trial(genotype=config, fidelity=2) for config in configs])
        recorder.finish([Ending(number=n, metrics={"loss": 1.0 / (n + 1)}) for n in numbers])
    export_job(Job(ledger), f"optuna:sqlite:///{tmp_path}/s.db")
    trials = load(f"sqlite:///{tmp_path}/s.db", "tuned").trials
    assert trials[0].params == {"lr": 0.1, "layers": 0, "act": "relu", "net": '{"w": [1, 0]}'}
    assert trials[0].distributions["layers"] == optuna.distributions.IntDistribution(0, 2)
    assert trials[0].distributions["lr"] == optuna.distributions.FloatDistribution(0.1, 1)
    assert [trial.user_attrs.get("archfront:genotype") for trial in trials] == [*configs[:3], None, [1, 2]]
    import_study(ledger, f"sqlite:///{tmp_path}/s.db", "tuned", "back")
    with ledger.engine.connect() as connection:
        assert [row["genotype"] for row in evaluation_rows(connection, 2, range(5))] == configs


def test_the_dashboard_opens_it(job: Job, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optuna_dashboard import wsgi

    export_job(job, f"optuna:sqlite:///{tmp_path}/study.db")
    app = wsgi(f"sqlite:///{tmp_path}/study.db")

    def get(path: str) -> Any:
        said: list[str] = []
        environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "80",
            "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
        }  # fmt: skip
        body = b"".join(app(environ, lambda *head: said.append(head[0])))
        assert said == ["200 OK"]
        return json.loads(body)

    summary = get("/api/studies")["study_summaries"][0]
    assert summary["study_name"] == "synthetic"
    detail = get(f"/api/studies/{summary['study_id']}")
    assert len(detail["trials"]) == job.status()["evaluations"]["done"] + job.status()["evaluations"]["failed"]
    assert detail["directions"] == ["maximize", "minimize"]
    assert detail["objective_names"] == ["gain", "cost"]
    assert {trial["number"] for trial in detail["best_trials"]} == {row["evaluation"] for row in job.front()}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ArchfrontError) as error:
        call()
    return str(error.value)


def test_refusals_name_the_field_and_leave_no_trace(job: Job, tmp_path: Path) -> None:
    ledger, storage = job.ledger, f"sqlite:///{tmp_path}/s.db"
    export_job(job, f"optuna:{storage}")
    assert "has a study 'synthetic' already" in refused(lambda: export_job(job, f"optuna:{storage}"))
    own = ledger.engine.url.database
    message = refused(lambda: export_job(job, f"optuna:sqlite:///{own}"))
    assert "holds no studies of Optuna" in message
    with sqlite3.connect(str(own)) as raw:
        assert not raw.execute("SELECT 1 FROM sqlite_master WHERE name = 'trials'").fetchall()
    for place, words in (
        ("redis://x", "is no database URL"),
        (f"sqlite:///{tmp_path}/none/x.db", "folder that does not exist"),
        (str(tmp_path), "is a folder"),
        ("", "names no place"),
    ):
        assert words in refused(lambda place=place: export_job(job, f"optuna:{place}"))

    def bring(*arguments: str) -> str:
        return refused(lambda: import_study(ledger, *arguments))

    assert bring(str(tmp_path / "missing.log"), "x").startswith("STORAGE: ")
    assert not (tmp_path / "missing.log").exists()
    assert bring(f"sqlite:///{tmp_path}/missing.db", "x").startswith("STORAGE: ")
    assert not (tmp_path / "missing.db").exists()
    (tmp_path / "words.txt").write_text("hello\nworld\n")
    assert "is no journal of Optuna" in bring(str(tmp_path / "words.txt"), "x")
    assert "Did you mean 'synthetic'" in bring(storage, "syntetic")
    import_study(ledger, storage, "synthetic", "copy")
    assert "was imported as job 2" in bring(storage, "synthetic", "copy")
    assert "was imported as job 2" in bring(f"sqlite:///{tmp_path}/../{tmp_path.name}/s.db", "synthetic", "copy")
    assert bring(storage, "synthetic", "77").startswith("--name: '77'")
    assert import_study(ledger, storage, "synthetic", "other").job_id == 3
    study = optuna.create_study(storage=storage, study_name="odd")
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"a" * 101: 1.0}))
    assert "too long a name" in bring(storage, "odd")
    assert ledger.find_job("last") == 3


def test_no_password_is_printed(
    job: Job, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = sa.make_url(postgres.empty())
    password = url.password or "se/cret"
    url = url.set(drivername="postgresql+psycopg", password=password).update_query_dict({"password": password})
    place = url.render_as_string(hide_password=False)
    wrong = url.set(host="127.0.0.1", port=9, query={"password": password}).render_as_string(hide_password=False)
    ledger = str(job.ledger.engine.url.database)

    def archfront_command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["archfront", *arguments, "--db", ledger])
        with pytest.raises(SystemExit) as ending:
            main()
        captured = capsys.readouterr()
        return int(ending.value.code or 0), captured.out + captured.err

    for code, arguments in (
        (0, ["export", "1", "--to", f"optuna:{place}"]),
        (2, ["export", "1", "--to", f"optuna:{place}"]),
        (2, ["export", "1", "--to", f"optuna:{wrong}"]),
        (2, ["export", "1", "--to", place.replace("+psycopg", "")]),
        (2, ["export", "1", "--to", f"optuna:{place.replace('+psycopg', '+other')}"]),
        (2, ["export", "1", "--to", "optuna:postgresql://u:se/cret@h:port/x"]),
        (0, ["import", "optuna", place, "synthetic", "--name", "back"]),
        (2, ["import", "optuna", wrong, "synthetic"]),
    ):
        ended, printed = archfront_command(*arguments)
        assert ended == code, printed
        assert "import" in arguments or "***" in printed
        assert not any(word in printed for word in ("se/cret", "se%2Fcret", password)), printed
    assert password.replace("/", "%2F") not in json.dumps(Job(job.ledger, "back").spec)


def test_choices_that_json_does_not_have_become_text(tmp_path: Path, postgres: Postgres) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(storage=storage, study_name="clip")
    choices = optuna.distributions.CategoricalDistribution([1.0, math.inf, -math.inf])
    for value in choices.choices:
        study.add_trial(optuna.trial.create_trial(value=1.0, params={"clip": value}, distributions={"clip": choices}))
    ledger = Ledger.open(postgres.ledger())
    assert import_study(ledger, storage, "clip").endings["done"] == 3
    with ledger.engine.connect() as connection:
        found = [row["genotype"]["clip"] for row in evaluation_rows(connection, 1, range(3))]
    assert found == [1.0, "inf", "-inf"]
    ledger.close()


def test_an_export_that_fails_leaves_no_study(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> object:
        raise RuntimeError("half-way")

    for place in (f"sqlite:///{tmp_path}/s.db", str(tmp_path / "s.log")):
        with monkeypatch.context() as patch:
            patch.setattr("archfront.interchange.optuna_export.TrialMaker.trial", break_down)
            with pytest.raises(RuntimeError, match="half-way"):
                export_job(job, f"optuna:{place}")
        assert open_storage(place, "--to", create=False)[0].get_all_studies() == []
        export_job(job, f"optuna:{place}")
