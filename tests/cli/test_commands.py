"""The command line as a user meets it: output, formats, exit codes, and every kind of bad input."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from commands import Command
from jobs import synthetic_job

from archfront.db.ledger import Ledger


def job_file(folder: Path, **changes: Any) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(synthetic_job(**changes)))
    return str(path)


def test_a_job_from_file_to_front(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    file = job_file(tmp_path, evaluations=40, evaluator={"fidelities": [1, 3]})
    code, out, err = archfront("run", file, "--plugin", str(plugin))
    assert code == 0, err
    assert "40/40" in out
    assert "archfront front 1" in out

    code, out, _ = archfront("front", "last", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"evaluation", "key", "genotype", "fidelity", "gain", "cost"} <= set(rows[0])
    assert {row["fidelity"] for row in rows} == {3}

    code, out, _ = archfront("front", "1", "--format", "csv", "--fidelity", "1", "--objectives", "cost")
    table = list(csv.DictReader(out.splitlines()))
    assert len({row["cost"] for row in table}) == 1
    assert json.loads(table[0]["genotype"])

    code, _, _ = archfront("front", "synthetic", "--format", "parquet", "--to", "front.parquet")
    assert code == 0
    assert len(pd.read_parquet("front.parquet")) == len(rows)

    _, out, _ = archfront("front", "--where", "cost <= 14 and gain > 1", "--fidelity", "any", "--json")
    assert all(row["cost"] <= 14 for row in json.loads(out))
    _, early, _ = archfront("front", "--at", "3", "--json")
    assert all(row["evaluation"] <= 5 for row in json.loads(early))
    _, none, _ = archfront("front", "--at", "2001-01-01T00:00:00", "--json")
    assert json.loads(none) == []

    _, out, _ = archfront("status", "--json")
    assert json.loads(out)["evaluations"]["done"] == 40
    _, out, _ = archfront("jobs", "--json")
    assert [row["state"] for row in json.loads(out)] == ["done"]
    code, _, err = archfront("resume", "last", "--plugin", str(plugin))
    assert code == 2
    assert "--budget +N" in err
    code, _, err = archfront("resume", "last", "--plugin", str(plugin), "--budget", "+10")
    assert code == 0, err
    assert json.loads(archfront("status", "--json")[1])["evaluations"]["done"] == 50
    code, _, _ = archfront("export", "last", rows[0]["key"][:10], "--to", "best.json")
    assert code == 0
    assert json.loads(Path("best.json").read_text())["genotype"] == rows[0]["genotype"]


def test_json_run_prints_one_document(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    code, out, _ = archfront("run", job_file(tmp_path, evaluations=10), "--plugin", str(plugin), "--json")
    assert code == 0
    assert json.loads(out)["ended"] == "budget"


def test_catalogues_and_schema(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    for command, expected in (("spaces", "fbnet"), ("strategies", "optuna:tpe"), ("evaluators", "training")):
        code, out, _ = archfront(command, "--json")
        assert code == 0
        assert expected in {row["name"] for row in json.loads(out)}
    _, out, _ = archfront("schema")
    document = json.loads(out)
    names = [choice["properties"]["name"]["const"] for choice in document["properties"]["strategy"]["anyOf"]]
    assert "nsga2" in names
    code, out, _ = archfront("validate", job_file(tmp_path), "--plugin", str(plugin))
    assert code == 0
    assert "is valid" in out


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown space": ({"space": {"name": "fbnett"}}, ["space.name", "'fbnett'", "Did you mean 'fbnet'"]),
    "unknown strategy": ({"strategy": {"name": "nsga"}}, ["strategy.name", "'nsga'", "Did you mean 'nsga2'"]),
    "unknown metric": (
        {"objectives": [{"metric": "gian", "direction": "max"}]},
        ["objectives.0.metric", "'gian'", "Did you mean 'gain'"],
    ),
    "metric in a constraint": ({"constraints": ["costs <= 1"]}, ["constraints.0", "'costs'", "'cost'"]),
    "unknown evaluator": ({"evaluators": [{"name": "trainig"}]}, ["evaluators.0.name", "'trainig'", "'training'"]),
    "misspelt key": ({"stratgey": {"name": "random"}}, ["stratgey", "Did you mean 'strategy'"]),
    "misspelt inner key": ({"strategy": {"name": "nsga2", "popluation": 3}}, ["popluation", "'population'"]),
    "misspelt worker key": ({"workers": {"executor": "inline", "cuont": 3}}, ["workers.cuont", "'count'"]),
    "misspelt column": ({"space": {"name": "choices", "colums": {"a": [1]}}}, ["space.colums", "'columns'"]),
    "unparsable constraint": ({"constraints": ["cost << 4"]}, ["constraints.0", "'cost << 4'", "latency_ms <= 4"]),
    "confidence without an error": ({"constraints": ["gain >= 1 @ 95%"]}, ["constraints.0", "confidence"]),
    "budget 0": ({"budget": {"evaluations": 0}}, ["budget.evaluations", "0", "greater than or equal to 1"]),
    "no budget": ({"budget": {}}, ["budget.evaluations", "is missing"]),
    "falling fidelities": (
        {"evaluators": [{"name": "synthetic", "fidelities": [9, 3]}]},
        ["evaluators.0.fidelities", "[9, 3]", "rising"],
    ),
    "wrong type": ({"strategy": {"name": "nsga2", "population": "many"}}, ["strategy.population", "'many'"]),
    "seed of another space": ({"seeds": [[1, 2]]}, ["genotype", "[1, 2]", "8 choices"]),
    "direction": ({"objectives": [{"metric": "gain", "direction": "up"}]}, ["objectives.0.direction", "'up'", "'max'"]),
    "two names for one": ({"name": "last"}, ["name", "'last'"]),
    "unknown data set": (
        {
            "space": {"name": "fbnet-tiny"},
            "data": {"name": "digitz"},
            "evaluators": [{"name": "training", "fidelities": [1]}],
            "objectives": [{"metric": "accuracy", "direction": "max"}],
        },
        ["data.name", "'digitz'", "Did you mean 'digits'"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_jobs_are_named_and_change_nothing(archfront: Command, tmp_path: Path, plugin: Path, case: str) -> None:
    changes, expected = BAD[case]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(synthetic_job() | changes))
    Ledger.open("archfront.db").close()
    before = Path("archfront.db").read_bytes()
    code, _, err = archfront("run", "job.yaml", "--plugin", str(plugin))
    assert code == 2, err
    for words in expected:
        assert words in err, err
    assert "Traceback" not in err
    assert Path("archfront.db").read_bytes() == before


def test_all_errors_of_a_file_come_at_once(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(synthetic_job() | {"seed": -1, "budget": {"evaluations": 0}}))
    _, _, err = archfront("validate", "job.yaml", "--plugin", str(plugin))
    assert "seed" in err
    assert "budget.evaluations" in err


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [1, 2", "no valid YAML"), ("just words", "holds no mapping"), ("name: a\nname: b", "'name' is given twice")],
)
def test_files_that_are_no_jobs(archfront: Command, tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "job.yaml").write_text(content)
    code, _, err = archfront("run", "job.yaml")
    assert code == 2
    assert expected in err
    assert not Path("archfront.db").exists()


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize("changes", [{"seed": -1}, {"space": {"name": "fbnett"}}])
def test_a_bad_job_makes_no_database(archfront: Command, tmp_path: Path, command: str, changes: dict[str, Any]) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(synthetic_job() | changes))
    code, _, err = archfront(command, "job.yaml", "--db", "new.db")
    assert code == 2, err
    assert not Path("new.db").exists()


def test_missing_things(archfront: Command, tmp_path: Path) -> None:
    for arguments, expected in (
        (["run", "none.yaml"], "none.yaml"),
        (["front", "last"], "does not exist"),
        (["jobs", "--db", "no/folder/x.db"], "does not exist"),
        (["jobs", "--db", "mysql://host/x"], "--db"),
        (["jobs", "--db", "postgresql://u:p@host:port/x"], "is no database URL"),
        (["run", "none.yaml", "--plugin", "none.py"], "--plugin"),
    ):
        code, _, err = archfront(*arguments)
        assert code == 2, err
        assert expected in err
    Ledger.open("archfront.db").close()
    code, _, err = archfront("front", "nosuchjob")
    assert code == 2
    assert "'nosuchjob'" in err


def test_bad_databases(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    file = job_file(tmp_path)
    Path("bad.db").write_bytes(b"not a database at all, though long enough to be read as one " * 40)
    code, _, err = archfront("run", file, "--plugin", str(plugin), "--db", "bad.db")
    assert code == 2
    assert "damaged" in err
    Ledger.open("new.db").close()
    with sqlite3.connect("new.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9_9_9'")
    code, _, err = archfront("run", file, "--plugin", str(plugin), "--db", "new.db")
    assert code == 2
    assert "newer archfront" in err


def test_a_read_only_folder(tmp_path: Path, plugin: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    Ledger.open(str(folder / "archfront.db")).close()
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(synthetic_job()))
    (folder / "plugin.py").write_text(plugin.read_text())
    folder.chmod(0o555)
    for path in folder.iterdir():
        path.chmod(0o444)
    # Root may write anywhere, so the command gives its rights up before it begins.
    code = (
        "import os, sys, sqlalchemy.dialects.sqlite, archfront.search.driver, archfront.spaces.choices;"
        "from archfront.cli.main import main;"
        "os.getuid() == 0 and os.setuid(65534); sys.argv = ['archfront', *sys.argv[1:]]; main()"
    )
    arguments = ["run", str(file), "--db", str(folder / "archfront.db"), "--plugin", str(folder / "plugin.py")]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "cannot be written" in ended.stderr


def test_two_drivers_on_one_job(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    file = job_file(tmp_path, evaluations=400, evaluator={"sleep_s": 0.05})
    command = [sys.executable, "-m", "archfront", "run", file, "--plugin", str(plugin)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _await_evaluations(5)
        code, _, err = archfront("resume", "last", "--plugin", str(plugin))
        assert code == 2
        assert f"process {first.pid}" in err
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=20)
        assert first.returncode == 130
        assert "archfront resume 1" in err
        assert json.loads(archfront("status", "--json")[1])["state"] == "stopped"
    finally:
        first.kill()
    code, out, _ = archfront("cancel", "last")
    assert code == 0
    assert "cancelled" in out
    code, _, err = archfront("resume", "last", "--plugin", str(plugin))
    assert code == 2
    assert "cancelled for good" in err


def test_cancelling_a_running_job_ends_it(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    file = job_file(tmp_path, evaluations=4000, evaluator={"sleep_s": 0.02})
    command = [sys.executable, "-m", "archfront", "run", file, "--plugin", str(plugin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        _await_evaluations(5)
        assert archfront("cancel", "last")[0] == 0
        assert driver.wait(timeout=20) == 0
    states = json.loads(archfront("status", "--json")[1])
    assert states["state"] == "cancelled"
    assert states["evaluations"]["running"] == 0


def _await_evaluations(count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if Path("archfront.db").exists():
            try:
                with sqlite3.connect("archfront.db") as connection:
                    done = connection.execute("SELECT count(*) FROM evaluations WHERE seq IS NOT NULL").fetchone()[0]
            except sqlite3.OperationalError:
                done = 0
            if done >= count:
                return
        time.sleep(0.05)
    pytest.fail("the job made no progress")


def test_resuming_under_changed_code_asks(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    (tmp_path / "mine.py").write_text(plugin.read_text())
    file = job_file(tmp_path, evaluations=10)
    assert archfront("run", file, "--plugin", "mine.py")[0] == 0
    (tmp_path / "mine.py").write_text(plugin.read_text() + "\n# changed\n")
    code, _, err = archfront("resume", "last", "--plugin", "mine.py", "--budget", "+5")
    assert code == 2
    assert "plugin mine.py" in err
    assert "--accept-changes" in err
    code, _, err = archfront("resume", "last", "--plugin", "mine.py", "--budget", "+5", "--accept-changes")
    assert code == 0, err


def test_database_commands(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    archfront("run", job_file(tmp_path, evaluations=10), "--plugin", str(plugin))
    assert archfront("db", "current")[1].strip() == "v0_4_0"
    assert archfront("db", "check")[0] == 0
    assert archfront("db", "upgrade")[0] == 0


def test_version_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import archfront, archfront.cli.main; "
        "heavy = {'torch', 'ray', 'optuna', 'pandas'} & set(sys.modules); assert not heavy, heavy; "
        "print(archfront.__version__)"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error::ImportWarning"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["front", "--format", "bad"],
        ["status", "--tracebacks", "-1"],
        ["front", "99999999999999999999999"],
        ["front", "--at", "99999999999999999999999"],
        ["front", "--fidelity", "99999999999999999999999"],
        ["front", "--to", "/no/folder/x.csv", "--format", "csv"],
    ],
)
def test_wrong_use_is_one_clear_message(archfront: Command, tmp_path: Path, plugin: Path, arguments: list[str]) -> None:
    archfront("run", job_file(tmp_path, evaluations=3), "--plugin", str(plugin))
    code, _, err = archfront(*arguments)
    assert code == 2
    assert "error" in err
    assert "Traceback" not in err
    code, out, _ = archfront(*arguments, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


def test_names_with_brackets_are_shown_as_they_are(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    code, out, err = archfront("run", job_file(tmp_path, evaluations=3, name="[/red]"), "--plugin", str(plugin))
    assert code == 0, err
    assert "[/red]" in out
    for command in ("jobs", "status"):
        code, out, _ = archfront(command)
        assert code == 0
        assert "[/red]" in out


def test_cancelling_a_killed_job_leaves_nothing_written_ahead(archfront: Command, tmp_path: Path, plugin: Path) -> None:
    file = job_file(tmp_path, evaluations=400, evaluator={"sleep_s": 0.05})
    command = [sys.executable, "-m", "archfront", "run", file, "--plugin", str(plugin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        _await_evaluations(3)
        driver.kill()
    assert archfront("cancel", "last")[0] == 0
    states = json.loads(archfront("status", "--json")[1])["evaluations"]
    assert states["running"] == 0
    assert states["cancelled"] > 0


def test_a_front_under_a_condition_is_empty_before_the_first_result(
    archfront: Command, tmp_path: Path, plugin: Path
) -> None:
    code, _, err = archfront("submit", job_file(tmp_path), "--plugin", str(plugin))
    assert code == 0, err
    code, out, err = archfront("front", "last", "--where", "gain > 1", "--json")
    assert code == 0, err
    assert json.loads(out) == []


def test_an_import_from_nowhere_makes_no_ledger(archfront: Command, tmp_path: Path) -> None:
    code, _, err = archfront("import", "optuna", str(tmp_path / "missing.log"), "study")
    assert code == 2
    assert "STORAGE" in err
    assert not (tmp_path / "archfront.db").exists()
