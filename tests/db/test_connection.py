"""Opening a database: URLs as they are shown, bad ones, and several processes that open an empty one at once."""

import subprocess
import sys

import pytest
import sqlalchemy as sa
from postgres import Postgres

from archfront.db.connection import open_engine, parse_url, without_password
from archfront.errors import InputError

OPEN = """
import sys
from archfront.db.connection import open_engine
print("ready", flush=True)
sys.stdin.readline()
open_engine(sys.argv[1], create=True).dispose()
"""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("archfront.db", "archfront.db"),
        ("sqlite:////a@b/c:d@e.db", "sqlite:////a@b/c:d@e.db"),
        ("postgresql://u@h:5432/db?sslmode=require", "postgresql://u@h:5432/db?sslmode=require"),
        ("postgresql://u:secret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se/cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se?cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se@cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se@cr/et@h/db", "postgresql://u:***@h/db"),
        ("postgresql://me@corp:secret@h/db", "postgresql://me%40corp:***@h/db"),
        ("postgresql://u:se/cret@h:port/db", "postgresql://u:***@h:port/db"),
        ("postgresql:/u:secret@h/db", "postgresql:/u:***@h/db"),
        ("optuna:postgresql://u:secret@h/db", "optuna:postgresql://u:***@h/db"),
        ("postgresql://h/db?user=u&password=secret", "postgresql://h/db?user=u&password=***"),
        ("postgresql://u:secret@h:port/db?sslpassword=secret&a=b", "postgresql://u:***@h:port/db?sslpassword=***&a=b"),
        ("postgresql://h/db?passfile=/a", "postgresql://h/db?passfile=/a"),
    ],
)
def test_no_password_is_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown


def test_a_port_that_is_no_number_is_named() -> None:
    with pytest.raises(InputError, match="is no database URL") as error:
        parse_url("postgresql://u:secret@h:port/x")
    assert "secret" not in str(error.value)


def test_several_processes_open_an_empty_database_at_once(postgres: Postgres) -> None:
    url = postgres.empty()
    command = [sys.executable, "-c", OPEN, url]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, errors
    engine = open_engine(url, create=False)
    assert "jobs" in sa.inspect(engine).get_table_names()
    engine.dispose()
