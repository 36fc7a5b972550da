"""Fronts that are read again and again: the same as when they are read afresh, whatever was kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from jobs import synthetic_job

import archfront

ASKED: list[dict[str, Any]] = [
    {},
    {"objectives": ["cost"], "where": "gain > -100"},
    {"objectives": ["-gain", "+cost"], "fidelity": "any"},
    {"at": 20},
]


def rows(job: archfront.Job, asked: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in job.front(**asked)]


def test_what_is_kept_is_what_is_there(url: str, plugin: Path) -> None:
    job = archfront.run(synthetic_job(40), db=url, plugins=[plugin])
    for asked in ASKED:
        # As a table, as rows with all their facts, and from a job that has read nothing yet.
        first = rows(job, asked)
        again = rows(job, asked)
        fresh = rows(archfront.Job(url), asked)
        assert first == again == fresh
        assert first
        for row in job.front(**asked):
            row.clear()
        assert rows(job, asked) == first
    before = {row["evaluation"] for row in job.front()}
    job.resume(evaluations=40, accept_changes=lambda _: True)
    after = rows(job, {})
    assert after == rows(archfront.Job(url), {})
    assert {row["evaluation"] for row in after} != before


def test_members_of_an_older_ledger(url: str, plugin: Path) -> None:
    """Fronts written before members showed themselves are read from the tables: now, and at every past moment."""
    job = archfront.run(synthetic_job(40), db=url, plugins=[plugin])
    moments: list[dict[str, Any]] = [{}, *({"at": number} for number in range(40))]
    shown = [rows(archfront.Job(url), asked) for asked in moments]
    with job.ledger.engine.begin() as connection:
        connection.execute(sa.text("UPDATE front_members SET shown = NULL WHERE number % 2 = 0"))
    assert [rows(archfront.Job(url), asked) for asked in moments] == shown
    with job.ledger.engine.begin() as connection:
        connection.execute(sa.text("UPDATE front_members SET shown = NULL"))
    assert [rows(archfront.Job(url), asked) for asked in moments] == shown


def test_metrics_that_are_no_numbers(url: str, plugin: Path) -> None:
    """The packed columns do not tell a metric that is missing from one that is not a number; the rows do."""
    job = archfront.run(synthetic_job(20), db=url, plugins=[plugin])
    with job.ledger.engine.begin() as connection:
        found = rows(job, {"fidelity": "any"})[0]["evaluation"]
        statement = "UPDATE metrics SET value = NULL WHERE number = :number AND name = 'cost'"
        connection.execute(sa.text(statement), {"number": found})
        connection.execute(sa.text("UPDATE front_members SET shown = NULL"))
    fresh = archfront.Job(url)
    by_number = {row["evaluation"]: row for row in fresh.front(objectives=["gain"])}
    stored = {row["evaluation"]: row for row in fresh.front()}
    assert stored[found]["cost"] is None
    assert all("cost" in row for row in by_number.values())
