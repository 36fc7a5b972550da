from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_rows import SIGNS, SPEC
from postgres import Postgres

from archfront.db.ledger import Ledger
from archfront.db.writer import JobWriter


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh ledger's URL, on each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.ledger()


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    opened = Ledger.open(url)
    yield opened
    opened.close()


@pytest.fixture
def job(ledger: Ledger) -> int:
    return ledger.create_job("test", SPEC, "s" * 32)


@pytest.fixture
def writer(ledger: Ledger, job: int) -> JobWriter:
    return ledger.writer(job, ledger.begin_run(job, {}), SIGNS)
